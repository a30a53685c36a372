"""What the indexer learns from: KL to the attention it should have chosen, or a logit bias."""

from .api import dense_kl, log_score_bias, selected_kl

__all__ = ["dense_kl", "log_score_bias", "selected_kl"]
