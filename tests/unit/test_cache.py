"""The cache of a layer: a token costs its own rows, and copies of a cache part ways safely."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from gsa_platform.model.attention_layer import LayerCache


def pieces(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 3, 4, generator=g) for n in sizes]


def test_it_holds_what_was_appended_whatever_the_pieces():
    cache, parts = LayerCache(), pieces(5, 1, 1, 90, 1, 200, 1)
    for i, part in enumerate(parts):
        whole = cache.extend("k_BSKE", part)
        assert whole is cache.k_BSKE and torch.equal(whole, torch.cat(parts[: i + 1], 1))


def test_tokens_are_written_without_copying_those_before():
    cache, (prompt, *tokens) = LayerCache(), pieces(100, *[1] * 200)
    cache.extend("k_BSKE", prompt)
    places = {cache.extend("k_BSKE", token).data_ptr() for token in tokens}
    assert len(places) <= 3  # a new buffer whenever the last one is half as long again
    earlier = cache.k_BSKE
    kept = earlier.clone()
    cache.extend("k_BSKE", tokens[0])
    assert torch.equal(earlier, kept)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_of_a_cache_do_not_write_over_each_other(duplicate):
    one, (prompt, a, b, c) = LayerCache(), pieces(4, 1, 1, 1)
    one.extend("k_BSKE", prompt)
    one.extend("k_BSKE", a)
    two = duplicate(one)
    for cache, parts in ((one, (b, c)), (two, (c, b))):
        cache.extend("k_BSKE", parts[0])
    for cache, parts in ((two, (c, b)), (one, (b, c))):
        cache.extend("k_BSKE", parts[1])
    assert torch.equal(one.k_BSKE, torch.cat([prompt, a, b, c], 1))
    assert torch.equal(two.k_BSKE, torch.cat([prompt, a, c, b], 1))


def test_gradients_pass_through_a_cache():
    cache, parts = LayerCache(), [x.requires_grad_() for x in pieces(3, 1, 1)]
    for part in parts:
        cache.extend("k_BSKE", part)
    cache.k_BSKE.square().sum().backward()
    assert all(torch.equal(part.grad, 2 * part) for part in parts)


def test_a_cache_may_leave_inference_mode():
    cache, parts = LayerCache(), pieces(3, 1, 1, 1)
    with torch.inference_mode():
        for part in parts[:3]:
            cache.extend("k_BSKE", part)
    cache.extend("k_BSKE", parts[3])
    assert torch.equal(cache.k_BSKE, torch.cat(parts, 1))
