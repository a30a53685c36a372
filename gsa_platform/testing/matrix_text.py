"""The matrix as text: what works as products of names, what is refused by reason."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from gsa_platform.components import SLOTS
from gsa_platform.testing.matrix import BROKEN, REFUSED, WORKS, Combination, Outcome

WIDTH = 99
_GLUE = "\N{NO-BREAK SPACE}"  # keeps words on one line
Row = tuple[str, ...]
Box = tuple[tuple[str, ...], ...]  # the names of each slot; stands for all their combinations


def render(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Counts, then products of what works, then each reason with what it refuses."""
    by = {
        result: [o for o in outcomes if o.result == result] for result in (WORKS, REFUSED, BROKEN)
    }
    counts = ", ".join(f"{len(found):,} {result}" for result, found in by.items())
    every = [{row[axis] for row in map(row_of, outcomes)} for axis in range(len(SLOTS))]
    lines = [f"{len(outcomes):,} combinations: {counts} in {seconds:.1f} s"]
    if by[WORKS]:
        lines += ["", f"works ({len(by[WORKS]):,})"]
        lines += _products(map(row_of, by[WORKS]), every)
    if by[REFUSED]:
        lines += ["", f"refused ({len(by[REFUSED]):,})"]
        for reason, found in by_reason(by[REFUSED]).items():
            lines += textwrap.wrap(
                f"{reason} ({len(found):,})", WIDTH, initial_indent="  ", subsequent_indent="  "
            )
            lines += ["  " + line for line in _products(map(row_of, found), every, limit=4)]
    for outcome in by[BROKEN]:
        lines += ["", f"BROKEN  {outcome.combination}", f"  {outcome.reason}"]
    return "\n".join(lines)


def row_of(outcome: Outcome) -> Row:
    return row(outcome.combination)


def row(combination: Combination) -> Row:
    rest = (combination.names[slot] for slot in SLOTS if slot != "attention")
    return (combination.attention, *rest)


def by_reason(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by reason, most frequent first; names of components in a reason become `...`."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        reason = re.sub(rf"\b({'|'.join(SLOTS)})=\w+", r"\1=...", outcome.reason)
        reason = re.sub(r" \(you set [\w., ]+\)", "", reason)
        groups.setdefault(reason, []).append(outcome)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def boxes(rows: Iterable[Row]) -> list[Box]:
    """The rows as few products of sets of names: values with the same continuations join."""
    rests: dict[str, set[Row]] = {}
    for first, *others in rows:
        rests.setdefault(first, set()).add(tuple(others))
    joined: dict[frozenset[Row], list[str]] = {}
    for first, rest_set in rests.items():
        joined.setdefault(frozenset(rest_set), []).append(first)
    out: list[Box] = []
    for rest, firsts in joined.items():
        tails = boxes(rest) if any(rest) else [()]
        out += [(tuple(sorted(firsts)), *tail) for tail in tails]
    return sorted(out, key=lambda box: -size(box))


def size(box: Box) -> int:
    count = 1
    for names in box:
        count *= len(names)
    return count


def _names(names: tuple[str, ...], every: set[str]) -> str:
    """The names; `*` for all of several, and what is left out where that is shorter."""
    left = sorted(every - set(names))
    if not left and len(every) > 1:
        return "*"
    if left and 2 * len(left) < len(names):
        return f"(all{_GLUE}but{_GLUE}{','.join(left)})"
    return ",".join(names)


def _products(rows: Iterable[Row], every: list[set[str]], limit: int = 0) -> list[str]:
    found = boxes(rows)
    lines = []
    for box in found[: limit or None]:
        parts = [
            f"{slot}={_names(names, every[axis])}"
            for axis, (slot, names) in enumerate(zip(SLOTS, box, strict=True))
        ]
        text = (
            f"{size(box):,} x  {' '.join(parts)}"
            if limit
            else f"{' '.join(parts)} ({size(box):,})"
        )
        wrapped = textwrap.wrap(
            text,
            WIDTH - 2,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line.replace(_GLUE, " ") for line in wrapped]
    if limit and len(found) > limit:
        left = sum(map(size, found[limit:]))
        lines.append(f"  {left:,} x  in {len(found) - limit} more products (--json lists them)")
    return lines
