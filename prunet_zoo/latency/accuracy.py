"""Published top-1 of the zoo's and of timm's networks (``accuracy.json``), to be set against measured latency."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

from pydantic import Field

from prunet_zoo.errors import unknown_name
from prunet_zoo.jsonfile import Frozen

QUICK_SIDE = 224  # px: networks for smaller inputs than this or equal ones are measured in a quick report


class KnownNetwork(Frozen):
    """A network and what its weights were published with.

    ``name`` is what `measure` takes. ``input_size`` is the side in px at which ``top1`` (%) was measured. ``weights``
    is the tag of timm's weights; None for the zoo's. ``teacher``: timm's name of the network that they were distilled
    from, if they were.
    """

    name: str
    family: str
    label: str
    input_size: int = Field(ge=1)
    top1: float = Field(gt=0.0, lt=100.0)
    weights: str | None = None
    teacher: str | None = None


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((resources.files("prunet_zoo") / "latency" / "accuracy.json").read_text("utf-8"))
    return data


@cache
def known_networks() -> tuple[KnownNetwork, ...]:
    """All networks with a published top-1, family by family."""
    return tuple(KnownNetwork.model_validate(row) for row in _data()["networks"])


def accuracy_sources() -> dict[str, str]:
    """Where the figures are from: text by key."""
    return {key: text for key, text in _data().items() if key != "networks"}


def select_networks(names: Sequence[str] | None = None, quick: bool = False) -> list[KnownNetwork]:
    """The networks of these names, labels or families (any case); None: all.

    Args:
        names: what was asked for. A name with several rows (two input sides) selects them all.
        quick: only those for inputs up to 224 px, unless they are named.

    Raises:
        UnknownNameError: a name is none of them; the nearest are suggested.
    """
    networks = known_networks()
    if names is None:
        return [n for n in networks if not quick or n.input_size <= QUICK_SIDE]
    chosen: dict[KnownNetwork, None] = {}
    for name in names:
        found = [n for n in networks if name.lower() in _aliases(n)]
        if not found:
            known = {alias for n in networks for alias in (n.name, n.family)}
            raise unknown_name(
                "network with a published accuracy", name, known, "Any other network: python tools/latency.py measure."
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _aliases(network: KnownNetwork) -> set[str]:
    names = {network.name, network.name.removeprefix("timm/"), network.label, network.family, network.weights or ""}
    return {name.lower() for name in names if name}


def pareto(points: Iterable[tuple[float, float]]) -> list[int]:
    """Indices of the (latency, accuracy) points that no other is at least as fast as and more accurate than, or faster
    than and at least as accurate as; from the fastest to the slowest."""
    given = list(points)
    best, line = float("-inf"), []
    for i in sorted(range(len(given)), key=lambda i: (given[i][0], -given[i][1])):
        if given[i][1] > best:
            best = given[i][1]
            line.append(i)
    return line
