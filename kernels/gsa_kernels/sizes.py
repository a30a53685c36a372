"""Arithmetic of grids and tiles; Triton's own costs microseconds a call."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """Channels of a matrix product: a power of two, at least 16."""
    return max(16, power_of_2(width))
