import math
import re

import pytest

from gsa_platform.report import render_summary as render
from gsa_platform.report.attention import attention_rows


def render_summary(result, *width):
    """With the section that the attention plugin adds, as a run has it."""
    rows = attention_rows(result)
    return render({**result, "sections": [("Attention", rows)] if rows else []}, *width)


RESULT = {
    "name": "gsa_128k",
    "model": "decoder, 8 layers, 17.3 M parameters",
    "data": "stdlib, bytes, 12.3 MB",
    "steps": 200,
    "tokens": 26214400,
    "wall_s": 3725.3,
    "loss_first": 5.6,
    "loss": 2.31,
    "val_loss": 2.4,
    "perplexity": 11.0232,
    "bits_per_byte": 3.46246,
    "tokens_per_s": 7037.2,
    "mfu": 0.4123,
    "peak_memory_gb": 41.2,
    "keys_mean": 1990.3,
    "keys_fraction": 0.0304,
    "budget": 2048,
    "first_token_attention": [0.1, 0.02],
    "first_token_uniform": 0.0064,
    "gate_value_mean": 0.45,
    "gate_output_mean": 0.2,
    "recall_first": 0.4,
    "recall_last": 0.8,
    "index_saturated_max": 0.6,
    "dense_attention_s": 0.127,
    "sparse_attention_s": 0.0081,
    "dense_step_s": 3.2,
    "step_s": 1.1,
    "dense_note": "dense: SDPA cuDNN on the same weights",
    "run_dir": "/runs/gsa_128k",
    "mlflow_command": "mlflow ui --backend-store-uri sqlite:////runs/mlflow.db",
    "notes": ["preset h200 picked"],
}

GOLDEN = """\
+-- gsa_128k --
|   Model                decoder, 8 layers, 17.3 M parameters
|   Data                 stdlib, bytes, 12.3 MB
|
| Learning
|   Trained              200 steps, 26,214,400 tokens
|   Training loss        5.6000 -> 2.3100 nats/token (first -> last step)
|   Validation loss      2.4000 nats/token
|   Perplexity           11.02 per token
|   Compression          3.4625 bits/byte
|
| Cost
|   Wall time            1 h 2 min 05 s
|   Throughput           7,037 tokens/s, 41.2 % of peak FLOP/s (MFU)
|   Peak memory          41.20 GB
|   Training step        1.10 s, 3.20 s dense, 2.91 x faster than dense
|   Attention, one layer 8.10 ms, 127.00 ms dense, 15.68 x faster than dense
|                        dense: SDPA cuDNN on the same weights
|
| Attention
|   Keys attended        1,990.3 per query (mean), 3.0 % of the causal keys, 2,048 budget
|   Selection recall     40.0 % -> 80.0 % of dense attention mass covered (first -> last)
|   Index scores         WARNING: 60.0 % of a layer's logits beyond 8: keys tie, the oldest win
|   First-token share    6.00 % mean over layers, 10.00 % in layer 0, 0.64 % if uniform
|   Mean gate            0.450 value, 0.200 output
|
| Notes
|   - preset h200 picked
+
"""
BELOW = """\
run folder:
/runs/gsa_128k
compare runs:
mlflow ui --backend-store-uri sqlite:////runs/mlflow.db
"""


def split(text):
    """The box, and what stands below it."""
    end = text.index("\n+-", 1)
    end = text.index("\n", end + 1) + 1
    return text[:end], text[end:]


def inner(text, width=99):
    """The box without its right border and padding."""
    lines = split(text)[0].splitlines()
    assert all(len(line) == width for line in lines)
    assert all(line[-1] == ("+" if line[0] == "+" else "|") for line in lines)
    return "".join(re.sub(r"[ -]*[|+]?$", "", line[: width - 1]) + "\n" for line in lines)


def test_golden_text():
    expected = "".join(re.sub(r"[ -]*$", "", line) + "\n" for line in GOLDEN.splitlines())
    assert inner(render_summary(RESULT)) == expected
    assert split(render_summary(RESULT))[1] == BELOW


@pytest.mark.parametrize(("asked", "width"), [(80, 80), (20, 60), (200, 99)])
def test_the_box_fits_the_terminal(asked, width):
    text = inner(render_summary(RESULT, asked), width)
    # Every word is there, at any width.
    assert set(re.findall(r"\w+", inner(render_summary(RESULT)))) <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize("missing", sorted(RESULT))
def test_each_key_may_be_missing_or_none(missing):
    without = {key: value for key, value in RESULT.items() if key != missing}
    text = render_summary(without)
    assert "None" not in text
    assert text == render_summary({**without, missing: None})
    assert text != render_summary(RESULT)


def test_empty_result_is_an_empty_box():
    assert render_summary({}).splitlines()[0].startswith("+-- run ")
    assert len(render_summary({}).splitlines()) == 2


def test_empty_groups_have_no_title():
    text = render_summary({"name": "x", "loss": 1.0})
    assert "Learning" in text
    assert not re.search("Cost|Attention|run folder|Notes", text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "key", [key for key, value in RESULT.items() if isinstance(value, int | float)]
)
def test_not_finite_is_said(key, value):
    text = render_summary({**RESULT, key: value})
    assert "not finite" in text
    assert not re.search(r"\b(nan|inf)\b", text)


def test_not_finite_layer_is_said():
    text = render_summary({"first_token_attention": [0.1, math.nan]})
    assert "not finite in 1 of 2 layers" in text


def test_slower_than_dense_is_said():
    assert "2.00 x slower than dense" in render_summary({"step_s": 2.0, "dense_step_s": 1.0})


def test_a_minority_of_saturated_logits_is_no_warning():
    assert "Index scores" not in render_summary({"index_saturated_max": 0.5, "loss": 1.0})


def test_short_times_keep_their_digits():
    text = render_summary({"sparse_attention_s": 12.5e-6, "wall_s": 4.2})
    assert "12.5 us" in text
    assert "4.2 s" in text


def test_what_is_to_be_copied_is_whole():
    command = "mlflow ui --backend-store-uri sqlite:////" + "x" * 200 + "/mlflow.db"
    path = "/" + "y" * 300
    _, below = split(render_summary({"mlflow_command": command, "run_dir": path}, 80))
    assert below.splitlines() == ["run folder:", path, "compare runs:", command]


def test_long_notes_are_wrapped_and_complete():
    word, note = "y" * 250, "word " * 60
    text = render_summary({"data": word, "notes": [note], "name": "n" * 200})
    assert inner(text).count("y") == 250
    assert inner(text).count("word") == 60
