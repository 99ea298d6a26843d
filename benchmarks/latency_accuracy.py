"""Is latency right? Tables, repeated measurements, the predictor and searches against what is measured: four tables.

    python benchmarks/latency_accuracy.py [--json F] [--work-dir D] [--quick] [--only PART …]
    python benchmarks/latency_accuracy.py --from-results [--json F]

Runs, one after the other (nothing else should run on the machine):

spaces     benchmarks/latency_spaces.py      tables against 50 random networks of each space (about 20 minutes)
repeat     benchmarks/latency_repeat.py      40 networks measured twice beside another load (about 10 minutes)
published  benchmarks/latency_published.py   the predictor against published figures, each left out (seconds)
targets    benchmarks/search_targets.py      ten searches with targets spread over a space (about 15 minutes)

Each writes its own JSON into ``--work-dir`` and is not run again where the same command made it. ``--from-results``
runs nothing: it takes what `benchmarks/results` holds of the four scripts, run one by one. ``--json F`` writes
``{"spaces": {space: {backend: {"within5", "within10", "tau", "n", …}}}, "published": {column: {"mean_abs", "worst",
…}}, "targets": [{"target_ms", "measured_ms", …}], "repeat": {…}}``; the figures of ``spaces`` are those of tables
with the widths that `build_table` measures, on networks of all sizes; ``uniform`` beside them is on networks drawn
uniformly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.latency.record import now

FOLDER = Path(__file__).resolve().parent
KEPT = {
    "spaces": "latency_spaces.json",
    "repeat": "latency_repeat_load.json",
    "published": "latency_published.json",
    "targets": "search_targets.json",
}  # in benchmarks/results
FIGURES = ("within5", "within10", "tau", "n", "mean_abs", "worst")


def commands(out: Path, quick: bool) -> dict[str, list[str]]:
    """The command of each part, without the option that names its JSON."""
    short = ["--quick"] if quick else []
    return {
        "spaces": ["latency_spaces.py", "--work-dir", str(out / "spaces"), *short],
        "repeat": ["latency_repeat.py", "--load", *short],
        "published": ["latency_published.py", *short],
        "targets": ["search_targets.py", "--work-dir", str(out / "targets"), *(short or ["--count", "10"])],
    }


def run_part(name: str, command: list[str], out: Path) -> Any:
    """Run one benchmark, unless its result is there; returns its JSON."""
    result, told = out / f"{name}.json", out / f"{name}.command"
    asked = " ".join(command)
    if not (result.is_file() and told.is_file() and told.read_text(encoding="utf-8") == asked):
        print(f"\n== {name}: python benchmarks/{' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, str(FOLDER / command[0]), *command[1:], "--json", str(result)])
        if done.returncode:
            raise SystemExit(f"{command[0]} failed with status {done.returncode}; the same command goes on")
        write_atomic(told, asked)
    return json.loads(result.read_text(encoding="utf-8"))


def condense(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that decide, in the form that the module's docstring names."""
    dates = {name: part["date"] for name, part in found.items() if "date" in part}
    result: dict[str, Any] = {"date": now(), "parts": dates}
    if "spaces" in found:
        result["spaces"] = {
            space: {
                backend: {
                    **{key: row["sizes"]["shipped"][key] for key in FIGURES},
                    "uniform": {key: row["uniform"]["shipped"][key] for key in FIGURES},
                    "quarter_to_full": row["sizes"].get("quarter_to_full"),
                    "quarter_to_full_uniform": row["uniform"].get("quarter_to_full"),
                    "repeat": row["repeat"],
                    "device": row["device"],
                }
                for backend, row in backends.items()
            }
            for space, backends in found["spaces"]["spaces"].items()
        }
    if "published" in found:
        result["published"] = found["published"]["published"]
    if "targets" in found:
        result["targets"] = found["targets"]["targets"]
    if "repeat" in found:
        result["repeat"] = {key: value for key, value in found["repeat"].items() if key != "rows"}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--work-dir", type=Path, metavar="D", help="keep all results; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a minute or two each, to see that it runs")
    parts = ("spaces", "repeat", "published", "targets")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    kept = "run nothing: take the results of the four scripts that benchmarks/results holds"
    parser.add_argument("--from-results", action="store_true", help=kept)
    args = parser.parse_args()
    out = args.work_dir or Path(tempfile.mkdtemp(prefix="latency_accuracy_"))
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in [name for name in parts if name in args.only]:
        if args.from_results:
            found[name] = json.loads((FOLDER / "results" / KEPT[name]).read_text(encoding="utf-8"))
        else:
            found[name] = run_part(name, commands(out, args.quick)[name], out)
    figures = condense(found)
    for space, backends in figures.get("spaces", {}).items():
        for backend, row in backends.items():
            shares = f"{row['within10']:.0%} within 10%, {row['within5']:.0%} within 5%"
            print(f"{space}, {backend}: {shares}, τ {row['tau']:.3f}")
    for column, row in figures.get("published", {}).items():
        print(f"{column}: mean error {row['mean_abs']:.1%}, worst {row['worst']:.1%}")
    if "repeat" in figures:
        row = figures["repeat"]
        clean = "none" if row["unmarked_within2"] is None else f"{row['unmarked_within2']:.0%}"
        print(f"{row['n']} pairs beside another load: {row['marked']:.0%} marked; of the others within 2%: {clean}")
    for row in figures.get("targets", []):
        print(f"target {row['target_ms']:.4g} ms: measured {row['measured_ms'] / row['target_ms'] - 1:+.1%}")
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
