"""The key blocks that a trained layer chooses for every query of a validation text, as a file.

    python experiments/speed/lists.py RUN --layer 1 --out layer.npz

RUN: a run folder or checkpoint of a model whose queries choose for themselves (block mode). The
file holds `blocks` [T, N] int16, ascending and padded with -1: `--lists` of query_gathering.py and
block_backward.py, which need no model then.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from gsa_kernels.bench.case import Shape, make_case, shape_of_capture
from gsa_kernels.selection import SelectionSpec
from gsa_plugins.bench.capture import capture


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run")
    p.add_argument("--layer", type=int, default=0)
    p.add_argument("--tokens", type=int, default=0, help="0: the context of the model")
    p.add_argument("--k", type=int, default=2048)
    p.add_argument("--key-block", type=int, default=64)
    p.add_argument("--out", type=Path, default=Path("layer.npz"))
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (held,) = capture(args.run, [args.layer], args.tokens, 1, device, print)
    sizes = shape_of_capture(held)
    spec = SelectionSpec(args.key_block, 1, window=128, sinks=64)
    shape = Shape(
        "block", spec, held["q_BTHE"].shape[1], sizes["heads"], sizes["kv_heads"],
        sizes["head_dim"], args.k, device, held["q_BTHE"].dtype, inputs="checkpoint",
    )  # fmt: skip
    with torch.no_grad():
        blocks = make_case(shape, held).choose().blocks_BHQN[0, 0]
    np.savez_compressed(args.out, blocks=blocks.to(torch.int16).cpu().numpy())
    print(f"{args.out}: {tuple(blocks.shape)}")


if __name__ == "__main__":
    main()
