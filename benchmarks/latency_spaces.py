"""Latency tables against measured networks: every shipped search space, on ONNX Runtime and torch, one CPU thread.

    python benchmarks/latency_spaces.py [--work-dir D] [--json F] [--png F] [--default-build] [--quick]

For each space and backend

1. every block is measured at every width, with 16 whole networks for the correction;
2. 50 random networks of all sizes and 25 drawn uniformly (`SearchSpace.sample`: middling ones, so that their order is
   harder to tell) are measured, in three passes some time apart with sessions of their own; the figure is the
   mean of the two lower medians, since what disturbs only slows;
3. from the full table three are taken: ``full``, every width; ``shipped``, the widths that `Effort()` would have
   measured; ``quarter``, a quarter of the widths of every grid, evenly spread. Each gets its own correction, fitted on
   the 16 networks, and predicts the measured ones.

So ``shipped`` are widths of the full build, not a build of its own; where no grid is larger than `Effort.all_widths`
(prunet_cpu_small) it is the full table. ``--default-build`` makes and checks the table of a user instead. Tables and
records are kept in ``--work-dir``; the same command goes on.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.latency import QUICK, Effort, LatencyTable, Record, build_table, measure_together, progress_bar
from prunet_zoo.latency.correction import fit_correction
from prunet_zoo.latency.plan import Template, finer_widths, first_widths, list_templates, plan_networks
from prunet_zoo.latency.predictions import kendall
from prunet_zoo.latency.record import append_record, now, read_records
from prunet_zoo.latency.table import find_quantum
from prunet_zoo.space import Encoding, SearchSpace, list_spaces, load_space

BACKENDS = ("onnxruntime", "torch")
SPACES = [name for name in list_spaces() if load_space(name).additive]  # a table is of such a space
PASSES = 3
SEED = 7  # the tables' own networks are of seed 0
FULL = Effort(all_widths=1_000_000)

Points = dict[int, float]  # latency in ms by width


def every_width(templates: list[Template], full: dict[str, Points]) -> dict[str, Points]:
    """All that is measured."""
    return {t.key: dict(full[t.key]) for t in templates}


def shipped_widths(templates: list[Template], full: dict[str, Points]) -> dict[str, Points]:
    """What `build_table` would have measured with `Effort()`: a few widths first, then finer where it is needed."""
    known = {t.key: {w: full[t.key][w] for w in first_widths(t.grid, Effort())} for t in templates}
    while True:
        quantum = find_quantum(known.values())
        wanted = {t.key: finer_widths(t.grid, known[t.key], Effort(), quantum) for t in templates}
        if not any(wanted.values()):
            return known
        for key, widths in wanted.items():
            known[key].update({w: full[key][w] for w in widths})


def quarter_of_widths(templates: list[Template], full: dict[str, Points]) -> dict[str, Points]:
    """A quarter of each grid, evenly spread, both ends included."""
    found = {}
    for t in templates:
        count = min(len(t.grid), max(2, -(-len(t.grid) // 4)))
        widths = first_widths(t.grid, Effort(all_widths=0, first_widths=count)) if count > 1 else t.grid
        found[t.key] = {w: full[t.key][w] for w in widths}
    return found


Choose = Callable[[list[Template], dict[str, Points]], dict[str, Points]]
TABLES: dict[str, Choose] = {"full": every_width, "shipped": shipped_widths, "quarter": quarter_of_widths}


def thin(table: LatencyTable, choose: Choose) -> LatencyTable:
    """The table with some of its widths, corrected on the same networks."""
    kept = LatencyTable(table.header, [], table.path)
    kept.points = choose(list_templates(table.space), table.points)
    kept.parts, kept.networks = dict(table.parts), dict(table.networks)
    kept.correction = fit_correction([kept.parts_of(encoding, ms) for encoding, ms in kept.networks.items()])
    return kept


def draw_networks(space: SearchSpace, table: LatencyTable, count: int) -> dict[str, list[Encoding]]:
    """Networks that the table was not corrected on, by the way that they are drawn."""
    rng = random.Random(SEED)
    sizes = [e for e in plan_networks(space, count + 2, seed=SEED)[2:] if e not in table.networks]
    return {"sizes": sizes, "uniform": [space.sample(rng) for _ in range(count // 2)]}


def measure_often(
    space: SearchSpace, backend: str, encodings: Sequence[Encoding], seconds: float, log: Path
) -> list[list[Record]]:
    """Records of each network, one a pass; what ``log`` holds is not measured again."""
    have: dict[str, list[Record]] = {}
    for record in read_records(log) if log.is_file() else []:
        have.setdefault(record.spec_hash, []).append(record)
    specs = [space.decode(encoding) for encoding in encodings]
    with progress_bar(f"{space.name}, {backend}: networks") as progress:
        for number in range(PASSES):
            lacking = list({s.hash: s for s in specs if len(have.get(s.hash, [])) <= number}.values())
            made = measure_together(
                lacking, backend, seconds=seconds, attempts=1, progress=progress,
                keep=lambda record: append_record(log, record),
            )  # fmt: skip
            for record in made:
                have.setdefault(record.spec_hash, []).append(record)
    return [have[spec.hash][:PASSES] for spec in specs]


def compare(table: LatencyTable, space: SearchSpace, encodings: Sequence[Encoding], ms: np.ndarray) -> dict[str, Any]:
    """How well a table predicts measured networks."""
    predicted = np.array([table(space.decode(encoding)) for encoding in encodings])
    errors = predicted / ms - 1
    return {
        "n": len(errors),
        "within5": float((abs(errors) <= 0.05).mean()),
        "within10": float((abs(errors) <= 0.10).mean()),
        "tau": kendall(predicted, ms),
        "mean_abs": float(abs(errors).mean()),
        "worst": float(abs(errors).max()),
        "bias": float(errors.mean()),
        "predicted_ms": [round(float(p), 5) for p in predicted],
    }


def examine(space: SearchSpace, backend: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All figures of one space on one backend."""
    effort = replace(QUICK, all_widths=FULL.all_widths) if args.quick else Effort() if args.default_build else FULL
    tables = {"shipped": every_width} if args.default_build else TABLES
    with progress_bar(f"{space.name}, {backend}: table") as progress:
        path = out / f"{space.name}_{backend}.jsonl"
        table = build_table(space, path, backend, effort=effort, progress=progress)
    drawn = draw_networks(space, table, 8 if args.quick else args.networks)
    encodings = [encoding for some in drawn.values() for encoding in some]
    seconds = 0.1 if args.quick else args.seconds
    pairs = measure_often(space, backend, encodings, seconds, out / f"{space.name}_{backend}_networks.jsonl")
    medians = np.sort([[record.median_ms for record in records] for records in pairs], axis=1)
    figures = medians[:, :2].mean(axis=1)
    result: dict[str, Any] = {"device": table.header.device, "backend_version": table.header.backend_version}
    apart = medians[:, 1] / medians[:, 0] - 1
    result["repeat"] = {
        "mean_abs": float(apart.mean()),
        "worst": float(apart.max()),
    }
    result["disturbed"] = sum(any(r.disturbed for r in records) for records in pairs)
    begin = 0
    for kind, some in drawn.items():
        ms = figures[begin : begin + len(some)]
        begin += len(some)
        result[kind] = {"measured_ms": [round(float(m), 5) for m in ms]}
        for name, choose in tables.items():
            thinned = thin(table, choose)
            result[kind][name] = compare(thinned, space, some, ms)
            result[kind][name]["blocks"] = sum(len(points) for points in thinned.points.values())
        if "full" in tables:
            result[kind]["quarter_to_full"] = result[kind]["quarter"]["mean_abs"] / result[kind]["full"]["mean_abs"]
    return result


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the figures."""
    shown = Table(
        "space", "backend", "networks", "table", "blocks", "within 5%", "within 10%", "mean error", "worst", "τ",
        title="table against measured",
    )  # fmt: skip
    for space, backends in rows.items():
        for backend, result in backends.items():
            for kind in ("sizes", "uniform"):
                for name in [name for name in TABLES if name in result[kind]]:
                    row = result[kind][name]
                    shown.add_row(
                        space, backend, f"{row['n']} {kind}", name, str(row["blocks"]), f"{row['within5']:.0%}",
                        f"{row['within10']:.0%}", f"{row['mean_abs']:.2%}", f"{row['worst']:.1%}", f"{row['tau']:.4f}",
                    )  # fmt: skip
    console = Console(width=130)
    console.print(shown)
    for space, backends in rows.items():
        for backend, result in backends.items():
            repeat = result["repeat"]
            ratios = [
                f"{result[kind]['quarter_to_full']:.2f} ({kind})"
                for kind in ("sizes", "uniform")
                if "quarter_to_full" in result[kind]
            ]
            console.print(
                f"{space}, {backend}: the two lower of three passes differ by {repeat['mean_abs']:.2%} "
                f"(worst {repeat['worst']:.1%}), {result['disturbed']} networks marked as disturbed; quarter / full "
                f"error: {', '.join(ratios) or 'no full table'}",
                highlight=False,
            )


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Predicted over measured, one panel a space and backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    panels = [(space, backend, result) for space, backends in rows.items() for backend, result in backends.items()]
    fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.0), squeeze=False)
    for ax, (space, backend, result) in zip(axes[0], panels, strict=True):
        for kind, marker, color in (("sizes", "o", "#2a6f97"), ("uniform", "^", "#e07a5f")):
            ms, row = np.array(result[kind]["measured_ms"]), result[kind]["shipped"]
            label = f"{row['n']} {kind}: {row['mean_abs']:.1%}, τ {row['tau']:.3f}"
            ax.plot(ms, np.array(row["predicted_ms"]) / ms - 1, marker, color=color, ms=4, label=label, alpha=0.8)
        for bound in (0.05, 0.10):
            ax.axhspan(-bound, bound, color="#8d99ae", alpha=0.15, zorder=0)
        ax.axhline(0, color="#555555", lw=0.8)
        ax.set(xscale="log", ylim=(-0.16, 0.16), xlabel="measured, ms", title=f"{space}\n{backend}, 1 thread")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("predicted by the table / measured - 1")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--png", type=Path, metavar="F", help="draw them")
    parser.add_argument("--work-dir", type=Path, metavar="D", help="tables and records; default: a temporary folder")
    parser.add_argument("--spaces", nargs="+", default=SPACES, metavar="NAME")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), metavar="NAME")
    parser.add_argument(
        "--networks", type=int, default=50, help="of all sizes, and half as many uniform ones (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="on each network and pass (default: %(default)s)")
    alone = "build the table as `build_table` does, instead of measuring every width"
    parser.add_argument("--default-build", action="store_true", help=alone)
    parser.add_argument("--quick", action="store_true", help="the smallest space, ONNX Runtime, 16 networks")
    args = parser.parse_args()
    if args.quick:
        args.spaces, args.backends = ["prunet_cpu_small"], ["onnxruntime"]
    torch.set_num_threads(1)
    out = args.work_dir or Path(tempfile.mkdtemp(prefix="latency_spaces_"))
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for name in args.spaces:
        for backend in args.backends:
            rows.setdefault(name, {})[backend] = examine(load_space(name), backend, args, out)
    show(rows)
    if args.json:
        write_json(
            args.json, {"command": "python benchmarks/latency_spaces.py --json F", "date": now(), "spaces": rows}
        )
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
