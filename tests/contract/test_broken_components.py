"""The contract kit bites: each deliberately wrong component is caught by the right check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gsa_platform import registry
from gsa_platform.testing import run_checks, slot_checks

FOLDER = Path(__file__).parents[1] / "broken_components"
DECODING = {
    "decoding_in_chunks_is_one_forward",
    "decoding_by_token_is_one_forward",
    "decoding_keeps_documents_apart",
}
APART = {"documents_stay_apart", "a_document_in_the_middle_is_the_document_alone"}
# (slot, component) -> the check that must catch it, words it must say, what else fails with it
CAUGHT = {
    ("attention", "reads_the_future"): (
        "later_tokens_change_nothing",
        "changing tokens 1.. of 100 (training) moved the output of position 0",
        {"no_gradient_from_later_tokens", "prefixes_agree", *DECODING},
    ),
    ("attention", "mixes_the_batch"): (
        "batch_mates_change_nothing",
        "mixes the batch",
        {"batch_order_changes_nothing"},
    ),
    ("attention", "ignores_documents"): (
        "documents_stay_apart",
        "changing the document before position 37 moved the output of position 37",
        APART,
    ),
    ("attention", "forgets_the_cache"): (
        "decoding_in_chunks_is_one_forward",
        "from position 1 on",
        DECODING,
    ),
    ("attention", "drops_gradients"): (
        "gradients_reach_every_projection",
        "v_proj.weight has no gradient",
        {"gradients_are_right"},
    ),
    ("attention", "doubles_gradients"): ("gradients_are_right", "central differences", set()),
    ("attention", "swaps_heads"): (
        "grouped_heads_are_repeated_heads",
        "wrong key-value head",
        set(),
    ),
    ("attention", "promises_bfloat16"): (
        "declared_dtypes_and_devices_work",
        "declares bfloat16 on cpu",
        set(),
    ),
    ("attention", "hides_from_the_cpu"): ("the_skips_are_truthful", "yet it runs here", set()),
    ("attention", "needs_nothing_it_names"): (
        "the_skips_are_truthful",
        "needs no-such-package",
        set(),
    ),
    ("attention", "promises_determinism"): (
        "runs_repeat_exactly",
        "declares deterministic=True",
        set(),
    ),
    ("attention", "cannot_be_pickled"): ("pickles", "lambda", set()),
    ("attention", "keeps_state_to_itself"): (
        "state_dict_holds_everything",
        "neither a parameter nor a buffer",
        {"grouped_heads_are_repeated_heads"},
    ),
    ("attention", "reads_unwritten_memory"): (
        "unwritten_memory_is_never_read",
        "torch.empty returning NaN",
        {"runs_repeat_exactly"},  # PyTorch's deterministic mode fills memory with NaN too
    ),
    ("attention", "differs_when_compiled"): ("compiles", "compiling changes the result", set()),
    ("attention", "ignores_the_selection"): (
        "tile-unselected_keys_are_not_read",
        "outside the selection",
        {"tile-is_softmax_over_the_selection"},
    ),
    ("attention", "promises_mass"): (
        "tile-declared_mass_and_bias_are_given",
        "it declares mass, but a step with objective=kl raises ValueError",
        set(),
    ),
    ("attention", "drops_the_bias"): (
        "tile-declared_mass_and_bias_are_given",
        "the bias is ignored",
        set(),
    ),
    ("attention", "gates_twice"): (
        "a_fused_gate_multiplies_the_output",
        "the fused gate is not a multiplication",
        set(),
    ),
    ("indexer", "learns_nothing"): (
        "tile-objectives_teach_the_indexer",
        "the indexer never learns",
        {"tile-gradients_are_right"},
    ),
    ("indexer", "pools_the_tile"): (
        "tile-later_tokens_change_nothing",
        "reads the future",
        {"tile-prefixes_agree", *(f"tile-{name}" for name in DECODING)},
    ),
    ("sparsity", "overspends"): (
        "tile-budgets_are_whole_and_in_bounds",
        "outside 1 .. max_keys",
        {"tile-selections_keep_to_the_budget"},
    ),
    ("sparsity", "averages_the_batch"): (
        "tile-budgets_come_from_their_own_row",
        "a batch mean leaks",
        None,  # much else: it leaks the future and other samples
    ),
    ("gate", "one_for_all_heads"): ("values_are_finite_and_broadcast", "(2, 1, 4, 8)", set()),
    ("gate", "looks_back"): ("a_gate_belongs_to_its_token", "it looks around", DECODING | APART),
}


@pytest.fixture(autouse=True)
def loaded(fresh_registry):
    registry.get().load_path(FOLDER)


@pytest.mark.parametrize(("slot", "name"), CAUGHT, ids=["-".join(key) for key in CAUGHT])
def test_it_is_caught_by_the_right_check(slot, name):
    right, words, others = CAUGHT[slot, name]
    torch.set_num_threads(1)
    one_mode = ["attention.mode=tile"] if slot in ("indexer", "sparsity") else []
    # Compiling is the slowest check, and beside the point for all but one.
    leave_out = () if right == "compiles" else ("compiles",)
    report = run_checks(slot, name, beside=one_mode, leave_out=leave_out)
    texts = {result.name: result.text for result in report.results if result.bad}
    assert right in texts, f"not caught:\n{report}"
    assert words in texts[right]
    assert all(result.outcome != "ERROR" for result in report.results), str(report)
    if others is not None:
        assert set(texts) == {right, *others}, str(report)


def test_every_wrong_component_is_listed():
    found = registry.get()
    wrong = {
        (entry.slot, name)
        for entries in found.entries.values()
        for name, entry in entries.items()
        if str(FOLDER) in entry.plugin.distribution
    }
    assert wrong == set(CAUGHT)


def test_checks_have_readable_ids_and_say_how_they_probe():
    found = slot_checks("attention", "gsa")
    ids = [str(check) for check in found]
    assert len(set(ids)) == len(ids) and "tile-prefixes_agree" in ids
    assert all(len(check.probe.summary) > 30 for check in found)
