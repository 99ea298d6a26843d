"""Hitting the target: networks are proposed, measured, and proposed anew until one measures what was asked for.

A table is a few percent off for one network, alike for networks that are alike. So every trial says by how much the
table is off near the target, and the next network is asked of the table for what that leaves. Rules are ours:

- What is aimed at is 0.98 T. A network is accepted when two measurements of it agree within 2% and both are in
  (0.97 T, 0.99 T], which leaves room for what a measurement of another day may differ by; when the tries are used up,
  one of which both are in (0.97 T, T] is, and the report says so.
- The table's error for a network is the mean of log(measured / predicted) over the trials, those that are most like it
  weighing most. Of the networks that the table gives for aims about the target, that comes next which is then expected
  nearest to 0.98 T, preferably one that is like a network that was measured.
- No network is tried twice.
- A measurement that surprises or would be accepted is made again, in another session, and a third time where the two
  differ or only one would be accepted: the two that agree count. Where none do, the network is not accepted. Two that
  were disturbed count only where none was clean, and the report says so.

Nothing here knows a clock: a measurement is a record, plain data with ``median_ms``, ``ci_low_ms``, ``ci_high_ms`` (95%
confidence interval of the median) and ``disturbed`` (reasons, none when it was clean).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from prunet_zoo.cost import Cost, cost_range, layer_costs
from prunet_zoo.errors import LatencyError, few
from prunet_zoo.search.adjust import LOWEST
from prunet_zoo.space import Encoding, SearchSpace

TRIES = 6  # networks that are measured at most, unless the user says otherwise
CENTRE, COMFORT = 0.98, 0.99  # of the target: what is aimed at; what a network may measure to be accepted at once
_FLOOR = 0.96  # the lower end of a measurement's interval must be above this share of the target
_AGREE = 0.02  # two measurements of a network that differ by more ask for a third
_SURPRISE = 0.05  # a measurement that is farther from what was expected is made again
_PRECISE = 0.99  # a network that costs more than this share of the aim is preferred to a coarser one
_STEP, _MARGIN, _MOST = 0.004, 0.03, 40  # between two aims; beyond what trials say; how many aims at most
_UNLIKE = 0.3  # how much a network's error may differ from that of one with which it has nothing in common
_PREFER = 0.1  # what being unlike every measured network counts against being expected off the target
_NOISE = 0.01  # how much it may differ from that of its like

Record = dict[str, Any]


@dataclass
class Trial:
    """A network that is measured. ``aim``: what the table was asked for; ``predicted``: its word, in its unit;
    ``parts``: its word for each layer, see `layer_parts`."""

    encoding: Encoding
    spec_hash: str
    aim: float
    predicted: float
    parts: tuple[float, ...] = ()
    records: list[Record] = field(default_factory=list)

    @property
    def agreeing(self) -> list[Record]:
        """The two measurements that agree best, clean ones first; empty where no two agree, or only disturbed ones
        although another was clean."""
        pairs = [pair for pair in combinations(self.records, 2) if _differ(*pair) <= _AGREE]
        best = min(pairs, key=lambda p: (sum(bool(r["disturbed"]) for r in p), _differ(*p)), default=None)
        if best is None or (all(r["disturbed"] for r in best) and self._clean):
            return []
        return list(best)

    @property
    def _clean(self) -> list[Record]:
        return [r for r in self.records if not r["disturbed"]]

    @property
    def _used(self) -> list[Record]:
        return self.agreeing or self._clean or self.records

    @property
    def disturbed(self) -> tuple[str, ...]:
        """Why the measurement cannot be relied on; empty when one was clean."""
        return () if any(not r["disturbed"] for r in self._used) else tuple(self._used[-1]["disturbed"])

    @property
    def measured(self) -> float:
        """Latency in ms: the mean of the two measurements that agree; where none do, the median over the clean ones,
        over all where none is clean."""
        return statistics.median(r["median_ms"] for r in self._used)

    @property
    def interval(self) -> tuple[float, float]:
        """From the lowest to the highest end of the intervals (ms) of the measurements that `measured` is of."""
        return min(r["ci_low_ms"] for r in self._used), max(r["ci_high_ms"] for r in self._used)

    @property
    def record(self) -> Record:
        """The measurement that is nearest to `measured`."""
        return min(self._used, key=lambda r: abs(r["median_ms"] - self.measured))

    @property
    def sure(self) -> bool:
        """Whether two measurements agree."""
        return bool(self.agreeing)

    def within(self, target: float, highest: float = 1.0) -> bool:
        """Whether each measurement that `measured` is of is in (0.97 T, highest·T], its interval in (0.96 T, T]."""
        return all(_is_within(record, target, highest) for record in self._used)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data for reports."""
        low, high = self.interval
        return {
            "aim": self.aim,
            "predicted": self.predicted,
            "measured": self.measured,
            "ci_low": low,
            "ci_high": high,
            "measurements": len(self.records),
            "disturbed": list(self.disturbed),
            "spec_hash": self.spec_hash,
        }


