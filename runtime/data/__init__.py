"""Samples and data files, shared by evaluation and training."""
