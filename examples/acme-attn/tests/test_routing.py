"""Routing against the paper's definition, written out with a T x S mask; and the experiments."""

import pytest
import torch
from acme_attn import MobaConfig, moba
from acme_attn.moba import MobaAttention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsa_platform import compose
from gsa_platform.contracts import LayerDims, Sequence
from gsa_platform.errors import UserError
from gsa_platform.validate import validate

B, T, H, K, E = 2, 50, 4, 2, 8


def attention(block_size: int, top_k: int) -> MobaAttention:
    config = MobaConfig(block_size=block_size, top_k=top_k)
    return MobaAttention(config, LayerDims(H * E, H, K, E, T))


def reference(q, k, v, block_size, top_k):
    """Eq. 2 to 6, one query and head at a time."""
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, :, h // (H // K)], v[b, :, h // (H // K)]
            for t in range(T):
                own = t // block_size
                means = [keys[j * block_size : (j + 1) * block_size].mean(0) for j in range(own)]
                score = torch.tensor([float(q[b, t, h] @ mean) for mean in means])
                chosen = [*score.topk(min(top_k - 1, own)).indices.tolist(), own]
                seen = torch.tensor([s // block_size in chosen and s <= t for s in range(T)])
                weight = (keys[seen] @ q[b, t, h] * E**-0.5).softmax(-1)
                out[b, t, h] = weight @ values[seen]
    return out


@pytest.mark.parametrize(("block_size", "top_k"), [(8, 1), (8, 3), (7, 2), (16, 4), (64, 2)])
def test_it_is_the_paper(block_size, top_k):
    torch.manual_seed(0)
    q = torch.randn(B, T, H, E, dtype=torch.float64)
    k, v = (torch.randn(B, T, K, E, dtype=torch.float64) for _ in range(2))
    got = attention(block_size, top_k)(q, k, v, None, Sequence()).out_BTHE
    torch.testing.assert_close(got, reference(q, k, v, block_size, top_k))


def test_mean_keys_counts():
    assert attention(8, 1).mean_keys(16) == 4.5
    assert attention(8, 100).mean_keys(64) == 32.5


@pytest.mark.parametrize("name", ["moba_smoke", "moba_32k"])
def test_the_experiments_compose(name):
    cfg = compose.load([f"experiment={name}", "picked.hardware=none"])
    validate(cfg)
    assert cfg.attention.name == "moba" and cfg.indexer.name == "none"


def test_wrong_sizes_are_refused_early():
    cfg = compose.load(["attention=moba", "attention.top_k=0", "picked.hardware=none"])
    with pytest.raises(UserError, match=r"attention\.top_k=0"):
        validate(cfg)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                held = leaf.untyped_storage().nbytes() // leaf.itemsize
                self.size = max(self.size, min(leaf.numel(), held))
        return out


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setitem(moba.GATHERED, "cpu", 1 << 16)
    sizes = []
    for length in (1024, 2048):
        q, k, v = (torch.randn(1, length, n, E, requires_grad=True) for n in (H, K, K))
        with Largest() as largest:
            attention(32, 3)(q, k, v, None, Sequence()).out_BTHE.sum().backward()
        sizes.append(largest.size)
    assert sizes[1] < 2.5 * sizes[0] and sizes[1] < 2048 * 2048 // 16
