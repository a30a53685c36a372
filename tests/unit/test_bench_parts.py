"""What the benchmarks count and time, against brute force over the whole mask."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import granularity_id, make_factors, make_selection

from gsa_kernels.bench import dense
from gsa_kernels.bench.attention import OF_UNIONS, layer_record
from gsa_kernels.bench.case import Shape, make_case
from gsa_kernels.bench.indexer import hierarchical_records, masses, topk_blocks
from gsa_kernels.bench.timing import graph_milliseconds, turns_milliseconds
from gsa_kernels.bench.verify import recall, wrong
from gsa_kernels.bench.work import UNITED, Rates, shares, work
from gsa_kernels.index_score import pooled as index_pooled
from gsa_kernels.index_score.pooled import running_pool
from gsa_kernels.select.api import select
from gsa_kernels.selection import SelectionSpec as Spec
from gsa_plugins.bench.beside import query_lists

SHAPE = Shape(
    "tile",
    Spec(16, 16, window=20, sinks=5),
    161,
    heads=4,
    kv_heads=2,
    head_dim=16,
    k=80,
    device=torch.device("cpu"),
    dtype=torch.float32,
    batch=2,
    index_heads=2,
    index_dim=8,
)
ROOT = Path(__file__).parents[2]


def blocks_of(selection):
    """Per batch, selection head and tile: the set of blocks it attends."""
    blocks, valid = selection.slots(slice(None))
    return [
        [[set(b[v].tolist()) for b, v in zip(*tiles)] for tiles in zip(*heads)]
        for heads in zip(blocks, valid)
    ]


@pytest.mark.parametrize("granularity", [(16, 16), (4, 32), (16, 1), (1, 1)], ids=granularity_id)
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "kv"])
def test_work_is_counted_of_the_selection(granularity, heads):
    c, r = granularity
    selection = make_selection(100, granularity, heads=heads)
    found = work(selection, heads=4, kv_heads=2)
    mask = selection.to_dense_mask()
    assert found.pairs == int(mask.sum()) * 4 // heads
    keys = 0
    for sample in blocks_of(selection):
        for tiles in sample:
            if r > 1:
                keys += sum(map(len, tiles)) * c
                continue
            for low in range(0, len(tiles), UNITED):
                keys += len(set().union(*tiles[low : low + UNITED])) * c
    group = r if r > 1 else UNITED
    assert found.rows == keys * 2 / heads and found.computed == keys * group * 4 / heads
    assert found.inflation >= 1


def test_shares_of_the_bound():
    case = make_case(SHAPE)
    found = work(case.choose(), 4, 2)
    flops = 2 * 2 * 16 * found.pairs
    moved = 4 * 2 * (case.q.numel() + case.k.numel())
    rates = Rates(flops=flops / 2e-3, bytes_s=moved / 1e-3)
    got = shares(case.q, case.k, found, False, 4.0, rates)
    assert got["flops"] == flops and got["bytes"] == moved
    assert got["flops_share"] == pytest.approx(0.5) and got["bytes_share"] == pytest.approx(0.25)
    assert got["roofline"] == pytest.approx(0.5)
    both = shares(case.q, case.k, found, True, 4.0, rates)
    assert both["flops"] == 3.5 * flops and both["bytes"] == 3 * moved
    assert both["bytes_gathered"] > 2 * got["bytes_gathered"]


@pytest.mark.parametrize("granularity", [(16, 16), (8, 32), (16, 1)], ids=granularity_id)
def test_lists_of_each_query_hold_its_keys(granularity):
    selection = make_selection(100, granularity)
    indices, counts = query_lists(selection, kv_heads=2)
    c = granularity[0]
    mask = selection.to_dense_mask()
    for b, t in ((0, 0), (0, 37), (1, 99)):
        for head in range(2):
            chosen = indices[b, t, head, : counts[b, t, head]].tolist()
            keys = {k for block in chosen for k in range(block * c, block * c + c) if k <= t}
            assert len(chosen) == len(set(chosen)) and min(chosen) >= 0
            assert keys == set(mask[b, 0, t].nonzero().flatten().tolist())


def test_decoding_is_the_last_row_of_the_whole_path():
    case = make_case(SHAPE)  # 161 tokens: the last begins a tile
    torch.testing.assert_close(case.query(160).forward(), case.forward()[:, -1:])
    step = make_case(SHAPE, queries=1)
    assert step.q.shape[1] == 1 and step.factors.q_start == 160 and step.value_gate is None
    assert step.forward().shape == (2, 1, 4, 16)


@pytest.mark.parametrize("queries", [1, 161])
def test_the_dense_opponents_are_dense_attention(queries, monkeypatch):
    seen = []

    def clock(calls, device, budget_s):
        for call in calls:
            call()
        return 1.0

    monkeypatch.setattr(dense, "_run", lambda attend, qkv, dout: seen.append(attend(*qkv)))
    case = make_case(SHAPE, queries=queries)

    def other(q, k, v):
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
        mask = torch.ones(queries, 161, dtype=torch.bool).tril(161 - queries)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)

    tensors, names = [(case.q, case.k, case.v)], ["math", "flash", "cudnn", "other"]
    found, refused = dense.dense_times(tensors, names, False, {"other": other}, clock=clock)
    assert set(found) == {"math", "flash", "other"} and "cudnn" in refused
    assert len(seen) == (5 if queries == 1 else 3)
    for out in seen[:-1]:
        torch.testing.assert_close(out.reshape(2, 4, queries, 16).transpose(1, 2), seen[-1])


@pytest.mark.parametrize(
    ("first", "change", "unions"),
    [(60, {}, False), (61, {}, True), (60, {"impl": "eager"}, True),
     (60, {"spec": Spec(8, 1, window=20)}, True),
     (0, {"spec": Spec(64, 1, window=20), "head_dim": 256, "seq_len": 90, "k": 160}, True)],
    ids=["gathered", "short", "eager", "small_blocks", "large_blocks"],
)  # fmt: skip
@pytest.mark.kernel
def test_a_record_tells_of_unions_where_they_are(first, change, unions, monkeypatch):
    from gsa_kernels.sparse_attention import gather_launch, triton_config

    made = []
    split = gather_launch.split
    monkeypatch.setattr(gather_launch, "split", lambda *args: made.append(1) or split(*args))
    monkeypatch.setattr(triton_config, "GATHER_FROM", first)
    shape = replace(
        SHAPE, spec=Spec(16, 1, window=20), mode="block", seq_len=60, batch=1, impl="triton",
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )  # fmt: skip
    shape = replace(shape, **change)
    row = layer_record(shape, make_case(shape), "forward", ["math"], Rates(1e9, 1e9), None, 0.0)
    assert bool(made) is not unions
    assert {name in row for name in OF_UNIONS} == {unions} and row["flops"] > 0


@pytest.mark.kernel
def test_times_of_graphs():
    if not torch.cuda.is_available():
        assert graph_milliseconds([list], torch.device("cpu")) == 0.0
        return
    x, device = torch.randn(4096, 4096, device="cuda"), torch.device("cuda")
    calls = [lambda: x @ x] * 4

    def no_graph_holds_it():
        raise RuntimeError

    each = turns_milliseconds(calls, device, 0.1)
    assert 0.5 * each < graph_milliseconds(calls, device, 0.1) < 1.5 * each
    assert graph_milliseconds([no_graph_holds_it], device, 0.1) == 0.0


@pytest.mark.parametrize("inputs", ["random", "smooth"])
def test_topk_pipeline_chooses_the_same_blocks(inputs):
    case = make_case(replace(SHAPE, inputs=inputs))
    assert recall(case.choose().blocks_BHQN, topk_blocks(case)) > 0.95


@pytest.mark.parametrize("queries", [0, 80])
def test_masses_are_those_of_dense_attention(queries):
    shape = replace(SHAPE, seq_len=160, spec=Spec(16, 1, window=20, sinks=5), mode="block")
    case = make_case(shape, queries=queries)
    chosen = case.choose()
    first = 160 - case.q.shape[1]
    k = case.k.repeat_interleave(2, 2)
    logits = torch.einsum("bthe,bshe->bhts", case.q, k) / 4
    t, s = torch.arange(first, 160)[:, None], torch.arange(160)
    p = logits.masked_fill(s > t, -torch.inf).softmax(-1).mean(1)  # [B, T, S]
    candidate = (s >= 16) & (s < (t - 19).clamp_min(0) // 16 * 16)
    sums = dict.fromkeys(("possible", "mass", "mass_best", "mass_chance"), 0.0)
    for b in range(2):
        for i in range(p.shape[1]):
            mass = (p[b, i] * candidate[i]).view(10, 16).sum(-1)
            n, held = int(chosen.counts_BHQ[b, 0, i]), int(candidate[i].sum()) // 16
            if not 0 < n < held:
                continue
            sums["possible"] += mass.sum()
            sums["mass"] += mass[chosen.blocks_BHQN[b, 0, i, :n].long()].sum()
            sums["mass_best"] += mass.topk(n).values.sum()
            sums["mass_chance"] += mass.sum() * n / held
    possible = sums.pop("possible")
    found = masses(case, chosen, 160)
    assert found == pytest.approx({k: float(v / possible) for k, v in sums.items()}, rel=1e-4)
    assert masses(replace(case, budget=400), replace(case, budget=400).choose(), 160) == {}


@pytest.mark.parametrize("pooling", ["mean", "bound"])
def test_cost_of_coarse_to_fine_counts_scores(pooling, monkeypatch):
    case = make_case(replace(SHAPE, seq_len=160, spec=Spec(16, 1, window=20, sinks=5)), queries=96)
    pooled = []

    def watched(k, *rest):
        pooled.append(k.shape[1])
        return running_pool(k, *rest)

    monkeypatch.setattr(index_pooled, "running_pool", watched)
    (row,) = hierarchical_records(SHAPE, case, [pooling], [(32, 2)], 0)
    assert pooled.count(160) == 1 and len(pooled) > 2  # once, then a block per query
    coarse = fine = every = kept = 0
    for t in range(64, 160):
        blocks = range(1, max(0, t - 19) // 16)  # the sinks hold block 0
        pools = {j // 2 for j in blocks}
        coarse += len(pools) * (2 if pooling == "bound" else 1)
        fine += min(2 * len(pools), 4, len(blocks))
        every += len(blocks)
        kept += len(pools) <= 2
    assert row["cost"] == pytest.approx((coarse + fine) / every)
    assert row["nothing_left_out"] == pytest.approx(kept / 96)
    assert row["mass"] <= row["mass_best"] and row["mass_exact"] <= row["mass_best"]


def test_bf16_index_keys_are_rounded():
    wide, rounded = (make_case(replace(SHAPE, key_dtype=name)) for name in ("auto", "bf16"))
    assert rounded.factors.k_BSI.dtype == torch.bfloat16
    torch.testing.assert_close(
        rounded.factors.k_BSI.float(), wide.factors.k_BSI, rtol=1 / 256, atol=0
    )
    assert 0.9 < recall(rounded.choose().blocks_BHQN, wide.choose().blocks_BHQN) <= 1


def test_copies_are_apart():
    case = replace(make_case(SHAPE), budget=70)
    other = case.each(torch.clone)
    assert other.budget == 70 and case.copies() == [case]  # a CPU needs none
    for a, b in zip(case.leaves, other.leaves, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert all(x.requires_grad for x in case.learn().leaves)


def test_recall():
    wanted = torch.tensor([[[[0, 3, 5], [1, -1, -1]]]])
    got = torch.tensor([[[[0, 4, 5], [-1, -1, -1]]]])
    assert recall(got, wanted) == 0.5 and recall(wanted, wanted) == 1
    assert recall(got, torch.full_like(wanted, -1)) == 1


@pytest.mark.parametrize("mode", ["tile", "block", "token"])
def test_the_check_accepts_what_is_right(mode):
    spec = {
        "tile": SHAPE.spec,
        "block": Spec(16, 1, 20, 5),
        "token": Spec(1, 1, 8),
    }
    case = make_case(replace(SHAPE, mode=mode, spec=spec[mode], seq_len=100, batch=1))
    found, problems = wrong(case)
    assert not problems and found["selection"] == 1


def test_the_check_finds_a_wrong_sum_and_a_wrong_choice(monkeypatch):
    from gsa_kernels.bench import case as timed
    from gsa_kernels.sparse_attention import eager

    case, right = make_case(SHAPE), eager.attend
    with monkeypatch.context() as patch:

        def attend(q, k, v, *rest):
            return right(q, k, v * 1.001, *rest)

        patch.setattr(eager, "attend", attend)
        assert any("out is wrong" in text for text in wrong(case)[1])

    def worst(factors, *rest, **options):
        return select(replace(factors, k_BSI=-factors.k_BSI), *rest, **options)

    monkeypatch.setattr(timed, "select", worst)
    assert any("selection agrees" in text for text in wrong(case)[1])


def test_captured_tensors_are_cropped_or_refused():
    f = make_factors(40, batch=1)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 40, 4, 16, generator=g), torch.randn(1, 40, 2, 16, generator=g)
    captured = {
        "q_BTHE": q, "k_BSKE": k, "v_BSKE": k + 1, "value_gate_BTKE": None,
        "output_gate_BTHE": torch.rand(1, 40, 4, 1, generator=g), "index_q_BTJI": f.q_BTJI,
        "index_k_BSI": f.k_BSI, "index_weight_BTJ": f.weight_BTJ, "index_bias_J": f.bias_J,
        "scale": f.scale, "activation": "sigmoid", "block_score": "mean",
    }  # fmt: skip
    shape = replace(SHAPE, inputs="checkpoint", seq_len=33)  # the last begins a tile
    case = make_case(shape, captured)
    assert torch.equal(case.q, q[:, :33].expand(2, -1, -1, -1)) and case.value_gate is None
    assert case.forward().shape == (2, 33, 4, 16)
    case.learn().train(torch.randn(2, 33, 4, 16))
    captured["value_gate_BTKE"] = torch.rand(1, 40, 2, 16, generator=g)
    case, step = (make_case(shape, captured, queries) for queries in (0, 1))
    torch.testing.assert_close(step.forward(), case.query(32).forward())
    f2 = {n: torch.cat([v, v + 1]) for n, v in captured.items() if n.endswith(("E", "I", "J"))
          if isinstance(v, torch.Tensor) and n != "index_bias_J"}  # fmt: skip
    several = make_case(replace(shape, batch=3), captured | f2)  # sequences take turns
    assert torch.equal(several.q[1], q[0, :33] + 1) and torch.equal(several.q[2], q[0, :33])
    with pytest.raises(ValueError, match="holds 40 tokens, not 41"):
        make_case(replace(shape, seq_len=41), captured)


def speed_report():
    path = ROOT / "experiments" / "speed" / "report.py"
    spec = importlib.util.spec_from_file_location("speed_report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return path, module


def test_layers_are_reported_as_their_mean():
    _, module = speed_report()
    case = {"mode": "token", "inputs": "checkpoint", "pass": "hierarchical", "pool": 16}
    rows = [
        {**case, "layer": i, "recall": r, "mass": 0.1 * r, "mass_exact": 0.1, "mass_chance": 0.02}
        for i, r in enumerate((0.5, 0.9))
    ]
    drawn = {**case, "inputs": "random", "recall": 0.3}
    mean, other = module.over_layers([*rows, drawn])
    assert mean["recall"] == pytest.approx(0.7) and mean["recall_worst"] == 0.5
    assert mean["layer"] == "0, 1" and mean["mass"] == pytest.approx(0.07)
    assert mean["gain_kept"] == pytest.approx(0.05 / 0.08)
    assert other == drawn


def test_coarse_to_fine_is_drawn(tmp_path):
    plt = pytest.importorskip("matplotlib")
    plt.use("Agg")
    _, module = speed_report()
    case = make_case(replace(SHAPE, seq_len=160), queries=80)
    rows = hierarchical_records(SHAPE, case, ["mean", "max", "bound"], [(32, 1), (32, 2)], 0)
    module.plot_coarse({"device": "CPU", "records": module.over_layers(rows)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_reports_are_drawn_together(tmp_path):
    plt = pytest.importorskip("matplotlib")
    plt.use("Agg")
    path, module = speed_report()
    old = module.merged([path.with_name("h100.json"), path.with_name("h100_heads.json")])
    row = old["records"][0]
    new = {**row, "score_ms": 1.0, "select_ms": 0.5, "inputs": "checkpoint"}
    step = {**new, "pass": "decode", "batch": 8}
    mixed = old | {"records": [*old["records"], new, step]}
    assert "| 1.00 | 0.50 |" in module.table(mixed, module.COLUMNS)
    module.plot(mixed, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_the_sanitizer_has_tests_to_run():
    path = ROOT / "experiments" / "speed" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, chosen in module.TESTS.items():
        text = (ROOT / "tests" / "unit" / name).read_text()
        assert all(word in text for word in re.findall(r"[a-z]+_[a-z_]+", chosen))
