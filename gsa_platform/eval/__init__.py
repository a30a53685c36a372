"""`eval`: what a checkpoint is worth on the validation split."""

from gsa_platform.eval.perplexity import main

__all__ = ["main"]
