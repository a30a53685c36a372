"""The two numbers behind each mode of gsa: key blocks of C, query tiles of R. No torch here."""

# mode -> (default C, smallest, largest), (default R, smallest, largest)
MODES = {
    "token": ((1, 1, 1), (1, 1, 1)),
    "block": ((64, 16, 128), (1, 1, 1)),
    "tile": ((64, 1, 128), (64, 16, 64)),
}


def granularity(mode: str, key_block: int, query_tile: int) -> tuple[int, int]:
    """(C, R) of a mode; 0 takes its default. Raises ValueError naming what is allowed."""
    if mode not in MODES:
        raise ValueError(f"attention.mode={mode!r}: choose one of {', '.join(MODES)}")
    numbers = []
    for name, given, (default, low, high) in zip(
        ("key_block", "query_tile"), (key_block, query_tile), MODES[mode], strict=True
    ):
        value = given or default
        if not low <= value <= high:
            allowed = str(low) if low == high else f"{low} to {high}"
            raise ValueError(
                f"attention.{name}={value}: mode {mode} allows {allowed} "
                f"(attention.{name}=0 takes {default})"
            )
        numbers.append(value)
    return numbers[0], numbers[1]
