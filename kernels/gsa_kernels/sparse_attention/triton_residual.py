"""What rounding an output to 16 bits has lost, kept in a byte for the backward.

delta = sum_e out dout is what the softmax backward subtracts from every dP of a row. Of a rounded
output it is wrong by the same amount for all keys, and where keys have much in common, and values
too, those errors add up: dq = sum_j p_j (dP_j - delta) k_j was wrong by up to 12 times what
rounding each dS_j costs. With the residual, out is known to 8 bits more.

Legend: LOST bits of a residual's unit, the digits of a float32 below those of the output's type
less 8: 8 for bfloat16, 5 for float16; 0 where nothing was lost.
"""

import torch
import triton
import triton.language as tl

LOST = {torch.bfloat16: 8, torch.float16: 5}


def lost_bits(dtype: torch.dtype) -> int:
    """LOST of outputs of a type."""
    return LOST.get(dtype, 0)


@triton.jit
def residual_of(x, rounded, LOST: tl.constexpr):
    """int8 in units of 2^LOST float32 steps, of x float32 and what it was rounded to."""
    # Of one sign, floats are ordered as their bits, whatever exponents lie between.
    lost = x.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    steps = (lost + (1 << (LOST - 1))) >> LOST
    return tl.minimum(tl.maximum(steps, -127), 127).to(tl.int8)


@triton.jit
def restored(rounded, residual, LOST: tl.constexpr):
    """float32: what was rounded, to half a residual's unit."""
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits + (residual.to(tl.int32) << LOST)).to(tl.float32, bitcast=True)
