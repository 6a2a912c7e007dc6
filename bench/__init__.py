"""Measurements: generated models, memory limits, the SSD-offloading study. Each program runs as a file: bench/X.py."""
