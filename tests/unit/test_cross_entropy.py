import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gsa_platform.model.cross_entropy import chunked_cross_entropy, chunked_nll


def inputs(n=13, d=6, v=11, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    targets[::4] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_torch_cross_entropy(chunk):
    hidden, weight, targets = inputs()
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 9, (hidden, weight))
    nll_sum, n_tokens = chunked_cross_entropy(hidden, weight, targets, chunk)
    assert int(n_tokens) == 9
    torch.testing.assert_close(nll_sum, expected)
    got = torch.autograd.grad(nll_sum / n_tokens, (hidden, weight))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    hidden, weight, targets = inputs(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, 5)[0], (hidden, weight)
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_input_only(frozen):
    hidden, weight, targets = inputs()
    full = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, targets, 4)[0], (hidden, weight)
    )
    kept = weight if frozen == "hidden" else hidden
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_cross_entropy(hidden, weight, targets, 4)[0].backward()
    torch.testing.assert_close(kept.grad, full[1 if frozen == "hidden" else 0])


def test_all_targets_ignored():
    hidden, weight, targets = inputs()
    nll_sum, n_tokens = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), 4)
    assert nll_sum.item() == 0.0
    assert int(n_tokens) == 0
    nll_sum.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_no_tokens_at_all():
    nll_sum, n_tokens = chunked_cross_entropy(
        torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64), 8
    )
    assert float(nll_sum) == 0.0
    assert int(n_tokens) == 0


def test_huge_logits_stay_finite():
    hidden, weight, targets = inputs()
    logits_scale = 1e4
    nll_sum, _ = chunked_cross_entropy(hidden * logits_scale, weight, targets, 4)
    expected = F.cross_entropy((hidden * logits_scale) @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(nll_sum, expected)


def test_tied_weight_adds_both_gradients():
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, 11, (9,)), torch.randint(0, 11, (9,))
    embed = nn.Embedding(11, 6)
    chunked_cross_entropy(embed(tokens), embed.weight, targets, 4)[0].backward()
    got, embed.weight.grad = embed.weight.grad, None
    F.cross_entropy(embed(tokens) @ embed.weight.t(), targets, reduction="sum").backward()
    torch.testing.assert_close(got, embed.weight.grad)


def test_backward_twice_through_a_retained_graph():
    hidden, weight, targets = inputs()
    loss = chunked_cross_entropy(hidden, weight, targets, 4)[0] / 3
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], first)


def errors_in_low_precision(run, hidden, weight, targets):
    """Relative errors of loss and gradients against float64."""
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="mean")
    wanted = torch.autograd.grad(exact, (hidden, weight))
    loss = run(hidden, weight)
    got = torch.autograd.grad(loss, (hidden, weight))
    pairs = [(loss, exact), *zip(got, wanted, strict=True)]
    return loss, got, [((a - b).norm() / b.norm()).item() for a, b in pairs]


def test_autocast_is_as_accurate_as_torch_under_autocast():
    torch.manual_seed(0)
    hidden = torch.randn(256, 32, requires_grad=True)
    weight = torch.randn(97, 32, requires_grad=True)
    targets = torch.randint(0, 97, (256,))

    def chunked(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            nll_sum, n_tokens = chunked_cross_entropy(h, w, targets, 100)
        return nll_sum / n_tokens

    def plain(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(h @ w.t(), targets)

    loss, got, ours = errors_in_low_precision(chunked, hidden, weight, targets)
    _, _, theirs = errors_in_low_precision(plain, hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in got] == [torch.float32, torch.float32]
    for own, other in zip(ours, theirs, strict=True):
        assert own <= 2 * other + 1e-4


def test_bf16_parameters_and_an_odd_token_count():
    torch.manual_seed(0)
    hidden = torch.randn(771, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(31, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 31, (771,))

    def run(h, w):
        nll_sum, n_tokens = chunked_cross_entropy(h, w, targets, 100)
        return nll_sum / n_tokens

    loss, got, errors = errors_in_low_precision(run, hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16]
    assert errors[0] < 1e-3
    assert max(errors[1:]) < 1e-2
    # The scale 1/771 is not a bf16 number: rounding it first would shift every gradient.
    exact = F.cross_entropy(hidden.double() @ weight.double().t(), targets)
    wanted = torch.autograd.grad(exact, hidden)[0].double()
    slope = float((got[0].double() * wanted).sum() / (wanted * wanted).sum())
    assert slope == pytest.approx(1.0, abs=7e-4)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_never_builds_logits_beyond_a_chunk():
    n, d, v, chunk = 64, 2, 50, 8
    hidden, weight, targets = inputs(n, d, v)
    with LargestTensor() as seen:
        chunked_cross_entropy(hidden, weight, targets, chunk)[0].backward()
    assert seen.numel <= chunk * v


def test_nll_per_token():
    hidden, weight, targets = inputs()
    nll = chunked_nll(hidden, weight, targets, 4)
    torch.testing.assert_close(
        nll, F.cross_entropy(hidden @ weight.t(), targets, reduction="none").detach()
    )
    assert not nll.requires_grad
    assert float(nll[0]) == 0.0
    with torch.no_grad():
        total = chunked_cross_entropy(hidden, weight, targets, 4)[0]
    torch.testing.assert_close(nll.sum(), total)
    assert not total.requires_grad


def test_chunk_must_be_positive():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match="chunk"):
        chunked_cross_entropy(hidden, weight, targets, 0)
