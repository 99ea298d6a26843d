"""Which searches may be compared, which are seeds of one setting, and which are on the Pareto line."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prunet_zoo.compare.reports import Found

ORDER = ("tiered", "ddpnas", "pas", "archtree")  # of the project's methods; others come after them


@dataclass(frozen=True)
class Setting:
    """Searches that differ in nothing but the seed: one method, space and target.

    ``cost`` and ``top1`` are means over the seeds; the ranges go from the lowest to the highest. ``top1`` is None where
    a search was not evaluated.
    """

    method: str
    space: str
    target: float
    found: tuple[Found, ...]

    @property
    def kind(self) -> str:
        """Of its costs: 'measured' where all are, else 'predicted' or 'counted'."""
        kinds = {f.kind for f in self.found}
        return kinds.pop() if len(kinds) == 1 else "predicted"

    @property
    def disturbed(self) -> bool:
        """Whether a latency in it was disturbed."""
        return any(f.disturbed for f in self.found)

    @property
    def cost(self) -> float:
        """Mean of the latency (or MACs)."""
        return statistics.fmean(f.cost for f in self.found)

    @property
    def cost_range(self) -> tuple[float, float]:
        """Of several seeds from the lowest to the highest cost, of one the 95% interval of its measurement."""
        if len(self.found) == 1:
            return self.found[0].low, self.found[0].high
        return min(f.cost for f in self.found), max(f.cost for f in self.found)

    @property
    def top1s(self) -> list[float]:
        """Accuracies in percent, by seed."""
        return [f.top1 for f in self.found if f.top1 is not None]

    @property
    def top1(self) -> float | None:
        """Mean accuracy in percent; None unless all seeds have one."""
        return statistics.fmean(self.top1s) if len(self.top1s) == len(self.found) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        spread = statistics.stdev(self.top1s) if len(self.top1s) > 1 else None
        return {
            "method": self.method,
            "space": self.space,
            "target": self.target,
            "seeds": [f.seed for f in self.found],
            "kind": self.kind,
            "cost": self.cost,
            "cost_range": list(self.cost_range),
            "top1": self.top1,
            "top1_range": [min(self.top1s), max(self.top1s)] if self.top1s else None,
            "top1_deviation": spread,
        }


@dataclass(frozen=True)
class Panel:
    """Settings whose costs and accuracies may share an axis: one unit, device, way of running, and set of data."""

    unit: str
    setting: tuple[tuple[str, Any], ...]
    data: str | None
    settings: tuple[Setting, ...]

    @property
    def title(self) -> str:
        """Device and how it runs, or that MACs are counted; the data where it is known."""
        told = dict(self.setting)
        parts = [str(told[key]) for key in ("device", "backend", "dtype") if key in told]
        parts += [f"batch {told['batch']}"] if "batch" in told else []
        parts += [f"{told['threads']} thread(s)"] if "threads" in told else []
        parts = parts or [f"{self.unit}, no device"]
        return ", ".join([*parts, *([self.data] if self.data else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``pareto`` are indices of ``settings``."""
        return {
            "title": self.title,
            "unit": self.unit,
            "setting": dict(self.setting),
            "data": self.data,
            "settings": [s.to_dict() for s in self.settings],
            "pareto": [self.settings.index(s) for s in pareto_line(self.settings)],
        }


def compare(found: Iterable[Found]) -> list[Panel]:
    """Group searches into panels, and within a panel into settings; methods in their usual order."""
    rows = sorted(found, key=_order)
    panels = []
    for (unit, setting, data), mine in _grouped(rows, lambda f: (f.unit, f.setting, f.data)).items():
        groups = _grouped(mine, lambda f: (f.method, f.space, f.target))
        settings = [Setting(method, space, target, tuple(f)) for (method, space, target), f in groups.items()]
        panels.append(Panel(unit, setting, data, tuple(settings)))
    return panels


def pareto_line(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other is at least as cheap as and more accurate than; from the cheapest on."""
    best, line = float("-inf"), []
    rated = [(s.cost, s.top1, s) for s in settings if s.top1 is not None]
    for _, top1, setting in sorted(rated, key=lambda row: (row[0], -row[1])):
        if top1 > best:
            best = top1
            line.append(setting)
    return line


def _order(found: Found) -> tuple[Any, ...]:
    known = ORDER.index(found.method) if found.method in ORDER else len(ORDER)
    return known, found.method, found.space, found.target, -1 if found.seed is None else found.seed, found.folder


def _grouped(rows: Iterable[Found], key: Callable[[Found], Any]) -> dict[Any, list[Found]]:
    groups: dict[Any, list[Found]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
