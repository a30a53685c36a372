"""Measurements of a model that are no part of training it."""