@dataclass(frozen=True)
class Outcome:
    """The network chosen. ``missed``: why it does not meet the target, None when it does; ``doubt``: what there is to
    doubt where it does, None when nothing; ``correction``: the factor by which the table's word is off near it."""

    trial: Trial
    trials: list[Trial]
    correction: float
    missed: str | None
    doubt: str | None = None


class TargetHitter:
    """Tries networks of a space until one measures what was asked for.

    Args:
        space: the search space, or what a network that is no `NetSpec` offers in its place.
        cost: the table (or whatever predicts).
        propose: the architecture whose cost is in (share · aim, aim], called with both; `SearchStrategy.finish`.
            Raises `LatencyError` where there is none.
        measure: the record of a network; called with its spec and with what is noted of the trial.
        target: T in ms.
        tries: how many networks may be measured.
        tell: called with a line of text for each trial.
    """

    def __init__(
        self,
        space: Any,
        cost: Cost,
        propose: Callable[[float, float], Encoding],
        measure: Callable[[Any, dict[str, Any]], Record],
        target: float,
        tries: int = TRIES,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.space, self.cost, self.propose, self.measure = space, cost, propose, measure
        self.target, self.tries, self.tell = target, tries, tell
        (self.fastest, _), (self.slowest, _) = cost_range(cost, space)
        self.trials: list[Trial] = []

    def run(self) -> Outcome:
        """Try; returns the network that meets the target, or else the nearest.

        Raises:
            LatencyError: no network costs about the target, by the table's word.
        """
        stopped = None
        while len(self.trials) < self.tries:
            trial = self._next()
            if trial is None:
                stopped = self._why_none()
                break
            self._measure(trial)
            if trial.within(self.target, COMFORT) and trial.sure:
                break
        best = self._best()
        factor = correction(self.trials, best)
        missed = self._why_missed(best, stopped)
        return Outcome(best, self.trials, factor, missed, self._doubt(best) if missed is None else None)

    def _best(self) -> Trial:
        """The network that meets the target best, or else the nearest; a single measurement is not taken for it."""
        while True:
            best = min(self.trials, key=self._rank)
            if len(best.records) > 1 or not best.within(self.target):
                return best
            self._again(best)

    def _rank(self, trial: Trial) -> tuple[bool, bool, float]:
        within = trial.within(self.target)
        off = abs(math.log(trial.measured / (CENTRE * self.target)))
        return not (within and trial.sure), not within, off

    def _next(self) -> Trial | None:
        """The network to be measured next; None where the space has none that was not tried."""
        if not self.trials:
            return self._first()
        aim = self._wanted()
        if not self.fastest <= aim <= self.slowest:
            end = min(max(aim, self.fastest), self.slowest)
            return next(self._untried([end], LOWEST), None)
        ratios = [math.log(t.measured / t.predicted) for t in self.trials]
        low = math.log(CENTRE * self.target) - max(ratios) - _MARGIN
        high = math.log(CENTRE * self.target) - min(ratios) + _MARGIN
        count = min(_MOST, math.ceil((high - low) / _STEP))
        aims = [math.exp(low + (high - low) * i / count) for i in range(count + 1)]
        for share in (_PRECISE, LOWEST):
            found = min(self._untried(aims, share), key=self._expected_off, default=None)
            if found is not None:
                return found
        return None

    def _expected_off(self, trial: Trial) -> float:
        """How far a network is expected from what is aimed at, and how uncertain that is (relative)."""
        expected = trial.predicted * correction(self.trials, trial)
        nearest = min(apart(trial, other) for other in self.trials)
        return abs(math.log(expected / (CENTRE * self.target))) + _PREFER * nearest

    def _untried(self, aims: Sequence[float], share: float) -> Iterator[Trial]:
        seen = {trial.spec_hash for trial in self.trials}
        for aim in aims:
            try:
                trial = self._trial(self.propose(aim, share), aim)
            except LatencyError:
                continue  # the widths have a gap there
            if trial.spec_hash not in seen:
                seen.add(trial.spec_hash)
                yield trial

    def _first(self) -> Trial:
        for share in (_PRECISE, LOWEST):
            for trial in self._untried([CENTRE * self.target], share):
                return trial
        return self._trial(self.propose(self.target, LOWEST), self.target)  # the fastest may lie between

    def _trial(self, encoding: Encoding, aim: float) -> Trial:
        spec = self.space.decode(encoding)
        predicted = self.cost(spec)
        return Trial(encoding, spec.hash, aim, predicted, layer_parts(self.space, self.cost, encoding, predicted))

    def _wanted(self) -> float:
        """What the table should be asked for, as the trial that is nearest to the target has it."""
        nearest = min(self.trials, key=lambda t: abs(math.log(t.measured / (CENTRE * self.target))))
        return CENTRE * self.target * nearest.predicted / nearest.measured

    def _measure(self, trial: Trial) -> None:
        expected = trial.predicted * (correction(self.trials, trial) if self.trials else 1.0)
        trial.records.append(self._take(trial))
        surprise = abs(math.log(trial.measured / expected)) > _SURPRISE
        if surprise or trial.within(self.target, COMFORT):
            self._again(trial)
        self.trials.append(trial)
        self.tell(
            f"network {len(self.trials)} of at most {self.tries}: predicted {trial.predicted:.4g}, measured "
            f"{trial.measured:.4g} ms, {_off(trial.measured, self.target)} the target of {self.target:.4g}"
            + (" (disturbed)" if trial.disturbed else "")
        )

    def _take(self, trial: Trial) -> Record:
        noted = {"aim": trial.aim, "predicted": trial.predicted, "spec_hash": trial.spec_hash}
        return self.measure(self.space.decode(trial.encoding), noted)

    def _again(self, trial: Trial) -> None:
        """A second measurement, and a third where the two differ or only one would be accepted."""
        trial.records.append(self._take(trial))
        accepted = {_is_within(record, self.target, COMFORT) for record in trial.records}
        if not trial.sure or len(accepted) > 1:
            trial.records.append(self._take(trial))

    def _why_none(self) -> str:
        """Why there is no further network to try."""
        wanted = self._wanted()
        if not self.fastest <= wanted <= self.slowest:
            name, end = ("fastest", self.fastest) if wanted < self.fastest else ("slowest", self.slowest)
            factor = CENTRE * self.target / wanted
            return (
                f"out of reach: corrected by measurements (×{factor:.3f}), the {name} network of the space takes "
                f"about {end * factor:.4g} ms"
            )
        below = [t.measured for t in self.trials if t.measured <= self.target]
        above = [t.measured for t in self.trials if t.measured > self.target]
        nearest = [f"{max(below):.4g} ms below"] if below else []
        nearest += [f"{min(above):.4g} ms above"] if above else []
        return f"the space is too coarse here: the nearest networks measure {' and '.join(nearest)} the target"

    def _doubt(self, best: Trial) -> str | None:
        """What there is to doubt about a network that meets the target."""
        doubts = []
        if best.disturbed:
            doubts.append(f"although disturbed, its repeats agree: {'; '.join(best.disturbed)}")
        if not best.within(self.target, COMFORT):
            highest = max(record["median_ms"] for record in best.agreeing)
            doubts.append(
                f"at the edge: it measures up to {highest:.4g} ms, {_off(highest, self.target)} the target, "
                "and another day may put it above"
            )
        return "; ".join(doubts) or None

    def _why_missed(self, best: Trial, stopped: str | None) -> str | None:
        if best.within(self.target) and best.sure:
            return None
        low, high = best.interval
        near = LOWEST * self.target < best.measured <= self.target
        figures = few(f"{record['median_ms']:.4g}" for record in best.records)
        if near and not best.sure:
            reasons = next((r["disturbed"] for r in best.records if r["disturbed"]), None)
            told = f"was disturbed ({'; '.join(reasons)})" if reasons else "is uncertain"
            return f"the measurement {told} and its repeats differ: {figures} ms"
        if stopped:
            return stopped
        if near:
            return f"the measurement is too uncertain: {figures} ms, 95% interval {low:.4g} to {high:.4g} ms"
        number = f"{len(self.trials)} network{'s were' if len(self.trials) > 1 else ' was'}"
        more = f"; the measurement was disturbed ({'; '.join(best.disturbed)})" if best.disturbed else ""
        nearest = f"the nearest is {_off(best.measured, self.target)} the target"
        return f"{number} measured (--verify {self.tries}), {nearest}{more}"


def _differ(a: Record, b: Record) -> float:
    return abs(math.log(a["median_ms"] / b["median_ms"]))


def _is_within(record: Record, target: float, highest: float) -> bool:
    """Whether a measurement is in (0.97 T, highest·T], and its interval in (0.96 T, T]."""
    low, high = record["ci_low_ms"], record["ci_high_ms"]
    return LOWEST * target < record["median_ms"] <= highest * target and _FLOOR * target < low and high <= target


def _off(measured: float, target: float) -> str:
    return f"{percent_off(measured, target)} {'above' if measured > target else 'under'}"


def percent_off(measured: float, target: float) -> str:
    """How far a measurement is from the target, with as many digits as tell it from the target: '1.2%', '0.02%'."""
    off = 100 * abs(measured / target - 1)
    digits = max(1, math.ceil(-math.log10(off))) if off else 1
    return f"{off:.{digits}f}%"


def layer_parts(space: Any, cost: Cost, encoding: Encoding, whole: float) -> tuple[float, ...]:
    """The cost of each layer of an encoding, in the unit of ``cost``.

    In a network that is no `NetSpec` no block has a cost of its own. There all layers count alike: an L-th of the
    network's cost, ``whole``, at a layer's greatest width, and in proportion to the width. What is wanted of it is only
    how unlike two networks are.
    """
    if isinstance(space, SearchSpace):
        return tuple(layer_costs(cost, space, encoding))
    pairs = list(zip(space.layers, encoding, strict=True))
    shares = [0.0 if choice is None else choice[1] / la.candidate_widths(choice[0])[-1] for la, choice in pairs]
    return tuple(whole / len(pairs) * share for share in shares)


def apart(a: Trial, b: Trial) -> float:
    """How unlike two networks are: the share of the latency that layers do not have in common, by the table."""
    differing = 0.0
    for mine, other, x, y in zip(a.encoding, b.encoding, a.parts, b.parts, strict=True):
        same = mine is not None and other is not None and mine[0] == other[0]
        differing += abs(x - y) if same else 0.0 if mine == other else max(x, y)
    return differing / min(a.predicted, b.predicted)


def correction(trials: Sequence[Trial], network: Trial) -> float:
    """Measured over predicted, as expected for a network: the geometric mean over trials, those like it first."""
    weights = [(0.1 if t.disturbed else 1.0) / (_NOISE**2 + (_UNLIKE * apart(t, network)) ** 2) for t in trials]
    ratios = [math.log(t.measured / t.predicted) for t in trials]
    return math.exp(sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights))


def summary(report: dict[str, Any]) -> str:
    """One line on a search's result: target, predicted, measured, and whether the target is met."""
    unit, measured = report["unit"], report["measured"]
    line = f"{report['name']}: target {report['target']:.4g} {unit}, predicted {report['predicted']:.4g}"
    if measured:
        low, high = measured["ci_low_ms"], measured["ci_high_ms"]
        line += f", measured {measured['median_ms']:.4g} ms (95% interval {low:.4g} to {high:.4g}"
        tries = report["tries"]
        line += f"; {tries} network{'s' if tries > 1 else ''} tried)" if tries else ")"
    elif unit == "ms":
        line += f", not measured: {report['reason']}"
    if report["status"].startswith("missed"):
        line += f"; {report['status']}"
    elif measured and report["reason"]:
        line += f"; {report['reason']}"
    return line + f"; {report['params'] / 1e6:.2f} M parameters, {report['macs'] / 1e6:.1f} MMACs"
