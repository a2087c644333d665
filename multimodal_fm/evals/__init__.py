"""Evaluations of a model on a corpus, one file each; `base.py` says what such a file defines."""
