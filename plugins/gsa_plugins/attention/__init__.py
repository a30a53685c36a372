"""Attention components, one a file."""
