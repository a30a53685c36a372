"""Statistics of single keys' scores, taken without writing the scores, against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import make_factors
from test_triton_select import DEVICE, docs_of, documents, low, whole_numbers

from gsa_kernels.select.reference import describe

pytest.importorskip("triton")

pytestmark = pytest.mark.kernel

KEYS = 300
NAMES = ("count", "mean", "variance", "max", "entropy")
SIZES = [1, 7, 2]  # R, window, sinks


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    from gsa_kernels.select import statistics_launch

    monkeypatch.setattr(statistics_launch, "SEGMENT", 128)


def kept(kind, **kwargs):
    factors = low(make_factors(KEYS, **kwargs), torch.float16)
    q, k, weight = (x.clone() for x in (factors.q_BTJI, factors.k_BSI, factors.weight_BTJ))
    if kind == "equal":
        k[:] = k[:, :1]
    elif kind == "nearly equal":
        k[:] = k[:, :1]
        k[:, ::3, 0] += 1e-3
    elif kind == "giant":
        k[:, 150] *= 1e3
    elif kind == "giant first":
        k[:, 3] *= 1e3
    elif kind == "signed":
        weight[:, :, ::2] *= -1
    elif kind == "negative":
        weight *= -30
    elif kind == "nothing at first":
        k[:, :200] = 0
        return replace(factors, q_BTJI=q.abs(), k_BSI=k.abs(), bias_J=None)
    elif kind == "zero":
        weight *= 0
    return replace(factors, q_BTJI=q, k_BSI=k, weight_BTJ=weight)


def statistics_of(factors, docs, tiles, sizes=SIZES, entropy=True):
    from gsa_kernels.select import ops

    columns = max(0, (tiles[1] - 1) * sizes[0] - sizes[1] + 1)
    return ops.key_statistics(
        factors.q_BTJI, factors.k_BSI, factors.weight_BTJ, factors.bias_J, docs,
        [*sizes, factors.q_start], [*tiles, columns], float(factors.scale),
        factors.activation == "sigmoid", factors.heads, entropy,
    )  # fmt: skip


def expected(factors, docs, tiles, sizes=SIZES):
    """In float64 from the scores that the other path writes."""
    from gsa_kernels.index_score import ops

    r, window, sinks = sizes
    columns = max(0, (tiles[1] - 1) * r - window + 1)
    scores = ops.block_scores(
        factors.q_BTJI, factors.k_BSI[:, :, None], factors.weight_BTJ, factors.bias_J, docs,
        [1, *sizes, factors.q_start], [*tiles, columns], float(factors.scale),
        factors.activation == "sigmoid", factors.heads, False,
    )  # fmt: skip
    found = torch.zeros(5, *scores.shape[:3])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        anchor = (tiles[0] + i) * r
        low = sinks + (0 if docs is None else int(docs[b, anchor]))
        row = list(scores[b, h, i, low : max(0, anchor - window + 1)])
        values = describe(row, NAMES)
        found[:, b, h, i] = torch.stack([values[name] for name in NAMES])
    return found.to(DEVICE)


KINDS = ("normal", "equal", "nearly equal", "giant", "giant first", "signed", "negative")
KINDS = (*KINDS, "nothing at first", "zero")


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("kind", KINDS)
@documents
def test_the_definition(kind, activation, documents):
    factors, docs = kept(kind, activation=activation), docs_of(KEYS, documents)
    tiles, sizes = (0, KEYS // 5), [5, 7, 2]
    count, mean, variance, largest, entropy = statistics_of(factors, docs, tiles, sizes)
    want = dict(zip(NAMES, expected(factors, docs, tiles, sizes)))
    assert torch.equal(count, want["count"]) and torch.equal(largest, want["max"])
    size = float(want["mean"].abs().max())
    torch.testing.assert_close(mean, want["mean"], rtol=3e-7, atol=3e-7 * size)
    torch.testing.assert_close(variance, want["variance"], rtol=1e-6, atol=1e-13)
    assert (entropy <= 0).all()
    # Where no score was above 0 at first, the others are compared with almost nothing.
    few = activation == "relu" or kind in ("signed", "negative", "nothing at first")
    atol = 5e-5 if few and "equal" not in kind else 1e-13
    torch.testing.assert_close(entropy, want["entropy"], rtol=5e-6, atol=atol)


def test_without_entropy_and_of_heads_apart():
    factors, docs = kept("normal", heads=2, index_heads=6), docs_of(KEYS, True)
    tiles = (150, 190)
    got = statistics_of(factors, docs, tiles, entropy=False)
    assert got.shape == (4, 2, 2, 40)
    assert torch.equal(got, statistics_of(factors, docs, tiles)[:4])
    torch.testing.assert_close(got, expected(factors, docs, tiles)[:4], rtol=1e-5, atol=1e-6)


@documents
def test_a_row_is_the_same_in_any_call(documents):
    """To the last bit, however many rows and keys there are beside it."""
    # Products of whole numbers: the interpreter's others depend on the row's place.
    factors = replace(low(whole_numbers(KEYS), torch.float16), activation="sigmoid", scale=0.1)
    docs = docs_of(KEYS, documents)
    whole = statistics_of(factors, docs, (0, KEYS))
    for start, stop in [(0, 140), (37, 300), (129, 130), (299, 300)]:
        piece = replace(factors.rows(torch.arange(start, stop, device=DEVICE)), q_start=start)
        piece = replace(piece, k_BSI=factors.k_BSI[:, :stop].contiguous())
        cut = None if docs is None else docs[:, :stop].contiguous()
        got = statistics_of(piece, cut, (start, stop))
        assert torch.equal(got, whole[..., start:stop]), (start, stop)
    alone = replace(factors, **{n: getattr(factors, n)[1:] for n in ("q_BTJI", "weight_BTJ")})
    alone = replace(alone, k_BSI=factors.k_BSI[1:])
    got = statistics_of(alone, None if docs is None else docs[1:], (0, KEYS))
    assert torch.equal(got, whole[:, 1:])


def test_a_view_of_a_longer_cache():
    factors = kept("normal")
    longer = torch.full((2, 2 * KEYS, 8), torch.nan, dtype=torch.float16, device=DEVICE)
    longer[:, :KEYS] = factors.k_BSI
    got = statistics_of(replace(factors, k_BSI=longer[:, :KEYS]), None, (250, 300))
    assert torch.equal(got, statistics_of(factors, None, (250, 300)))


def test_no_result_depends_on_uninitialised_memory(monkeypatch):
    factors, docs = kept("normal"), docs_of(KEYS, True)
    clean = statistics_of(factors, docs, (0, KEYS))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert torch.equal(statistics_of(factors, docs, (0, KEYS)), clean)


def test_nan_shows():
    factors = kept("normal")
    factors.k_BSI[1, 200] = torch.nan
    mean = statistics_of(factors, None, (0, KEYS))[1]
    assert torch.equal(mean.isnan().nonzero()[:, 2], torch.arange(207, KEYS, device=DEVICE))


@pytest.mark.parametrize("entropy", [False, True])
def test_operator_is_registered_truthfully(entropy):
    from gsa_kernels.select import ops

    factors, docs = kept("normal"), docs_of(KEYS, True)
    args = (factors.q_BTJI, factors.k_BSI, factors.weight_BTJ, factors.bias_J, docs)
    args = (*args, [1, 7, 2, 0], [293, 298, 291], 0.3, True, 1, entropy)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.key_statistics_operator, args, test_utils=checks)
