"""Do searches hit their latency targets? Ten searches, targets spread over a space, measured anew when all are done.

    python benchmarks/search_targets.py [--json F] [--quick] [--count 10] [--epochs 8] [--config CONFIG] [--table FILE]
                                        [--work-dir D] [--seed N]

Measures a latency table (unless one is given), runs ``tools/search.py`` for targets that are spaced geometrically from
1.1 times the fastest to 0.9 times the slowest network of the space, and then measures all networks in turn in a new
process: ``measured_ms``. What a search itself accepted stands beside it as ``accepted_ms``. One target is also
searched for twice with ``--verify 0``: the same seed must give the same network. Run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.latency import QUICK, LatencyTable, build_table, measure_together, progress_bar
from prunet_zoo.mm.cli import load_config
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space
from prunet_zoo.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "search" / "tiered_prunet-cpu-small_digits.py"
COLUMNS = ("target_ms", "predicted_ms", "accepted_ms", "measured_ms", "error", "tries", "within", "status")


def run_search(args: argparse.Namespace, target: float, out: Path, *more: str) -> dict[str, Any]:
    """Run the tool, or go on with it; returns its report."""
    command = [sys.executable, str(ROOT / "tools" / "search.py"), str(args.config), "--work-dir", str(out), "--resume"]
    command += ["--target-ms", f"{target:.6g}", "--table", str(args.table), "--seed", str(args.seed), *more]
    command += ["--cfg-options", f"train_cfg.max_epochs={args.epochs}", f"param_scheduler.T_max={args.epochs}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny networks: a second thread only waits
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"the search for {target:.6g} ms failed:\n{done.stderr[-2000:]}")
    return dict(json.loads((out / "report.json").read_text(encoding="utf-8")))


def spread(low: float, high: float, count: int) -> list[float]:
    """``count`` targets from 1.1·low to 0.9·high ms in geometric steps, four digits each."""
    first, last = 1.1 * low, 0.9 * high
    return [float(f"{first * (last / first) ** (i / max(1, count - 1)):.4g}") for i in range(count)]


def measure_anew(specs: list[Path], table: LatencyTable) -> list[dict[str, Any]]:
    """Records of the networks, measured in turn in a process that has done nothing else."""
    names = ("backend", "batch", "threads", "dtype", "accelerator", "memory_format")
    setting = {k: v for k, v in table.describe().items() if k in names}
    command = [sys.executable, __file__, "--measure", json.dumps(setting), *map(str, specs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit("the networks could not be measured, see above")
    return list(json.loads(done.stdout))


def make_row(target: float, report: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The figures of one search."""
    measured = record["median_ms"]
    return {
        "target_ms": target,
        "predicted_ms": round(report["predicted"], 5),
        "accepted_ms": round(report["measured"]["median_ms"], 5),
        "measured_ms": round(measured, 5),
        "ci_ms": [round(record["ci_low_ms"], 5), round(record["ci_high_ms"], 5)],
        "error": round(measured / target - 1, 4),
        "within": 0.95 * target < measured <= target,
        "tries": report["tries"],
        "status": report["status"],
        "disturbed": list(record["disturbed"]),
        **{key: report[key] for key in ("spec_hash", "seed")},
        **{key: record[key] for key in ("device", "backend", "backend_version", "threads", "date")},
    }


def show(rows: list[dict[str, Any]], same: bool | None) -> None:
    """Print the table."""
    first = rows[0]
    shown = Table(title=f"{first['device']}, {first['backend']}, {first['threads']} thread(s); {first['date'][:10]}")
    for column in COLUMNS:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*(str(row[c]) if c != "error" else f"{row[c]:+.1%}" for c in COLUMNS))
    console = Console(width=120)
    console.print(shown)
    hits, disturbed = sum(row["within"] for row in rows), sum(bool(row["disturbed"]) for row in rows)
    told = f"; {disturbed} of these measurements were disturbed" if disturbed else ""
    console.print(f"measured in (0.95 T, 1.00 T]: {hits} of {len(rows)}{told}", highlight=False)
    if same is not None:
        console.print(f"same seed, --verify 0: same network: {same}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="3 targets, 2 epochs a search, a rough table")
    parser.add_argument("--count", type=int, help="number of targets (default: 10)")
    parser.add_argument("--epochs", type=int, help="epochs of a search (default: 8)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the searches")
    parser.add_argument("--table", type=Path, help="latency table; default: measured first")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/search_targets"), help="keep the searches here"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", metavar="SETTING", help=argparse.SUPPRESS)
    parser.add_argument("specs", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        specs = [load_spec(path) for path in args.specs]
        taken = measure_together(specs, **json.loads(args.measure), seconds=2.0)
        print(json.dumps([record.to_dict() for record in taken]))
        return
    args.count = args.count or (3 if args.quick else 10)
    args.epochs = args.epochs or (2 if args.quick else 8)
    out, space = args.work_dir, load_space(load_config(args.config).model.space)
    if args.table:
        table = LatencyTable.load(args.table)
    else:
        args.table = out / "latency_table.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar("latency table") as progress:
            effort = QUICK if args.quick else None
            table = build_table(space, args.table, effort=effort, progress=progress)
    (low, _), (high, _) = cost_range(table, space)
    targets = spread(low, high, args.count)
    reports = []
    for i, target in enumerate(targets):
        reports.append(run_search(args, target, out / f"{i:02d}"))
        print(f"{i + 1} of {len(targets)}: {reports[-1]['status']}", file=sys.stderr)
    same = None
    if not args.quick:
        middle = targets[len(targets) // 2]
        twice = [run_search(args, middle, out / f"again_{k}", "--verify", "0")["spec_hash"] for k in (1, 2)]
        same = twice[0] == twice[1]
    records = measure_anew([out / f"{i:02d}" / "spec.json" for i in range(len(targets))], table)
    rows = [make_row(*three) for three in zip(targets, reports, records, strict=True)]
    show(rows, same)
    if args.json:
        about = {"space": space.name, "epochs": args.epochs, "same_seed_same_network": same}
        write_json(args.json, {"targets": rows, **about})


if __name__ == "__main__":
    main()
