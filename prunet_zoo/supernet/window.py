"""The two widths of a Prunode, and the rule that moves them (tiered pruning, arXiv 2209.11785; see `docs/prunode.md`).

A Prunode runs once, at the larger of two widths d_S < d_L, and learns one probability, p_L. After some steps the pair,
the *window*, moves to where the gain is. The paper publishes the building block; both rules here are ours:

- ``averaged`` (default) estimates the best width from all the gradients it remembers, and how sure that estimate is.
  The window stands at the estimate and is as wide as the doubt.
- ``ema`` is the plain rule that the benchmark compares with: half a window up or down by an average of p_L.

Pure Python and NumPy, no random numbers: the same observations give the same windows, on every rank of a distributed
run too.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from prunet_zoo.errors import CheckpointError, SpecError, TrainingError, unknown_name

RuleName = Literal["averaged", "ema"]


class EmaRule:
    """Move by Δ/2 on the exponential moving average of p_L; the baseline of `benchmarks/prunode_convergence.py`.

    Every ``period`` steps: above ½ + ``deadband`` up, below ½ − ``deadband`` down, else stay. Two moves in the same
    direction grow Δ, anything else shrinks it. Positions and Δ are in steps of the grid.

    Args:
        widths: the grid, at least two widths.
        period: steps between decisions.
        deadband: distance of the average from ½ under which the window stays.
        shrink: factor on Δ after a turn or a stay.
        grow: factor on Δ after two moves in the same direction.
        decay: of the moving average, per step.
        span: first Δ, as a part of the grid.
    """

    STATE = ("low", "high", "centre", "delta", "average", "steps", "last")

    def __init__(
        self,
        widths: Sequence[int],
        period: int = 40,
        deadband: float = 0.05,
        shrink: float = 0.7,
        grow: float = 1.2,
        decay: float = 0.95,
        span: float = 0.25,
    ) -> None:
        self.top = len(widths) - 1
        self.period, self.deadband, self.shrink, self.grow, self.decay = period, deadband, shrink, grow, decay
        self.centre, self.delta = self.top / 2, span * self.top
        self.average, self.steps, self.last = 0.5, 0, 0
        self.low, self.high = 0, self.top
        self._place()

    def observe(self, p_large: float, grad: float | None) -> bool:
        """Count one step; returns whether a period ended (``grad`` is not used)."""
        self.average += (1 - self.decay) * (p_large - self.average)
        self.steps += 1
        if self.steps < self.period:
            return False
        way = (self.average > 0.5 + self.deadband) - (self.average < 0.5 - self.deadband)
        self.centre += way * self.delta / 2
        self.delta *= self.grow if way and way == self.last else self.shrink
        self.last, self.steps, self.average = way, 0, 0.5
        self._place()
        return True

    def choose(self) -> int:
        """Index of the likelier of the two widths."""
        return self.high if self.average > 0.5 else self.low

    def _place(self) -> None:
        self.delta = min(max(self.delta, 1.0), float(self.top))
        self.centre = min(max(self.centre, self.delta / 2), self.top - self.delta / 2)
        self.low = min(int(self.centre - self.delta / 2 + 0.5), self.top - 1)
        self.high = min(max(int(self.centre + self.delta / 2 + 0.5), self.low + 1), self.top)


class AveragedRule:
    """Estimate the best width from every remembered gradient; stand there, as wide as the doubt.

    Positions are u(d) = (√d − √d_min) / (√d_max − √d_min), in which the gain of a width that returns less and less is
    nearer to a parabola than in d. On a parabola with its top at r the gain of d_L over d_S is b·Δ·(r − m): Δ is the
    window's span, m its middle, b > 0 the curvature. So the signal of step t, minus the gradient of the loss by
    (logit_L − logit_S), is

        y_t = b·Δ_t·(r − m_t) + noise.

    Least squares needs a few sums over the steps, which fade exponentially. The memory grows with the steps done, so
    that noise averages out, and is limited (``memory``), because weights and the latency multiplier move. Each period
    gives a likelihood for every r on a line (b fitted for each, but not under a bound: a gain that is clearly not flat
    has its top within reach). Its mean is where the window goes, its standard deviation how wide it gets.

    The scale of the gradients drops out: each period's signals are divided by their remembered root mean square.
    Outliers are cut at ``clip`` times it. Without gradients the change of logit(p_L) from step to step is the signal.

    Args:
        widths: the grid, at least two widths.
        period: steps between decisions.
        span: largest (and first) span of the window, as a part of the positions.
        spans_per_std: span of the window per standard deviation of the estimate.
        shrink: least factor on the span from one period to the next.
        grow: largest factor on it.
        move: largest move of the middle in a period, as a part of the span.
        memory: least and largest memory, in steps; in between it is the steps done.
        sharpen: power on the likelihood; above 1 the estimate leans less on the middle of the grid while it is unsure.
        beyond: how far beyond the ends r may lie; without it the mean never reaches an end.
        least_bend: bound for b, as a part of the root mean square slope.
        clip: limit for a signal, in root mean squares.
    """

    STATE = (
        "low", "high", "centre", "span", "estimate", "spread", "steps", "total", "sum_y", "sum_yy", "logit", "limit",
        "weight", "power", "known", "s0", "s1", "s2", "t0", "t1", "yy",
    )  # fmt: skip

    def __init__(
        self,
        widths: Sequence[int],
        period: int = 10,
        span: float = 0.4,
        spans_per_std: float = 2.0,
        shrink: float = 0.8,
        grow: float = 1.6,
        move: float = 0.5,
        memory: tuple[int, int] = (200, 2000),
        sharpen: float = 2.0,
        beyond: float = 0.2,
        least_bend: float = 0.6,
        clip: float = 4.0,
    ) -> None:
        first, last = math.sqrt(widths[0]), math.sqrt(widths[-1])
        self.positions = [(math.sqrt(w) - first) / (last - first) for w in widths]
        self.roots = np.linspace(-beyond, 1 + beyond, max(48, len(widths)) + 1)
        self.inside = np.clip(self.roots, 0.0, 1.0)
        self.period, self.max_span, self.spans_per_std, self.move = period, span, spans_per_std, move
        self.shrink, self.grow, self.memory = shrink, grow, memory
        self.sharpen, self.least_bend, self.clip = sharpen, least_bend, clip
        self.centre = self.estimate = 0.5
        self.span, self.spread = span, 1.0
        self.steps = self.total = 0
        self.sum_y = self.sum_yy = self.logit = self.limit = 0.0  # limit 0: none yet
        # faded sums: steps; mean square of the unscaled signal and its weight; Δ², Δ²m, Δ²m², Δy, Δmy, y²
        self.weight = self.power = self.known = self.s0 = self.s1 = self.s2 = self.t0 = self.t1 = self.yy = 0.0
        self.low, self.high = 0, 1
        self._place()

    def observe(self, p_large: float, grad: float | None) -> bool:
        """Add one step's signal; returns whether a period ended."""
        if grad is None:
            p = min(max(p_large, 1e-7), 1 - 1e-7)
            now = math.log(p / (1 - p))
            y, self.logit = now - self.logit, now
        else:
            y = -grad
        if self.limit:
            y = min(max(y, -self.limit), self.limit)
        self.sum_y += y
        self.sum_yy += y * y
        self.steps += 1
        if self.steps < self.period:
            return False
        if self._remember():
            self._fit()
            self._place()
        self.steps, self.sum_y, self.sum_yy = 0, 0.0, 0.0
        self.logit = 0.0  # the caller sets p_L back to 1/2
        return True

    def choose(self) -> int:
        """Index of the width nearest to the estimate."""
        return self._nearest(self.estimate)

    def _remember(self) -> bool:
        """Fade the sums and add this period's; returns False when there was never any signal."""
        n = self.steps
        self.total += n
        least, most = self.memory
        fade = math.exp(-n / min(max(self.total, least), most))
        self.weight = fade * self.weight + n
        recent = math.exp(-n / least)
        self.power = recent * self.power + (1 - recent) * self.sum_yy / n
        self.known = recent * self.known + (1 - recent)
        scale = math.sqrt(self.power / self.known)
        if scale == 0.0 or not math.isfinite(1 / scale):
            return False
        self.limit = self.clip * scale
        y, yy = self.sum_y / scale, self.sum_yy / scale / scale
        low, high = self.positions[self.low], self.positions[self.high]
        d, m = high - low, (high + low) / 2
        self.s0 = fade * self.s0 + n * d * d
        self.s1 = fade * self.s1 + n * d * d * m
        self.s2 = fade * self.s2 + n * d * d * m * m
        self.t0 = fade * self.t0 + d * y
        self.t1 = fade * self.t1 + d * m * y
        self.yy = fade * self.yy + yy
        return True

    def _fit(self) -> None:
        """Weigh every possible best position by its likelihood; move the middle and set the span."""
        r = self.roots
        # least squares for y = b·Δ·(r − m): explained(r) = 2bB − b²A with A = ΣΔ²(r − m)², B = ΣΔ(r − m)y. The small
        # addition keeps A from 0 where r is the middle of the only window so far.
        a = np.maximum(r * (r * self.s0 - 2 * self.s1) + self.s2, 0.0) + 1e-3 * self.s0
        b = r * self.t0 - self.t1
        slope = self.t0 / self.s0
        noise = max(self.yy - slope * self.t0, 0.0) / self.weight
        bend = np.maximum(b / a, self.least_bend * math.sqrt(slope * slope + noise / self.s0))
        explained = (2 * b - bend * a) * bend
        best = float(explained.max())
        variance = max(self.yy - best, 1e-9 * self.yy) / self.weight
        likelihood = np.exp(self.sharpen * (explained - best) / (2 * variance))
        likelihood /= likelihood.sum()
        mean = float(likelihood @ r)
        self.estimate = float(likelihood @ self.inside)
        self.spread = math.sqrt(max(float(likelihood @ (r - mean) ** 2), 0.0))
        reach = self.move * self.span
        self.centre += min(max(self.estimate - self.centre, -reach), reach)
        wanted = self.spans_per_std * self.spread
        self.span = min(max(wanted, self.shrink * self.span), self.grow * self.span)

    def _place(self) -> None:
        """Put the window on the grid."""
        last = len(self.positions) - 1
        self.span = min(max(self.span, 0.25 / (last + 1)), self.max_span)
        self.centre = min(max(self.centre, self.span / 2), 1 - self.span / 2)
        self.low = self._nearest(self.centre - self.span / 2)
        self.high = self._nearest(self.centre + self.span / 2)
        if self.low == self.high:  # narrower than the grid: the two widths around the middle
            if self.low == 0 or (self.positions[self.low] <= self.centre and self.low < last):
                self.high += 1
            else:
                self.low -= 1

    def _nearest(self, position: float) -> int:
        return nearest_index(self.positions, position)


