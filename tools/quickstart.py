"""The whole way on built-in data: measure, search, train a classifier, train a detector with it, measure again.

    bash tools/quickstart.sh [--target-ms T] [--work-dir D] [--seed N] [--fresh]

It runs the same tools that you would (every command is printed), on scikit-learn's digit scans and on scenes made of
them, and ends with a table, a picture of detections and D/summary.json. A second call goes on where the first was
stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunet_zoo.errors import PrunetError
from prunet_zoo.files import write_json
from prunet_zoo.latency import LatencyTable
from prunet_zoo.mm.cli import run_tool
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space
from prunet_zoo.spec import load_spec

SPACE = "prunet_cpu_small"
ROOT = Path(__file__).resolve().parent.parent
SEARCH = "configs/search/tiered_prunet-cpu-small_digits.py"
CLASSIFY = "configs/classification/prunet-cpu-small_digits.py"
DETECT = "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"


class StageError(PrunetError, RuntimeError):
    """A stage of the quickstart ended with an error; its own message stands above."""


class Quickstart:
    """Runs the stages in order and keeps their seconds in ``stages.json``, so that a second call can add to them."""

    def __init__(self, work_dir: Path, seed: int) -> None:
        self.dir, self.seed, self.console = work_dir, seed, Console()
        self.timing_file = work_dir / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.timing_file.read_text()) if self.timing_file.is_file() else {}

    def run(self, stage: str, title: str, *command: str) -> str:
        """Run ``python tools/<command>`` and return its standard output where the stage captures it."""
        words = [str(word) for word in command]
        self.console.rule(title)
        self.console.print(f"$ python {shlex.join(words)}", style="dim", highlight=False, soft_wrap=True)
        start = time.perf_counter()
        capture = "--json" in words
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True
        )
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 1)
        write_json(self.timing_file, self.seconds)
        if done.returncode:
            raise StageError(
                f"stage '{stage}' ended with status {done.returncode}; mend what it says above, then run again"
            )
        return done.stdout or ""

    def summary(self, target: float) -> dict[str, Any]:
        """Collect what the stages left behind."""
        spec = load_spec(self.dir / "search" / "spec.json")
        measured = json.loads((self.dir / "measured.json").read_text())
        classifier = json.loads((self.dir / "classifier" / "metrics.json").read_text())
        detector = json.loads((self.dir / "detector" / "metrics.json").read_text())
        report = json.loads((self.dir / "search" / "report.json").read_text())
        return {
            "target_ms": target,
            "predicted_ms": report["predicted"],
            "measured_ms": measured["median_ms"],
            "top1": classifier["metrics"]["top1"],
            "map50": detector["metrics"]["coco/bbox_mAP_50"],
            "map": detector["metrics"]["coco/bbox_mAP"],
            "params": spec.params(),
            "macs": spec.macs(),
            "seconds": self.seconds,
            "device": measured["device"],
            "date": measured["date"],
            "seed": self.seed,
        }

    def show(self, summary: dict[str, Any], target_range: tuple[float, float]) -> None:
        """Print the table at the end."""
        table = Table(title=f"{summary['device']}, ONNX Runtime, 1 thread, batch 1", show_header=False)
        low, high = target_range
        error = 100 * (summary["measured_ms"] / summary["target_ms"] - 1)
        rows = [
            ("latency target", f"{summary['target_ms']:.4g} ms  (the space reaches {low:.3g} to {high:.3g})"),
            ("predicted by the table", f"{summary['predicted_ms']:.4g} ms"),
            ("measured", f"{summary['measured_ms']:.4g} ms  ({error:+.1f}% of the target)"),
            ("digits top-1, unseen scans", f"{summary['top1']:.2f} %"),
            ("digit scenes box mAP50 / mAP", f"{summary['map50']:.3f} / {summary['map']:.3f}"),
            ("parameters, MACs at 32 px", f"{summary['params']:,}, {summary['macs']:,}"),
            ("seconds by stage", ", ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items())),
        ]
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        for what, path in (
            ("search report", self.dir / "search" / "report.html"),
            ("detections", self.dir / "detections.png"),
            ("summary", self.dir / "summary.json"),
        ):
            self.console.print(f"{what}: {path}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = "latency budget; default: a third of the way from the fastest to the slowest network on this machine"
    parser.add_argument("--target-ms", type=float, metavar="T", help=budget)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "quickstart", metavar="D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier call left in D")
    args = parser.parse_args(argv)
    out = args.work_dir.resolve()
    if args.fresh and out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    quick, table_file = Quickstart(out, args.seed), out / "latency_table.jsonl"
    space = load_space(SPACE)

    quick.run(
        "table", "1/6  Latency table of this machine", "tools/latency.py", "table", SPACE, "--out", str(table_file)
    )
    table = LatencyTable.load(table_file)
    low, high = (cost for cost, _ in cost_range(table, space))
    target = args.target_ms if args.target_ms is not None else float(f"{low + (high - low) / 3:.2g}")
    seed = ("--seed", str(args.seed), "--resume")
    search, classifier, detector = out / "search", out / "classifier", out / "detector"
    quick.run("search", f"2/6  Search for {target:g} ms", "tools/search.py", SEARCH, "--target-ms", str(target),
              "--table", str(table_file), "--verify", "4", "--work-dir", str(search), *seed)  # fmt: skip
    spec = str(search / "spec.json")
    quick.run("classifier", "3/6  Train the network found as a classifier", "tools/train.py", CLASSIFY, "--arch", spec,
              "--weights", str(search / "weights.safetensors"), "--work-dir", str(classifier), *seed)  # fmt: skip
    quick.run("detector", "4/6  Train it as the backbone of a detector", "tools/train.py", DETECT, "--arch", spec,
              "--weights", str(classifier / "best.safetensors"), "--work-dir", str(detector), *seed)  # fmt: skip
    record = quick.run("measure", "5/6  Measure it", "tools/latency.py", "measure", spec, "--backend", "onnxruntime",
                       "--threads", "1", "--json")  # fmt: skip
    write_json(out / "measured.json", json.loads(record))
    quick.run("picture", "6/6  Draw detections on unseen scenes", "-m", "prunet_zoo.mm.draw", str(detector),
              "--out", str(out / "detections.png"))  # fmt: skip
    summary = quick.summary(target)
    write_json(out / "summary.json", summary)
    quick.show(summary, (low, high))
    return 0


if __name__ == "__main__":
    run_tool(main)
