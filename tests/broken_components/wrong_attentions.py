"""Attentions that are wrong on purpose, each in one way; test_broken_components.py says which
check of the contract kit must catch each."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from gsa_platform import Capabilities, Component, hookimpl
from gsa_platform.contracts import Attention, AttentionOutput

FLOAT = ("float32", "bfloat16")
# name -> (class, what it says it can do)
WRONG = {
    "reads_the_future": ("ReadsTheFuture", Capabilities()),
    "mixes_the_batch": ("MixesTheBatch", Capabilities()),
    "ignores_documents": ("IgnoresDocuments", Capabilities()),
    "forgets_the_cache": ("ForgetsTheCache", Capabilities()),
    "drops_gradients": ("DropsGradients", Capabilities()),
    "doubles_gradients": ("DoublesGradients", Capabilities()),
    "swaps_heads": ("SwapsHeads", Capabilities()),
    "promises_bfloat16": ("PromisesBfloat16", Capabilities(dtypes=FLOAT)),
    "hides_from_the_cpu": ("Plain", Capabilities(devices=("cuda",))),
    "needs_nothing_it_names": ("Plain", Capabilities(needs=("no-such-package",))),
    "promises_determinism": ("PromisesDeterminism", Capabilities()),
    "cannot_be_pickled": ("CannotBePickled", Capabilities()),
    "keeps_state_to_itself": ("KeepsStateToItself", Capabilities()),
    "reads_unwritten_memory": ("ReadsUnwrittenMemory", Capabilities()),
    "differs_when_compiled": ("DiffersWhenCompiled", Capabilities()),
    "ignores_the_selection": ("Plain", Capabilities(modes=("tile",))),
    "promises_mass": ("PromisesMass", Capabilities(modes=("tile",), mass=True)),
    "gates_twice": ("GatesTwice", Capabilities(fused_gate=True)),
    "drops_the_bias": ("DropsTheBias", Capabilities(modes=("tile",), bias=True)),
}


@hookimpl
def gsa_register_attention():
    records = []
    for name, (cls, can) in WRONG.items():
        fields = [("name", str, name)]
        fields += [("key_block", int, 8), ("query_tile", int, 16)] if can.modes else []
        config = dataclasses.make_dataclass(f"{cls}Config", fields)
        records.append(Component(name, f"wrong_attentions:{cls}", config, capabilities=can))
    return records


class Plain(Attention):
    """Right where nothing is selected; the classes below change one thing of it."""

    def __init__(self, config, dims):
        super().__init__()

    def forward(self, q, k, v, selection, seq, bias=None, need_mass=False):
        return AttentionOutput(self.attend(q, k, v, seq))

    def attend(self, q, k, v, seq):
        query = torch.arange(q.shape[1])[:, None] + seq.q_start
        key = torch.arange(k.shape[1])
        see = (key <= query)[None, None]
        if seq.doc_start_BS is not None:
            starts = seq.doc_start_BS[:, seq.q_start : seq.q_start + q.shape[1]]
            see = see & (key >= starts[:, None, :, None])
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=see, enable_gqa=True)
        return out.transpose(1, 2)

    def selection_spec(self, sparsity):
        from gsa_kernels.selection import SelectionSpec

        return SelectionSpec(8, 16, sparsity.window, sparsity.sinks)


class PromisesMass(Plain):
    """Right over a selection, without a mass."""

    def forward(self, q, k, v, selection, seq, bias=None, need_mass=False):
        see = selection.to_dense_mask().repeat_interleave(q.shape[2], 1)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=see, enable_gqa=True)
        return AttentionOutput(out.transpose(1, 2))


class DropsTheBias(PromisesMass):
    """The same: it never looks at the bias."""


class GatesTwice(Plain):
    def forward(self, q, k, v, selection, seq, bias=None, need_mass=False, gate=None):
        out = self.attend(q, k, v, seq)
        return AttentionOutput(out if gate is None else out * gate * gate)


class ReadsTheFuture(Plain):
    def attend(self, q, k, v, seq):
        out = super().attend(q, k, v, seq)
        ahead = v.roll(-1, 1).repeat_interleave(q.shape[2] // v.shape[2], 2)[:, -q.shape[1] :]
        ahead[:, -1] = 0
        return out + 1e-3 * ahead


class MixesTheBatch(Plain):
    def attend(self, q, k, v, seq):
        out = super().attend(q, k, v, seq)
        return out + 1e-3 * out.mean(0, keepdim=True)


class IgnoresDocuments(Plain):
    def attend(self, q, k, v, seq):
        return super().attend(q, k, v, dataclasses.replace(seq, doc_start_BS=None))


class ForgetsTheCache(Plain):
    def attend(self, q, k, v, seq):
        new, docs = q.shape[1], seq.doc_start_BS
        if docs is not None:
            docs = (docs[:, -new:] - seq.q_start).clamp_min(0)
        seq = dataclasses.replace(seq, q_start=0, doc_start_BS=docs)
        return super().attend(q, k[:, -new:], v[:, -new:], seq)


class DropsGradients(Plain):
    def attend(self, q, k, v, seq):
        return super().attend(q, k, v.detach(), seq)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class DoublesGradients(Plain):
    def attend(self, q, k, v, seq):
        return super().attend(Doubled.apply(q), k, v, seq)


class SwapsHeads(Plain):
    def attend(self, q, k, v, seq):
        group = q.shape[2] // k.shape[2]
        return super().attend(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), seq)


class PromisesBfloat16(Plain):
    def attend(self, q, k, v, seq):
        if q.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel for this dtype")
        return super().attend(q, k, v, seq)


class PromisesDeterminism(Plain):
    def attend(self, q, k, v, seq):
        out = super().attend(q, k, v, seq)
        return out * (1 + 1e-4 * torch.rand(())) if self.training else out


class CannotBePickled(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.scale = lambda out: out

    def attend(self, q, k, v, seq):
        return self.scale(super().attend(q, k, v, seq))


class KeepsStateToItself(Plain):
    def __init__(self, config, dims):
        super().__init__(config, dims)
        self.shift = torch.randn(())  # neither a parameter nor a buffer

    def attend(self, q, k, v, seq):
        return super().attend(q, k, v, seq) + self.shift.to(v)


class ReadsUnwrittenMemory(Plain):
    def attend(self, q, k, v, seq):
        # 64 MiB: malloc takes so much only as fresh pages, which hold zeros. A small buffer may
        # hold NaN that an earlier check left, and then checks fail that are not meant to.
        scratch = torch.empty(1 << 24, dtype=torch.float32, device=q.device)[-1].to(q.dtype)
        return super().attend(q, k, v, seq) + scratch


class DiffersWhenCompiled(Plain):
    def attend(self, q, k, v, seq):
        out = super().attend(q, k, v, seq)
        return 1.01 * out if torch.compiler.is_compiling() else out
