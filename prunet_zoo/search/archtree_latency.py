"""Latencies of the tree's networks: measured on the device as the search goes, none twice; and what to expect of one.

The publication (arXiv 2311.10549) estimates latency on the target hardware while it searches, where others take a table
made beforehand. How a network is measured anew and how a saving is foreseen are ours.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from prunet_zoo.cost import Cost
from prunet_zoo.errors import SpecError, TrainingError
from prunet_zoo.files import write_json
from prunet_zoo.search.strategy import Measure, Record
from prunet_zoo.search.target import COMFORT, Trial
from prunet_zoo.space import Encoding
from prunet_zoo.spec import Frozen, parse

SURPRISE = 0.05  # a measurement that is farther from what was expected is made again
ACCEPTED = 0.95  # a network at the budget T takes more than this share of it
NEAR = 1.03  # of T: a network that was ranked higher is not at the budget


class _Measured(Frozen):
    """What a search and its report need of a latency record."""

    model_config = ConfigDict(extra="ignore")

    median_ms: float = Field(gt=0.0)
    ci_low_ms: float = Field(ge=0.0)
    ci_high_ms: float = Field(ge=0.0)
    p10_ms: float = Field(ge=0.0)
    p90_ms: float = Field(ge=0.0)
    n: int = Field(ge=1)
    disturbed: tuple[str, ...]


class _Row(Frozen):
    """A network in the file of what was measured."""

    counts: tuple[int, ...]
    expected: float | None
    quick: tuple[_Measured, ...]
    records: tuple[_Measured, ...]


class Latencies:
    """Latency in ms of networks that are told apart by the numbers of channels kept, a group each.

    To be ranked, a network is measured once with little effort, and again only where that record is disturbed or is
    more than 5% off what was expected; a third time where those two differ by more than 2%. To be accepted, it is
    measured twice with full effort (`confirm`), and a third time where these differ. What was measured is kept in a
    file, the two kinds apart, so that a search that was killed goes on with the same figures. Without ``measure`` the
    cost's word is taken.

    Args:
        decode: the network of such numbers: its encoding and its spec.
        cost: what is expected of a network before anything is known of its like.
        measure: the record of a spec; None where the device is not at hand.
        target: T, in ms (in the unit of the cost where nothing is measured).
        path: file of what was measured.

    Attributes:
        made: how many measurements were made by this object.

    Raises:
        TrainingError: the file is damaged.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], tuple[Encoding, Any]],
        cost: Cost,
        measure: Measure | None,
        target: float,
        path: Path,
    ) -> None:
        self.decode, self.cost, self.measure, self.target, self.path = decode, cost, measure, target, path
        self.made = 0
        self._took: dict[bool, list[float]] = {True: [], False: []}  # seconds of each measurement made; quick or not
        self._costs: dict[tuple[int, ...], tuple[str, float]] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self.rows = _read(path)
            except (ValueError, SpecError) as error:
                raise TrainingError(f"{path} is damaged ({error}); remove it to measure again") from None

    def predicted(self, counts: Sequence[int]) -> float:
        """The cost's word for a network, in its unit."""
        return self._known(counts)[1]

    def spec_hash(self, counts: Sequence[int]) -> str:
        """Of the network."""
        return self._known(counts)[0]

    def _known(self, counts: Sequence[int]) -> tuple[str, float]:
        key = tuple(counts)
        if key not in self._costs:
            _, spec = self.decode(key)
            self._costs[key] = spec.hash, self.cost(spec)
        return self._costs[key]

    def __call__(self, counts: Sequence[int], expected: float | None = None) -> float:
        """The network's latency, good enough to rank it; ``expected`` is the estimate that a surprise is told by (None:
        there is none)."""
        if self.measure is None:
            return self.predicted(counts)
        row = self._row(counts, expected)
        while self._is_open(trial := self._trial(counts, row["quick"]), row["expected"]):
            self._take(counts, row, quick=True)
        return trial.measured

    def confirm(self, counts: Sequence[int]) -> float:
        """The network's latency, measured with full effort."""
        if self.measure is None:
            return self.predicted(counts)
        row = self._row(counts, None)
        while len(row["records"]) < 2 or self._is_open(self._trial(counts, row["records"]), None):
            self._take(counts, row, quick=False)
        return self._trial(counts, row["records"]).measured

    def _row(self, counts: Sequence[int], expected: float | None) -> dict[str, Any]:
        new = {"counts": list(counts), "expected": expected, "quick": [], "records": []}
        return self.rows.get(self.spec_hash(counts), new)

    def _take(self, counts: Sequence[int], row: dict[str, Any], quick: bool) -> None:
        assert self.measure is not None
        _, spec = self.decode(counts)
        start = time.perf_counter()
        row["quick" if quick else "records"].append(self.measure(spec, quick=quick))
        self._took[quick].append(time.perf_counter() - start)
        self.made += 1
        self.rows[self.spec_hash(counts)] = row
        write_json(self.path, self.rows)

    @staticmethod
    def _is_open(trial: Trial, expected: float | None) -> bool:
        if not trial.records:
            return True
        if len(trial.records) == 1:
            if expected is None:
                return bool(trial.disturbed)
            surprise = expected <= 0 or abs(math.log(trial.measured / expected)) > SURPRISE
            return bool(trial.disturbed) or surprise
        return not trial.sure and len(trial.records) < 3

    def seconds_to_confirm(self) -> float:
        """What `confirm` takes of a network at least: two measurements, as long as those made with full effort took on
        average, or, before there are any, the quick ones; 0 where none was made yet."""
        took = self._took[False] or self._took[True]
        return 2 * sum(took) / len(took) if took else 0.0

    def is_near(self, latency: float) -> bool:
        """Whether a network that was ranked so may be at the budget, or below: at most 1.03 T."""
        return latency <= NEAR * self.target

    def meets(self, counts: Sequence[int], comfort: bool = False) -> bool:
        """Whether a network is at the budget: two measurements of it with full effort agree, each in (0.95 T, T]; with
        ``comfort`` in (0.95 T, 0.99 T], which leaves room for a measurement of another day. Where nothing is measured:
        whether its cost is in (0.95 T, T]."""
        if self.measure is None:
            return ACCEPTED * self.target < self.predicted(counts) <= self.target
        low, high = ACCEPTED * self.target, (COMFORT if comfort else 1.0) * self.target
        agreeing = self._trial(counts, self._row(counts, None)["records"]).agreeing
        return bool(agreeing) and all(low < record["median_ms"] <= high for record in agreeing)

    def trial(self, counts: Sequence[int]) -> Trial | None:
        """What was measured of a network, with full effort where it was; None where nothing was."""
        row = self._row(counts, None)
        records = row["records"] or row["quick"]
        return self._trial(counts, records) if records else None

    def _trial(self, counts: Sequence[int], records: list[Record]) -> Trial:
        encoding, _ = self.decode(counts)
        return Trial(encoding, self.spec_hash(counts), self.target, self.predicted(counts), (), list(records))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by spec hash; raises `ValueError` or `SpecError` for a file that is not whole."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, dict):
        raise SpecError("it holds no JSON object")
    for name, data in rows.items():
        row = parse(_Row, data, f"network {name}")
        if not (row.quick or row.records):
            raise SpecError(f"network {name} has no measurement")
    return rows


