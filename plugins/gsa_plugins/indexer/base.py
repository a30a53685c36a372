"""What every first-party indexer shares: the streamed selection by block scores."""

import torch

from gsa_kernels.index_score.api import BlockScores
from gsa_kernels.select.api import choose, select
from gsa_kernels.selection import Selection, SelectionSpec
from gsa_platform.contracts import Choice, Indexer, Sequence, Sparsity


class BlockIndexer(Indexer):
    """An indexer whose factors are `BlockScores`: the best blocks by score, as many as the
    controller's budget allows."""

    def outline(self, spec: SelectionSpec, keys: int) -> BlockScores | None:
        """Factors of a sequence without values, on the meta device: what kernels are chosen by.
        None: nothing is known before it runs."""
        return None

    def describe(self, device_type: str, spec: SelectionSpec, sparsity: Sparsity) -> str:
        most = sparsity.max_keys
        factors = self.outline(spec, most)
        if factors is None:
            return ""
        name, why = choose("auto", factors, spec, most, torch.device(device_type))
        return f"impl {name} ({why})"

    @torch.compiler.disable
    def select(
        self,
        factors: BlockScores,
        spec: SelectionSpec,
        sparsity: Sparsity,
        seq: Sequence,
        previous: Selection | None = None,
    ) -> Choice:
        budget = sparsity.budget(seq, spec)
        # A budget that is one number bounds the lists more tightly than any it may ever reach.
        limit = budget if isinstance(budget, int) else sparsity.max_keys
        chosen = select(
            factors,
            spec,
            budget,
            limit,
            factors.n_queries,
            seq.doc_start_BS,
            previous,
            sparsity.statistics,
        )
        return Choice(chosen.selection, chosen.statistics)
