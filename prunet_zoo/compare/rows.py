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
    """Searches that differ in nothing but the seed: one method, space and target, and one config.

    ``cost`` and ``top1`` are means over the seeds; the ranges go from the lowest to the highest. ``top1`` is None where
    a search was not evaluated.

    Attributes:
        found: the searches, each seed once.
        repeated: further searches with a seed that ``found`` has; they count nowhere.
        differs: where other settings have the same method, space and target: what is not the same in all of these.
        label: so much of ``differs`` as tells it from the others, '' where there are none.
    """

    method: str
    space: str
    target: float
    found: tuple[Found, ...]
    repeated: tuple[Found, ...] = ()
    differs: tuple[tuple[str, Any], ...] = ()
    label: str = ""

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
            "differs": dict(self.differs),
            "seeds": [f.seed for f in self.found],
            "repeated": [f.folder for f in self.repeated],
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
    """Group searches into panels, and within a panel into settings; methods in their usual order.

    Of searches with the same seed and config the first by folder counts. A search whose config is not known is a
    setting of its own.
    """
    rows = sorted(found, key=_order)
    panels = []
    for (unit, setting, data), mine in _grouped(rows, lambda f: (f.unit, f.setting, f.data)).items():
        settings: list[Setting] = []
        for (method, space, target), alike in _grouped(mine, lambda f: (f.method, f.space, f.target)).items():
            groups = list(_grouped(alike, lambda f: f.folder if f.config is None else f.config).values())
            for group, (differs, label) in zip(groups, _differing([g[0].config for g in groups]), strict=True):
                counted, repeated = _each_seed_once(group)
                settings.append(Setting(method, space, target, counted, repeated, differs, label))
        panels.append(Panel(unit, setting, data, tuple(settings)))
    return panels


_UNKNOWN = "settings not known"
_NOT_SET = "not set"  # the config leaves it at its default
_Config = tuple[tuple[str, Any], ...]


def _each_seed_once(group: Sequence[Found]) -> tuple[tuple[Found, ...], tuple[Found, ...]]:
    """The searches that count and those that repeat a seed; where a seed is not known, nothing is said to be one."""
    counted: list[Found] = []
    repeated: list[Found] = []
    for found in group:
        again = found.seed is not None and any(found.seed == other.seed for other in counted)
        (repeated if again else counted).append(found)
    return tuple(counted), tuple(repeated)


def _differing(configs: Sequence[_Config | None]) -> list[tuple[_Config, str]]:
    """Of each config what is not the same in all, and the first of it that tells it from the others, as a label."""
    if len(configs) == 1:
        return [((), "")]
    known = [dict(c) for c in configs if c is not None]
    columns = {key: [c.get(key, _NOT_SET) for c in known] for key in sorted({k for c in known for k in c}, key=_rank)}
    columns = {key: column for key, column in columns.items() if any(value != column[0] for value in column)}
    shown: list[str] = []
    apart = 1  # groups that the keys shown tell apart
    for key in columns:
        telling = len(set(zip(*(map(str, columns[k]) for k in (*shown, key)), strict=True)))
        if telling > apart:
            apart = telling
            shown.append(key)
    more = ", …" if len({(_short(key), str(column)) for key, column in columns.items()}) > len(shown) else ""
    told = []
    for i in range(len(known)):
        label = ", ".join(_say(key, columns[key][i]) for key in shown) + more
        told.append((tuple((key, column[i]) for key, column in columns.items()), label if columns else ""))
    rest = iter(told)
    return [((("settings", "not known"),), _UNKNOWN) if c is None else next(rest) for c in configs]


def _rank(key: str) -> tuple[int, str]:
    """The strategy's own settings first, then how long it was trained."""
    return 0 if key.startswith("train_cfg.strategy.") else 1 if key == "train_cfg.max_epochs" else 2, key


def _short(key: str) -> str:
    last = key.rpartition(".")[2]
    return ".".join(key.split(".")[-2:]) if last in ("type", "hash") else last


def _say(key: str, value: Any) -> str:
    return f"{_short(key)} {value}" if value == _NOT_SET else f"{_short(key)}={value}"


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
