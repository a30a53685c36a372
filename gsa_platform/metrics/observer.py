"""Feeds the attention metrics from the layer reports of probed forward passes."""

import torch
from torch import Tensor, nn

from gsa_platform.metrics.gates import GateMean
from gsa_platform.metrics.layer_mean import LayerMean
from gsa_platform.metrics.selection import SelectedKeys, SelectionRecall
from gsa_platform.metrics.sink import FirstTokenAttention
from gsa_platform.model.attention_layer import LayerReport


class AttentionObserver(nn.Module):
    """Keys attended, gates, saturated index logits, first-token attention and selection recall
    over layers.

    Recall is taken on the candidates: dense attention mass on keys that had to be chosen. `best`
    is what the same number of blocks could cover at most; `covered` counts window and sinks too.
    """

    def __init__(self, n_layers: int, context: int) -> None:
        super().__init__()
        self.keys = SelectedKeys()
        self.gates = GateMean(n_layers)
        self.first = FirstTokenAttention(context, n_layers)
        self.first_dense = FirstTokenAttention(context, n_layers)
        self.recall = SelectionRecall(n_layers)
        self.best = SelectionRecall(n_layers)
        self.covered = SelectionRecall(n_layers)
        self.saturated = LayerMean(n_layers)

    def update(self, reports: list[LayerReport], position_in_document_BT: Tensor) -> None:
        """position_in_document_BT: how many tokens of its document precede each query."""
        visible = (position_in_document_BT + 1)[:, None]
        for layer, report in enumerate(reports):
            if report.keys_BHT is not None:
                self.keys.update(report.keys_BHT, visible)
            self.gates.update(
                report.gate_values.get("value"), report.gate_values.get("output"), layer
            )
            if report.saturated is not None:
                self.saturated.update(report.saturated, layer)
            p = report.probe
            if not p:
                continue
            rows = p["position"].long()
            self.first.update(p["first_sparse"], rows, layer)
            self.first_dense.update(p["first_dense"], rows, layer)
            if report.keys_BHT is None:
                continue
            self.covered.update(p["covered"].sum(), p["covered"].numel(), layer=layer)
            possible = p["possible"].sum()
            self.recall.update(p["got"].sum(), possible, p["hits"].sum(), p["wanted"].sum(), layer)
            self.best.update(p["best"].sum(), possible, layer=layer)

    def compute(self) -> dict[str, float]:
        """Finite numbers only, ready to log."""
        out: dict[str, Tensor] = {}
        if self.keys.queries > 0:
            keys = self.keys.compute()
            out |= {"keys_mean": keys["mean"], "keys_fraction": keys["fraction"]}
            out |= {"keys_min": keys["min"], "keys_max": keys["max"]}
            recall = self.recall.compute()
            out |= {"recall": recall["recall"], "recall_overlap": recall["overlap"]}
            out["recall_best"] = self.best.compute()["recall"]
            out["mass_covered"] = self.covered.compute()["recall"]
        if self.saturated.update_called:
            shares = self.saturated.compute()
            out |= {"index_saturated": shares["mean"], "index_saturated_max": shares["max"]}
        for name, value in self.gates.compute().items():
            if not name.endswith("_layers"):
                out[f"gate_{name}"] = value
        if self.first.counts.sum() > 0:  # an attention need not tell what it looks at
            first = self.first.compute()
            out["first_token"], out["first_token_max"] = first["mean"], first["max"]
            out["first_token_uniform"] = first["uniform"]
            out["first_token_dense"] = self.first_dense.compute()["mean"]
        return {name: float(v) for name, v in out.items() if bool(torch.isfinite(v))}

    def layers_first_token(self) -> list[float]:
        """Mean attention on the first token, layer by layer; [] if no attention told it."""
        if not bool(self.first.counts.sum() > 0):
            return []
        return [float(v) for v in self.first.compute()["layers"]]

    def reset(self) -> None:
        for metric in self.children():
            metric.reset()  # type: ignore[operator]
