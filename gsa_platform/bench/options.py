"""Options of a benchmark: ``--seq-len 8192 32768`` fills the field seq_len of its settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from gsa_platform.errors import UserError, suggest, unknown

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


def flags(config: type) -> list[str]:
    """Every option of a settings dataclass, as it is typed."""
    return [_flag(field.name) for field in dataclasses.fields(config)]


def choices(config: type, flag: str) -> tuple[str, ...]:
    """The values an option is limited to; () if it takes others, or is none."""
    for field in dataclasses.fields(config):
        if _flag(field.name) == flag:
            return tuple(field.metadata.get("choices", ()))
    return ()


def parse(config: type, words: list[str], command: str) -> Any:
    """The settings that were typed: ``--name value``, ``--name=value`` or ``name=value``; a list
    takes several words or one with commas, a truth value none.

    Raises UserError, with the choices, for an unknown option or a value that does not fit.
    """
    types = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        typed, equals, value = word.removeprefix("--").partition("=")
        name = typed.replace("-", "_")
        if name not in fields or not (equals or word.startswith("--")):
            shown = flags(config)
            hint = suggest(_flag(name), shown)
            raise UserError(
                f"'{command}' does not take '{word}'.{hint}\n  Options: {', '.join(shown)}"
            )
        given = [value] if equals else []
        kind = types[name]
        many = typing.get_origin(kind) is list
        while not equals and rest and not rest[0].startswith("--") and (many or not given):
            if kind is bool or ("=" in rest[0] and rest[0].partition("=")[0] in fields):
                break
            given.append(rest.pop(0))
        if many:
            given = [part for text in given for part in text.split(",") if part]
        values[name] = _value(_flag(name), kind, given, fields[name].metadata.get("choices"))
    return config(**values)


def help_text(config: type, command: str, summary: str, comments: dict[str, str]) -> str:
    """The options with their defaults and the comments beside their fields."""
    rows = []
    for field in dataclasses.fields(config):
        default = _shown(_default(field))
        limited = field.metadata.get("choices", ())
        note = comments.get(field.name, "")
        if limited:
            note = f"{note}{': ' * bool(note)}{', '.join(limited)}"
        rows.append((f"{_flag(field.name)} {default}".rstrip(), note))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {left.ljust(width)}  {note}".rstrip() for left, note in rows]
    head = f"Usage: gsa-platform {command} [--option value ...]\n{summary}\n\nOptions and defaults"
    return "\n".join([head, *lines])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "" if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(flag: str, kind: Any, given: list[str], limited: tuple[str, ...] | None) -> Any:
    if typing.get_origin(kind) is list:
        if not given:
            raise UserError(f"{flag} needs at least one value")
        return [_one(flag, typing.get_args(kind)[0], text, limited) for text in given]
    if kind is bool:
        return _one(flag, kind, given[0] if given else "true", limited)
    if not given:
        raise UserError(f"{flag} needs a value")
    return _one(flag, kind, given[0], limited)


def _one(flag: str, kind: Any, text: str, limited: tuple[str, ...] | None) -> Any:
    if limited and text not in limited:
        raise UserError(unknown(f"value of {flag}", text, limited))
    if kind is str:
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise UserError(f"{flag}={text}: needs true or false")
        return text == "true"
    try:
        convert: Callable[[str], Any] = kind
        return convert(text.replace("_", ""))
    except ValueError:
        raise UserError(f"{flag} {text}: needs {_KINDS[kind]}") from None
