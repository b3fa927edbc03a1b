"""Flags as words: a field's type on the command line, in a ``--config`` file and as a keyword.

All three are checked alike, and a word that is no flag is answered with the nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Collection, Iterable
from typing import Any, Literal, NoReturn, get_args, get_origin


def flag_name(name: str) -> str:
    """The flag of a field: `page_size` is `--page-size`."""
    return "--" + name.replace("_", "-")


class FlagParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and names the nearest flag to an unknown one.

    Its sub-commands (`add_subparsers`) behave the same, each by its own flags.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                self.error(f"unknown flag {flag}{_nearest(flag, self._option_string_actions)}")
        return namespace, unknown


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _without_none(hint: Any) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)]
    return options[0] if type(None) in get_args(hint) else hint


def parser_options(hint: Any) -> dict[str, Any]:
    """What ``add_argument`` is told of a field of the type ``hint``."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"nargs": "+", "type": int, "metavar": "N"}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "PATH"}[hint]}


def checked(flag: str, hint: Any, value: Any) -> Any:
    """`value` as the field's type, or ValueError."""
    if value is None and type(None) in get_args(hint):
        return None
    hint = _without_none(hint)

    def refuse(wanted: str) -> NoReturn:
        raise ValueError(f"{flag} must be {wanted}, not {value!r}")

    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            refuse("one of " + ", ".join(get_args(hint)))
    elif get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            refuse("a list of token counts")
        return tuple(value)
    elif hint is str:
        if not isinstance(value, (str, os.PathLike)):
            refuse("a path")
        return os.fspath(value)
    elif hint is bool:
        if not isinstance(value, bool):
            refuse("true or false")
    elif isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float)):
        refuse("a whole number" if hint is int else "a number")
    return float(value) if hint is float else value


def read_config(path: str, names: Collection[str]) -> dict[str, Any]:
    """A YAML mapping of flags, with or without their dashes, by the field ``names``.

    Raises:
        ValueError: the file cannot be read, or is no such mapping.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            mapping = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"--config {path} must be a mapping of flags, such as 'page-size: 1'")
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in names:
            near = _nearest(flag_name(name), map(flag_name, names))
            raise ValueError(f"--config {path}: unknown key {key!r}{near}")
        if name in values:
            raise ValueError(f"--config {path} sets {flag_name(name)} twice; keep one")
        values[name] = value
    return values
