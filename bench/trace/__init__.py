"""Tracers of a model file's reads, and the mapping of what they saw to file offsets, tensors, layers and experts."""
