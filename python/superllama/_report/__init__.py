"""`superllama report`: a metrics file as a page."""
