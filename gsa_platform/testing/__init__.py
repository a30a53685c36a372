"""The contract kit: checks that a component must pass, for its author's tests and for the
command ``gsa-platform plugins check``."""

from gsa_platform.testing.catalogue import (
    attention_checks,
    gate_checks,
    indexer_checks,
    objective_checks,
    slot_checks,
    sparsity_checks,
)
from gsa_platform.testing.check import Check
from gsa_platform.testing.report import Report, Result, run_checks

__all__ = [
    "attention_checks",
    "indexer_checks",
    "sparsity_checks",
    "gate_checks",
    "objective_checks",
    "slot_checks",
    "run_checks",
    "Check",
    "Report",
    "Result",
]
