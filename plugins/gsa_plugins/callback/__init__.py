"""Callbacks of the training."""
