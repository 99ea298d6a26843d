"""Errors whose message tells the user what was given, what was expected and what to do.

The command-line tools print them as one line and exit with status 2; a library user can catch `PrunetError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

_WITHOUT_VALUE = ("missing", "json_invalid")  # reports whose input is what stands around the fault


class PrunetError(Exception):
    """Base of every error that the user can mend."""


class SpecError(PrunetError, ValueError):
    """A network spec or a search space is malformed; the message names the field and the allowed range."""


class UnknownNameError(PrunetError, KeyError):
    """A name is not known; the message suggests the nearest ones."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument
        return str(self.args[0])


class DataError(PrunetError, ValueError):
    """A data set is missing, empty or inconsistent."""


class LatencyError(PrunetError, ValueError):
    """A latency target cannot be met, or a table or backend does not fit the request."""


class CheckpointError(PrunetError, ValueError):
    """A weights file is missing, damaged or does not fit the network."""


class TrainingError(PrunetError, RuntimeError):
    """A run cannot go on (NaN loss) or cannot be resumed (another config's work directory)."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """Return an error for an unknown ``name`` that suggests the nearest of the ``known`` names."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    suggestion = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}."
    return UnknownNameError(f"unknown {kind} {name!r}; {suggestion}{' ' + hint if hint else ''}")


def few(names: Iterable[object]) -> str:
    """The first four names and, where there are more, how many there are in all: "a, b, c, d, … (9)"."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:4]) + (f", … ({len(shown)})" if len(shown) > 4 else "")


def describe_validation(error: ValidationError, what: str) -> SpecError:
    """Turn pydantic's report into one `SpecError` that names each field, what it got and what it takes."""
    return SpecError(f"{what} is malformed: {describe_fields(error)}")


def describe_fields(error: ValidationError, path: str = "") -> str:
    """The fields of pydantic's report, each as "path.field: what it takes (given: …)"; without a field, the message."""
    items = error.errors()
    locs = [item["loc"] for item in items]
    # a parent of a bad field is reported too ("at least 1 item"): only the innermost field helps
    items = [i for i in items if not any(len(o) > len(i["loc"]) and o[: len(i["loc"])] == i["loc"] for o in locs)]
    lines = []
    for item in items[:8]:
        field = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
        given: Any = item.get("input")
        shown = (
            "" if isinstance(given, dict | list | tuple) or item["type"] in _WITHOUT_VALUE else f" (given: {given!r})"
        )
        name = f"{field.lstrip('.')}: " if field else ""
        lines.append(f"{name}{item['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(lines)
