"""`superllama top`: a running model, live in a terminal."""
