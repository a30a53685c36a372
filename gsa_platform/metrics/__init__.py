"""Running metrics of training and evaluation; all are torchmetrics and reduce over ranks."""

from gsa_platform.metrics.gates import GateMean
from gsa_platform.metrics.layer_mean import LayerMean
from gsa_platform.metrics.nll import PositionNLL, TokenNLL
from gsa_platform.metrics.peak import (
    measured_matmul_flops,
    model_flops_utilisation,
    peak_flops,
)
from gsa_platform.metrics.selection import SelectedKeys, SelectionRecall
from gsa_platform.metrics.sink import FirstTokenAttention

__all__ = [
    "FirstTokenAttention",
    "GateMean",
    "LayerMean",
    "PositionNLL",
    "SelectedKeys",
    "SelectionRecall",
    "TokenNLL",
    "measured_matmul_flops",
    "model_flops_utilisation",
    "peak_flops",
]
