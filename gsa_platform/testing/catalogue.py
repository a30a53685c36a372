"""Which probes a component of each slot gets, and in which modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gsa_platform import registry
from gsa_platform.components import SLOTS
from gsa_platform.errors import UserError, unknown
from gsa_platform.testing import (
    building,
    capabilities,
    causal,
    decoding,
    gradients,
    isolation,
    numerics,
    of_attention,
    of_gate,
    of_indexer,
    of_sparsity,
    training,
)
from gsa_platform.testing.case import Case, attention_beside
from gsa_platform.testing.check import Check, Probe, checks

# What every combination must keep; repeated in each mode of the attention beside.
CORE = (
    causal.later_tokens_change_nothing,
    causal.no_gradient_from_later_tokens,
    causal.prefixes_agree,
    decoding.decoding_in_chunks_is_one_forward,
    decoding.decoding_by_token_is_one_forward,
    decoding.decoding_keeps_documents_apart,
    isolation.batch_mates_change_nothing,
    isolation.batch_order_changes_nothing,
    isolation.documents_stay_apart,
    isolation.a_document_in_the_middle_is_the_document_alone,
    isolation.one_document_spelled_out_changes_nothing,
)
# What belongs to the component itself.
GENERAL = (
    capabilities.the_skips_are_truthful,
    building.builds_from_defaults,
    building.survives_yaml,
    building.unknown_settings_are_refused,
    numerics.declared_dtypes_and_devices_work,
    *CORE,
    numerics.every_head_grouping_runs,
    gradients.gradients_reach_every_projection,
    gradients.gradients_are_right,
    numerics.unwritten_memory_is_never_read,
    numerics.runs_repeat_exactly,
    numerics.recomputing_changes_nothing,
    numerics.compiles,
    building.state_dict_holds_everything,
    building.copies_are_independent,
    building.pickles,
    training.one_step_lowers_the_loss,
    training.its_cost_can_be_told,
    capabilities.what_is_not_declared_is_refused,
)
DENSE = building.equals_dense_attention_when_nothing_is_pruned
OF_SLOT: dict[str, tuple[Probe, ...]] = {
    "attention": (
        DENSE,
        capabilities.declared_head_dims_work,
        numerics.grouped_heads_are_repeated_heads,
        of_attention.its_choices_matter,
        of_attention.a_fused_gate_multiplies_the_output,
        of_attention.describes_itself,
        of_attention.observations_are_as_documented,
    ),
    "indexer": (
        DENSE,
        of_attention.its_choices_matter,
        of_indexer.objectives_teach_the_indexer,
        of_indexer.selections_keep_to_the_budget,
    ),
    "sparsity": (
        DENSE,
        of_attention.its_choices_matter,
        of_sparsity.window_sinks_and_bound_are_whole_numbers,
        of_sparsity.budgets_are_whole_and_in_bounds,
        of_sparsity.budgets_come_from_their_own_row,
        of_sparsity.observing_is_remembered,
        of_indexer.selections_keep_to_the_budget,
    ),
    "gate": (of_gate.values_are_finite_and_broadcast, of_gate.a_gate_belongs_to_its_token),
    "objective": (
        of_indexer.objectives_teach_the_indexer,
        of_indexer.index_losses_are_scalars_of_training_only,
        of_indexer.detached_objectives_move_only_the_indexer,
    ),
}

# Of an attention that takes a selection.
SELECTING = (
    of_attention.is_softmax_over_the_selection,
    of_attention.unselected_keys_are_not_read,
    of_attention.declared_mass_and_bias_are_given,
)


def slot_checks(
    slot: str, name: str, settings: dict[str, Any] | None = None, beside: Sequence[str] = ()
) -> list[Check]:
    """Every check of the component `name` of a slot. Raises UserError for an unknown name.

    An attention that takes a selection is checked in each of its modes, unless `settings` names
    one. A component of another slot is checked in one mode of the attention beside it (gsa), and
    again for what every combination must keep in the others.
    """
    if slot not in SLOTS:
        raise UserError(unknown("slot", slot, SLOTS))
    found, settings = registry.get(), dict(settings or {})
    own = found.component(slot, name)
    probes = (*GENERAL, *OF_SLOT[slot])
    if slot == "attention":
        probes = (*probes, *SELECTING) if own.capabilities.modes else probes
        modes = [settings["mode"]] if "mode" in settings else list(own.capabilities.modes or [""])
        return checks((Case(slot, name, settings, beside, mode), probes) for mode in modes)
    names = [text.partition("=")[2] for text in beside if text.startswith("attention=")]
    attention = found.component("attention", names[0] if names else attention_beside(slot))
    modes = list(attention.capabilities.modes)
    fixed = [text.partition("=")[2] for text in beside if text.startswith("attention.mode=")]
    # The last mode (tile) has both granularities, so it gets every probe.
    modes = fixed or modes[::-1] or [""]
    cases = [Case(slot, name, settings, beside, mode) for mode in modes]
    return checks((case, probes if i == 0 else CORE) for i, case in enumerate(cases))


def attention_checks(name: str, *, beside: Sequence[str] = (), **settings: Any) -> list[Check]:
    """Checks of attention=`name` with these settings, for ``pytest.mark.parametrize``:

        @pytest.mark.parametrize("check", attention_checks("acme", top_k=4), ids=str)
        def test_contract(check): check()

    beside: overrides of the rest of the configuration, as typed on the command line.
    """
    return slot_checks("attention", name, settings, beside)


def indexer_checks(name: str, *, beside: Sequence[str] = (), **settings: Any) -> list[Check]:
    """Checks of indexer=`name`; see ``attention_checks``."""
    return slot_checks("indexer", name, settings, beside)


def sparsity_checks(name: str, *, beside: Sequence[str] = (), **settings: Any) -> list[Check]:
    """Checks of sparsity=`name`; see ``attention_checks``."""
    return slot_checks("sparsity", name, settings, beside)


def gate_checks(name: str, *, beside: Sequence[str] = (), **settings: Any) -> list[Check]:
    """Checks of gate=`name`; see ``attention_checks``."""
    return slot_checks("gate", name, settings, beside)


def objective_checks(name: str, *, beside: Sequence[str] = (), **settings: Any) -> list[Check]:
    """Checks of objective=`name`; see ``attention_checks``."""
    return slot_checks("objective", name, settings, beside)
