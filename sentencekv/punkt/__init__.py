"""Data: parameters of sentence splitting, trained by `training/punkt.py`, and a list of abbreviations."""
