"""`eval`: what a checkpoint is worth on the validation split."""

from gsa_platform.eval.command import main

__all__ = ["main"]
