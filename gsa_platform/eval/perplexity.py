"""Perplexity on the validation documents, overall and by position in the context."""

from __future__ import annotations

import math
from typing import Any

import torch

from gsa_platform.errors import UserError
from gsa_platform.eval.task import EvalRun, EvalTask
from gsa_platform.metrics.nll import PositionNLL, TokenNLL
from gsa_platform.model.cross_entropy import chunked_nll


class Perplexity(EvalTask):
    """{tokens, loss, perplexity, bits_per_byte, by_position} of the validation split."""

    def evaluate(self, run: EvalRun) -> dict[str, Any]:
        cfg, data, device, model = run.cfg, run.data, run.device, run.module.model
        total, positions = TokenNLL(), PositionNLL(cfg.context)
        half = device.type == "cuda" and "bf16" in str(cfg.trainer.precision)
        for batch in data.val_dataloader():
            tokens, targets = batch["tokens_BT"].to(device), batch["targets_BT"].to(device)
            docs = None if cfg.data.cross_document else batch["doc_start_BT"].to(device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                hidden = model(tokens, docs).hidden_BTD.flatten(0, 1)
                nll = chunked_nll(
                    hidden, model.head_weight_VD, targets.flatten(), cfg.train.ce_chunk
                )
            nll, scored = nll.view_as(targets).cpu(), (targets != -100).cpu()
            total.update(nll[scored].double().sum(), scored.sum())
            positions.update(nll, torch.arange(tokens.shape[1]), scored)
        if not int(total.n_tokens):
            raise UserError("there is no validation text: set data.val_fraction above 0")
        loss = float(total.compute())
        by_position = [
            {"from": int(low), "to": int(high), "loss": float(value)}
            for (low, high), value in zip(
                positions.buckets, positions.compute().tolist(), strict=True
            )
            if math.isfinite(value)
        ]
        return {
            "tokens": int(total.n_tokens),
            "loss": loss,
            "perplexity": float(total.perplexity()),
            "bits_per_byte": float(total.bits_per_byte(data.bytes_per_token)),
            "by_position": by_position,
        }

    def render(self, values: dict[str, Any]) -> str:
        """The result as a short table."""
        lines = [
            f"validation   {values['tokens']:,} tokens",
            f"loss         {values['loss']:.4f} nats/token, "
            f"perplexity {values['perplexity']:,.3f}, {values['bits_per_byte']:.4f} bits/byte",
            "",
            "positions in the context        loss   perplexity",
        ]
        for row in values["by_position"]:
            span = f"{row['from']:,} to {row['to'] - 1:,}"
            lines.append(f"{span:<26}{row['loss']:>10.4f}{math.exp(row['loss']):>13,.2f}")
        return "\n".join(lines)