class Savings:
    """What taking channels out saves, in ms: the cost's word, corrected by what was measured of other networks.

    The same step of the same group (from so many channels to so many) saves in one network what it saved in others, on
    average. Otherwise the cost's word counts, times a factor for the group: measured over foreseen savings of the group
    so far, drawn to 1 with the weight of one ordinary step.

    Args:
        scale: ms per unit of the cost.
        step: ms that one removal is meant to save.
        rows: what is known already, see `rows`.

    Attributes:
        rows: (group, from, to, foreseen ms, measured ms) of every removal that was measured, in order.
    """

    def __init__(self, scale: float, step: float, rows: Sequence[Sequence[Any]] = ()) -> None:
        self.scale, self.step = scale, step
        self.rows: list[tuple[int, int, int, float, float]] = []
        self._same: dict[tuple[int, int, int], list[float]] = {}
        self._sums: dict[int, tuple[float, float]] = {}
        for group, before, after, foreseen, measured in rows:
            self.add(int(group), int(before), int(after), float(foreseen) / scale, float(measured))

    def add(self, group: int, before: int, after: int, predicted: float, measured: float) -> None:
        """A removal was measured. ``predicted``: the cost's word, in its unit; ``measured`` in ms."""
        foreseen = predicted * self.scale
        self.rows.append((group, before, after, foreseen, measured))
        self._same.setdefault((group, before, after), []).append(measured)
        sums = self._sums.get(group, (0.0, 0.0))
        self._sums[group] = sums[0] + foreseen, sums[1] + measured

    def estimate(self, group: int, before: int, after: int, predicted: float) -> float:
        """What a removal is expected to save (ms)."""
        same = self._same.get((group, before, after))
        if same:
            return sum(same) / len(same)
        foreseen, measured = self._sums.get(group, (0.0, 0.0))
        factor = (self.step + max(0.0, measured)) / (self.step + max(0.0, foreseen))
        return factor * predicted * self.scale
