"""DDPNAS against random search on tables of accuracies in which the best network is known.

    python benchmarks/ddpnas_tabular.py [--json F] [--quick] [--seeds 50] [--first-seed 0]

Table: 8 layers × 3 choices, all 6,561 networks. Each choice has a cost (a layer's base of 0.5 … 2, times a step of
1.2 … 2 from one choice to the next) and a main effect of standard deviation 1 point, half of whose variance follows the
choice's rank in cost (dearer is better) and half is chance. Each pair of choices of two layers has an interaction of
standard deviation 0.3 points (the *hard* tables: 0.6). The best network has 94%; the worst 75% on average (hard: 68%).

Noise: normal, half a point of standard deviation, anew for every evaluation. Random search evaluates as many different
networks, drawn uniformly (under a budget: of those that fit), and takes the one that looked best. Budget: the cost
that half, or a fifth, of the networks do not exceed. ``credit`` is the argument of `DDPNASearch`: 'sample' is the
published one, 'adjusted' is ours and the default.

Rank: how many networks (that fit) are at least as good as the result by the true table, in % of them; 0.02 is the best
of 6,561. Every row is a mean over seeds; a seed is a table, its noise and its draws. ``ratio``: mean rank of DDPNAS
over that of random search. ``wins``: share of the seeds in which DDPNAS ranks better (ties count half).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.search.ddpnas import DDPNASearch

LAYERS, CHOICES, TOP = 8, 3, 94.0
NETWORKS = np.array(list(itertools.product(range(CHOICES), repeat=LAYERS)))
_PLACE = CHOICES ** np.arange(LAYERS - 1, -1, -1)
MAIN, INTERACTION, HARD = 1.0, 0.3, 0.6  # standard deviations in points
CASES: tuple[dict[str, Any], ...] = tuple(
    {"noise": noise, "share": share, "interaction": interaction, "update": update, "credit": credit}
    for interaction, share, update in (
        (INTERACTION, None, "first"),
        (INTERACTION, 0.5, "first"),
        (INTERACTION, 0.2, "first"),
        (INTERACTION, None, "momentum"),
        (HARD, None, "first"),
        (HARD, 0.5, "first"),
    )
    for credit in ("adjusted", "sample")
    for noise in (0.0, 0.5)
)


@dataclass(frozen=True)
class Problem:
    """``accuracy``: in % of each of `NETWORKS`; ``cost``: of each network; ``costs``: (layers, choices)."""

    accuracy: np.ndarray
    cost: np.ndarray
    costs: np.ndarray

    def evaluator(self, noise: float, seed: int) -> Callable[[Sequence[int]], float]:
        """Accuracy as a fraction, with noise (points) that depends on seed and on how many were evaluated."""
        rng = np.random.default_rng([seed, 1])
        return lambda net: float(np.clip(self.accuracy[index(net)] + noise * rng.standard_normal(), 0, 100)) / 100


def index(net: Sequence[int]) -> int:
    """Row of a network in `NETWORKS`."""
    return int(np.dot(net, _PLACE))


def make_problem(seed: int, interaction: float) -> Problem:
    """Draw a table."""
    rng = np.random.default_rng([seed, 0])
    steps = np.cumprod(rng.uniform(1.2, 2.0, (LAYERS, CHOICES - 1)), 1)
    costs = rng.uniform(0.5, 2.0, (LAYERS, 1)) * np.concatenate([np.ones((LAYERS, 1)), steps], 1)
    rank = (np.arange(CHOICES) - (CHOICES - 1) / 2) / np.arange(CHOICES).std()
    main = MAIN * np.sqrt(0.5) * (rank[None] + rng.standard_normal((LAYERS, CHOICES)))
    value = main[np.arange(LAYERS), NETWORKS].sum(1)
    for a, b in itertools.combinations(range(LAYERS), 2):
        value += rng.normal(0, interaction, (CHOICES, CHOICES))[NETWORKS[:, a], NETWORKS[:, b]]
    cost = costs[np.arange(LAYERS), NETWORKS].sum(1)
    return Problem(TOP + value - value.max(), cost, costs)


def ranks(
    seed: int, passes: int, noise: float, share: float | None, interaction: float, update: str, credit: str
) -> dict[str, Any]:
    """Ranks (shares of the networks that fit) of what both methods find, and what DDPNAS evaluated."""
    problem = make_problem(seed, interaction)
    budget = None if share is None else float(np.quantile(problem.cost, share))
    fits = np.full(len(NETWORKS), True) if budget is None else problem.cost <= budget
    fitting = np.flatnonzero(fits)

    def rank(net: Sequence[int]) -> float:
        return float((problem.accuracy[fitting] >= problem.accuracy[index(net)]).mean())

    search = DDPNASearch(
        [range(CHOICES)] * LAYERS, passes, update, seed=seed, budget=budget, cost=problem.costs.tolist(),
        credit=credit,
    )  # type: ignore[arg-type]  # fmt: skip
    found = search.run(problem.evaluator(noise, seed))
    over = sum(not fits[index(net)] for net in (found, *(e.picks for e in search.evaluated)))
    evaluate = problem.evaluator(noise, seed)
    drawn = np.random.default_rng([seed, 2]).choice(fitting, len(search.evaluated), replace=False)
    best = max(drawn, key=lambda i: evaluate(NETWORKS[i]))
    return {
        "ddpnas": rank(found), "random": rank(NETWORKS[best]), "evaluations": len(search.evaluated),
        "over_budget": over, "fitting": len(fitting), "worst": float(problem.accuracy.min()),
    }  # fmt: skip


def row(case: dict[str, Any], passes: int, seeds: Sequence[int]) -> dict[str, Any]:
    """One row of the table: means over seeds."""
    start = time.perf_counter()
    rows = [ranks(seed, passes, **case) for seed in seeds]
    ours, other = (np.array([r[name] for r in rows]) for name in ("ddpnas", "random"))
    return {
        **case,
        "passes": passes,
        "seeds": len(rows),
        "evaluations": float(np.mean([r["evaluations"] for r in rows])),
        "networks_that_fit": float(np.mean([r["fitting"] for r in rows])),
        "rank_mean": float(ours.mean()),
        "rank_median": float(np.median(ours)),
        "rank_standard_error": float(ours.std(ddof=1) / np.sqrt(len(ours))) if len(ours) > 1 else 0.0,
        "random_mean": float(other.mean()),
        "random_median": float(np.median(other)),
        "ratio": float(ours.mean() / other.mean()),
        "wins": float(((ours < other) + 0.5 * (ours == other)).mean()),
        "over_budget": int(sum(r["over_budget"] for r in rows)),
        "lowest_accuracy": float(np.mean([r["worst"] for r in rows])),
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(seeds: Sequence[int], quick: bool = False) -> list[dict[str, Any]]:
    """All rows (``quick``: the first four cases)."""
    return [row(case, passes, seeds) for case in (CASES[:4] if quick else CASES) for passes in (3, 10)]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"DDPNAS, {len(NETWORKS):,} networks a table, {rows[0]['seeds']} tables; ranks in %")
    for name in ("interactions", "fit", "noise", "update", "credit", "T", "evaluations", "mean", "median",
                 "random: mean", "median", "ratio", "wins", "over budget"):  # fmt: skip
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            f"{r['interaction']:g}", "all" if r["share"] is None else f"{r['share']:.0%}", f"{r['noise']:g}",
            r["update"], r["credit"], str(r["passes"]), f"{r['evaluations']:.1f}",
            *(f"{100 * r[k]:.2f}" for k in ("rank_mean", "rank_median", "random_mean", "random_median")),
            f"{r['ratio']:.2f}", f"{r['wins']:.2f}", str(r["over_budget"]),
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rank of DDPNAS's result among all networks of a table.")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="four cases, 10 seeds")
    parser.add_argument("--seeds", type=int, help="how many; default 50 (10 with --quick)")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    count = args.seeds or (10 if args.quick else 50)
    rows = run(range(args.first_seed, args.first_seed + count), args.quick)
    if args.json:
        write_json(args.json, rows)
    show(rows)


if __name__ == "__main__":
    main()
