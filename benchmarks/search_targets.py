"""Do searches hit their latency targets? Two targets a factor 2 apart, and the first of them twice with the same seed.

    python benchmarks/search_targets.py [--json F] [--quick] [--config CONFIG] [--target-ms T] [--table FILE]

Runs ``tools/search.py`` for T, T again, and 2T with one latency table, then measures the networks in turn in one
process (the same disturbances hit all). Prints target, predicted and measured latency, the ratio of the two networks'
latencies, and whether the repeated search found the same network.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from prunet_zoo.files import write_json
from prunet_zoo.latency import LatencyTable, Record, build_table, measure
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space
from prunet_zoo.spec import NetSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "search" / "tiered_prunet-cpu-small_digits.py"
SPACE = "prunet_cpu_small"


def run_search(args: argparse.Namespace, table: Path, target: float, out: Path) -> NetSpec:
    """Run the tool and return the network that it found."""
    command = [sys.executable, str(ROOT / "tools" / "search.py"), str(args.config), "--work-dir", str(out), "--resume"]
    command += ["--target-ms", f"{target:.6g}", "--table", str(table), "--seed", str(args.seed)]
    if args.quick:
        command += ["--cfg-options", "train_cfg.max_epochs=4", "param_scheduler.T_max=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny networks: a second thread only waits
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"the search for {target:g} ms failed:\n{done.stderr[-2000:]}")
    return load_spec(out / "spec.json")


def measure_in_turn(networks: dict[str, NetSpec], rounds: int = 7) -> dict[str, Record]:
    """Measure networks in turn several times; each one's record of median latency."""
    taken: dict[str, list[Record]] = {name: [] for name in networks}
    for _ in range(rounds):
        for name, spec in networks.items():
            taken[name].append(measure(spec))
    return {name: sorted(rows, key=lambda r: r.median_ms)[rounds // 2] for name, rows in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="4 epochs a search")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--target-ms", type=float, help="T; default: a quarter of the way into the range")
    parser.add_argument("--table", type=Path, help="latency table; default: measured first")
    parser.add_argument("--work-dir", type=Path, help="keep the searches here; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.work_dir or Path(tempfile.mkdtemp(prefix="search_targets_"))
    path = args.table or out / "latency_table.jsonl"
    table = LatencyTable.load(path) if path.is_file() else build_table(load_space(SPACE), path)
    low, high = (cost for cost, _ in cost_range(table, load_space(SPACE)))
    target = args.target_ms or round(low + (high - low) / 4, 3)
    runs = {"T": target, "T again": target, "2T": 2 * target}
    found = {name: run_search(args, path, t, out / name.replace(" ", "_")) for name, t in runs.items()}
    records = measure_in_turn(found)
    rows = [
        {
            "run": name, "target_ms": runs[name], "predicted_ms": round(table(spec), 5),
            "measured_ms": round(records[name].median_ms, 5),
            "error": round(records[name].median_ms / runs[name] - 1, 4),
            "spec": spec.hash, "seed": args.seed, "device": records[name].device, "date": records[name].date,
        }
        for name, spec in found.items()
    ]  # fmt: skip
    ratio = records["2T"].median_ms / records["T"].median_ms
    shown = Table(title=f"{rows[0]['device']}, {records['T'].backend}, 1 thread; {datetime.date.today()}")
    for column in ("run", "target_ms", "predicted_ms", "measured_ms", "error", "spec"):
        shown.add_column(column)
    for row in rows:
        shown.add_row(*(str(row[c]) for c in ("run", "target_ms", "predicted_ms", "measured_ms", "error", "spec")))
    console = Console(width=110)
    console.print(shown)
    same = found["T"].hash == found["T again"].hash
    console.print(f"measured 2T / T: {ratio:.3f} (2 ± 10% wanted); same seed, same network: {same}", highlight=False)
    if args.json:
        write_json(args.json, {"rows": rows, "ratio": round(ratio, 4), "same_seed_same_network": same})


if __name__ == "__main__":
    main()
