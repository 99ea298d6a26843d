"""How near to the best width a Prunode's window gets, on synthetic problems with a known answer.

    python benchmarks/prunode_convergence.py [--json F] [--quick] [--problems 1000] [--seed 0]

Problem: 4 … 64 widths, a concave benefit (power, logarithm or saturating exponential, random shape), a linear cost; the
best width lies anywhere, one time in five at an end. gain = benefit − cost; achievable = gain(best) − gain(worst).
Random scale of the loss over four decades: the rules must not depend on it.

The architecture parameter is trained as in the super-network: two logits, a Gumbel-softmax p (temperature from 5 down
to 0.5, exponentially), loss = −(p_L·gain(d_L) + p_S·gain(d_S)), Adam (learning rate 0.05, betas 0.5 and 0.999), one
`observe` a step, both logits set to 0 whenever a period ends.

``noise`` n: Gaussian noise of every step's gradient by the logits, of standard deviation n × achievable at p = ½ and
temperature 1. The noise arises in the network and reaches the logits through the same p_L·p_S / temperature as the
signal, so it is 4n × achievable on the gradient by p_L. With ``where = probability`` it is n × achievable
there, an easier problem.

``drift``: the cost's price moves, and the best width with it by up to 0.3 of the grid, over the first 80% of the run,
while the gradients shrink tenfold; the regret is that at the end.

Regret = (gain(best) − gain(chosen)) / achievable. ``width``: mean executed d_L / d_max, what the search pays for.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.supernet.window import WidthWindow

SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
TAU_FIRST, TAU_LAST, LEARNING_RATE, BETAS = 5.0, 0.5, 0.05, (0.5, 0.999)
CASES: tuple[dict[str, Any], ...] = (
    {"noise": 0.0},
    {"noise": 0.1},
    {"noise": 0.5},
    {"noise": 0.1, "where": "probability"},
    {"noise": 0.5, "where": "probability"},
    {"noise": 0.1, "drift": True},
    {"noise": 0.1, "grads": False},
    {"noise": 0.0, "steps": 500},
    {"noise": 0.1, "steps": 500},
    {"noise": 0.5, "steps": 500},
    {"noise": 0.1, "steps": 150},
)


@dataclass(frozen=True)
class Problems:
    """P problems: numbers of widths (P,), benefits (P, 64; NaN behind the grid), widths / d_max, prices, scales."""

    sizes: np.ndarray
    benefit: np.ndarray
    width: np.ndarray
    price_first: np.ndarray
    price_last: np.ndarray
    scale: np.ndarray

    def gain(self) -> np.ndarray:
        """Gains (P, 64) at the end of the run."""
        return self.benefit - self.price_last[:, None] * self.width


def make_problems(count: int, seed: int, drift: bool) -> Problems:
    """Draw ``count`` problems."""
    rng = np.random.default_rng(seed)
    sizes, family = rng.choice(SIZES, count), rng.integers(0, 3, count)
    shapes = [rng.uniform(0.1, 0.9, count), 10 ** rng.uniform(0, 2, count), rng.uniform(1, 8, count)]
    a = np.choose(family, shapes)
    width = (np.arange(max(SIZES))[None] + 1) / sizes[:, None]
    x, col = np.minimum(width, 1.0), a[:, None]
    value = np.choose(family[:, None], [x**col, np.log1p(col * x), 1 - np.exp(-col * x)])
    benefit = np.where(width <= 1.0, value, np.nan)
    slope = partial(_benefit_slope, family=family, a=a)
    lowest = 1 / sizes
    best = rng.uniform(lowest, 1.0)
    end = rng.integers(0, 10, count)  # 0: best at the lowest width, 1: at the highest, else at `best`
    low, high = slope(lowest) * rng.uniform(1, 2, count), slope(np.ones(count)) * rng.uniform(0, 1, count)
    price = np.select([end == 0, end == 1], [low, high], slope(best))
    moved = np.clip(best + rng.uniform(-0.3, 0.3, count), lowest, 1.0)
    last = slope(moved) if drift else price
    return Problems(sizes, benefit, width, price, last, 10 ** rng.uniform(-3, 1, count))


def _benefit_slope(x: np.ndarray, family: np.ndarray, a: np.ndarray) -> np.ndarray:
    return np.choose(family, [a * x ** (a - 1), a / (1 + a * x), a * np.exp(-a * x)])


def search(
    problems: Problems, rule: str, noise: float, steps: int, seed: int, where: str, drift: bool, grads: bool
) -> tuple[np.ndarray, float]:
    """Run one window per problem; returns the regrets (P,) and the mean executed width."""
    rng = np.random.default_rng(seed)
    rows = np.arange(len(problems.sizes))
    windows = [WidthWindow(range(1, int(n) + 1), rule=rule) for n in problems.sizes]  # type: ignore[arg-type]
    small = np.array([w.small for w in windows]) - 1
    large = np.array([w.large for w in windows]) - 1
    gain = problems.gain()
    best, worst = np.nanmax(gain, 1), np.nanmin(gain, 1)
    std = noise * (best - worst) * (4 if where == "logit" else 1)
    logit, first, second = (np.zeros(len(rows)) for _ in range(3))  # logit_L − logit_S, Adam's moments
    executed = 0.0
    for t in range(steps):
        done = t / steps
        tau = TAU_FIRST * (TAU_LAST / TAU_FIRST) ** done
        uniform = rng.uniform(1e-9, 1 - 1e-9, len(rows))  # the difference of two Gumbel variables is logistic
        p = 1 / (1 + np.exp(-(logit + np.log(uniform / (1 - uniform))) / tau))
        price = problems.price_first + (problems.price_last - problems.price_first) * min(1.0, done / 0.8)
        more = problems.benefit[rows, large] - problems.benefit[rows, small] - price * (large - small) / problems.sizes
        grad = -(more + std * rng.standard_normal(len(rows))) * problems.scale * p * (1 - p) / tau
        if drift:
            grad *= 0.1**done
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad**2
        unit = first / (1 - BETAS[0] ** (t + 1)) / (np.sqrt(second / (1 - BETAS[1] ** (t + 1))) + 1e-8)
        logit -= 2 * LEARNING_RATE * unit  # logit_L goes down by one step, logit_S up by one
        executed += float(((large + 1) / problems.sizes).mean())
        p_large, signal = (1 / (1 + np.exp(-logit))).tolist(), grad.tolist()
        for i, window in enumerate(windows):
            if window.observe(p_large[i], signal[i] if grads else None):
                logit[i], small[i], large[i] = 0.0, window.small - 1, window.large - 1
    chosen = np.array([w.final() for w in windows]) - 1
    return (best - gain[rows, chosen]) / (best - worst), executed / steps


def row(rule: str, case: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
    """One row of the table."""
    setting = {"noise": 0.0, "where": "logit", "steps": 1500, "drift": False, "grads": True, **case}
    start = time.perf_counter()
    regret, width = search(make_problems(count, seed, setting["drift"]), rule, seed=seed + 1, **setting)
    return {
        "rule": rule,
        **setting,
        "problems": count,
        "regret_mean": float(regret.mean()),
        "regret_p90": float(np.quantile(regret, 0.9)),
        "regret_worst": float(regret.max()),
        "width": width,
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(count: int, seed: int, quick: bool = False) -> list[dict[str, Any]]:
    """All rows: both rules on every case (``quick``: the first three)."""
    return [row(rule, case, count, seed) for case in (CASES[:3] if quick else CASES) for rule in ("ema", "averaged")]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"Prunode windows, {rows[0]['problems']} problems; regret in % of the achievable gain")
    for name in ("rule", "noise", "on", "steps", "problem", "signal", "mean", "p90", "worst", "width"):
        table.add_column(name, justify="left" if name in ("rule", "on", "problem", "signal") else "right")
    for r in rows:
        table.add_row(
            r["rule"], f"{r['noise']:g}", r["where"], str(r["steps"]), "drift" if r["drift"] else "fixed",
            "gradient" if r["grads"] else "p_L", *(f"{100 * r[f'regret_{k}']:.2f}" for k in ("mean", "p90", "worst")),
            f"{r['width']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Regret of the rules that move a Prunode's window.")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="the first three cases, 200 problems")
    parser.add_argument("--problems", type=int, help="default 1000 (200 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and the noise")
    args = parser.parse_args()
    count = args.problems or (200 if args.quick else 1000)
    rows = run(count, args.seed, args.quick)
    if args.json:
        write_json(args.json, rows)
    show(rows)


if __name__ == "__main__":
    main()
