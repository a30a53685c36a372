"""A kernel around `products`, for test_scores_of_unions.py."""

import triton
import triton.language as tl

from gsa_kernels.index_score.triton_at_union import products


@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, xy_ptr, xz_ptr):
    """xy [64, 16] and x^T z [32, 16] of x [64, 32], y [32, 16], z [64, 16]."""
    m, n, e = tl.arange(0, 64), tl.arange(0, 32), tl.arange(0, 16)
    x = tl.load(x_ptr + m[:, None] * 32 + n)
    y = tl.load(y_ptr + n[:, None] * 16 + e)
    z = tl.load(z_ptr + m[:, None] * 16 + e)
    xy, xz = products(x, y, z, tl.zeros([64, 16], tl.float32))
    tl.store(xy_ptr + m[:, None] * 16 + e, xy)
    tl.store(xz_ptr + n[:, None] * 16 + e, xz)
