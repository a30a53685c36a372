"""Which attention each layer uses, from a short pattern. No torch here."""

from gsa_platform.errors import UserError


def expand_pattern(pattern: list[str], n_layers: int) -> list[str]:
    """One attention name per layer; "*" is the configured attention.

    Entries are "name:count"; a last entry without a count fills the rest, otherwise the pattern
    repeats. [] means "*" everywhere. Raises UserError for entries that cannot be read.
    """
    if not pattern:
        return ["*"] * n_layers
    names: list[str] = []
    for i, entry in enumerate(pattern):
        name, _, count = entry.partition(":")
        if not count and i < len(pattern) - 1:
            count = "1"
        if not count:
            return (names + [name] * n_layers)[:n_layers]
        if not name or not count.isdigit() or int(count) < 1:
            raise UserError(
                f"model.layer_pattern: cannot read '{entry}'. Entries look like dense:2 or '*', "
                "for example model.layer_pattern=[dense:2,'*']"
            )
        names += [name] * int(count)
    return [names[i % len(names)] for i in range(n_layers)]
