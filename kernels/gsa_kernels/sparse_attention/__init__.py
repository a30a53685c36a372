"""Softmax attention over a Selection."""

from .api import AttentionResult, sparse_attention

__all__ = ["AttentionResult", "sparse_attention"]
