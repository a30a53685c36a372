"""The section of the closing summary about what attention looked at."""

import math
from collections.abc import Mapping
from typing import Any

from gsa_platform.report.section import FinishedRun, Rows
from gsa_platform.report.words import join, number, percent, rows


def attention_section(run: FinishedRun) -> Rows:
    """Keys attended, selection recall, first-token share, mean gates."""
    return attention_rows(run.summary)


def attention_rows(r: Mapping[str, Any]) -> Rows:
    """r: any of keys_mean, keys_fraction, budget, first_token_attention (share per layer),
    first_token_uniform, gate_value_mean, gate_output_mean, recall_first, recall_last,
    index_saturated_max (shares)."""
    keys = join(
        [
            number(r, "keys_mean", ",.1f", " per query (mean)"),
            percent(r, "keys_fraction", " of the causal keys"),
            number(r, "budget", ",.0f", " budget"),
        ]
    )
    recall_first, recall_last = percent(r, "recall_first"), percent(r, "recall_last")
    recall = ""
    if recall_first and recall_last:
        recall = f"{recall_first} -> {recall_last} of dense attention mass covered (first -> last)"
    elif recall_first or recall_last:
        recall = f"{recall_last or recall_first} of dense attention mass covered"
    saturated = ""
    most = r.get("index_saturated_max")
    if most is not None and not most <= 0.5:
        share = percent(r, "index_saturated_max", " of a layer's logits")
        saturated = f"WARNING: {share} beyond 8: keys tie, the oldest win"
    value = number(r, "gate_value_mean", ".3f", " value")
    output = number(r, "gate_output_mean", ".3f", " output")
    return rows(
        [
            ("Keys attended", keys),
            ("Selection recall", recall),
            ("Index scores", saturated),
            ("First-token share", _first_token(r)),
            ("Mean gate", join([value, output])),
        ]
    )


def _first_token(r: Mapping[str, Any]) -> str:
    layers = r.get("first_token_attention")
    if layers is None or len(layers) == 0:
        return ""
    shares = [float(layer) for layer in layers]
    finite = [share for share in shares if math.isfinite(share)]
    if len(finite) < len(shares):
        return f"not finite in {len(shares) - len(finite)} of {len(shares)} layers"
    top = max(range(len(shares)), key=shares.__getitem__)
    parts = [f"{100 * sum(shares) / len(shares):.2f} % mean over layers"]
    if len(shares) > 1:
        parts.append(f"{100 * shares[top]:.2f} % in layer {top}")
    parts.append(percent(r, "first_token_uniform", " if uniform", digits=2))
    return join(parts)