RULES: dict[str, type[EmaRule] | type[AveragedRule]] = {"averaged": AveragedRule, "ema": EmaRule}


class WidthWindow:
    """The two widths d_S < d_L that a Prunode uses now, and what it has learnt about the best one.

        window = WidthWindow(range(32, 513, 32))
        ...                                       # run the block at window.large, step the optimiser of the logits
        if window.observe(p_large, grad):         # the window may have moved: set both logits to 0 (p_L = 1/2)
            ...
        width = window.final()                    # when the search ends

    Args:
        grid: possible widths, positive, rising. One width is allowed: then nothing ever moves.
        rule: ``averaged`` or ``ema`` (see the module).
        options: settings of the rule, see `AveragedRule` and `EmaRule`.

    Raises:
        SpecError: the grid is empty or does not rise.
        UnknownNameError: no such rule.
    """

    def __init__(self, grid: Sequence[int], rule: RuleName = "averaged", **options: Any) -> None:
        self.grid = tuple(int(w) for w in grid)
        if not self.grid or self.grid[0] < 1 or any(a >= b for a, b in zip(self.grid, self.grid[1:], strict=False)):
            raise SpecError(f"a grid of widths must be positive and rising, with one width at least; got {self.grid}")
        if rule not in RULES:
            raise unknown_name("window rule", rule, RULES)
        self.rule = rule
        self._rule = RULES[rule](self.grid, **options) if len(self.grid) > 1 else None

    @property
    def small(self) -> int:
        """d_S, in channels."""
        return self.grid[self._rule.low if self._rule else 0]

    @property
    def large(self) -> int:
        """d_L, in channels: the width that is executed."""
        return self.grid[self._rule.high if self._rule else 0]

    @property
    def converged(self) -> bool:
        """Whether the two widths are neighbours on the grid (or the grid has one width)."""
        return self._rule is None or self._rule.high - self._rule.low == 1

    def observe(self, p_large: float, grad: float | None = None) -> bool:
        """Take in one architecture step of this block; call it after every step.

        Args:
            p_large: p_L, the softmax (without Gumbel noise) of the logits after the step.
            grad: gradient of the loss by (logit_L − logit_S), as the step used it: the gradient of logit_L alone, since
                that of logit_S is its negative. Any scale. Without it the rule reads the steps of p_L, which an
                optimiser with momentum blurs.

        Returns:
            Whether a decision period ended: the window may have moved, and the caller must set p_L back to ½.

        Raises:
            TrainingError: p_L is not a probability, or the gradient is not finite.
        """
        if not 0.0 <= p_large <= 1.0 or (grad is not None and not math.isfinite(grad)):
            raise TrainingError(
                f"the architecture step of a width gave p_L = {p_large} and gradient {grad}; expected a probability "
                "and a finite number. The loss or the logits diverged: lower the architecture learning rate."
            )
        return self._rule is not None and self._rule.observe(p_large, grad)

    def final(self) -> int:
        """The chosen width. By ``averaged`` it may lie outside the window in use (see `narrow`)."""
        return self.grid[self._rule.choose() if self._rule else 0]

    def narrow(self) -> None:
        """Set the window to the chosen width and a neighbour, so that what runs last is what is kept.

        The window starts anew from there, one grid step wide; what was learnt stays. Reset the logits afterwards.
        """
        if self._rule is None:
            return
        index = self._rule.choose()
        other = index + 1 if index < len(self.grid) - 1 else index - 1
        self._rule.low, self._rule.high = min(index, other), max(index, other)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `observe` changes, as plain JSON data; a loaded window continues exactly."""
        state = {name: getattr(self._rule, name) for name in self._rule.STATE} if self._rule else {}
        return {"rule": self.rule, "grid": list(self.grid), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s data.

        Raises:
            CheckpointError: the state belongs to another grid or rule, or lacks a field.
        """
        if state.get("rule") != self.rule or list(state.get("grid", ())) != list(self.grid):
            raise CheckpointError(
                f"the saved window has rule {state.get('rule')!r} and grid {state.get('grid')}, this one "
                f"{self.rule!r} and {list(self.grid)}; resume with the search space and settings of the saved run"
            )
        if self._rule is None:
            return
        missing = [name for name in self._rule.STATE if name not in state]
        if missing:
            raise CheckpointError(f"the saved window lacks {', '.join(missing)}; it was written by another version")
        for name in self._rule.STATE:
            setattr(self._rule, name, state[name])


def nearest_index(values: Sequence[float], value: float) -> int:
    """Index of the entry of the rising ``values`` that is nearest to ``value`` (the upper one of two as near)."""
    i = bisect_left(values, value)
    if i == 0 or i == len(values):
        return min(i, len(values) - 1)
    return i if values[i] - value <= value - values[i - 1] else i - 1
