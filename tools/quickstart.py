"""The whole way on built-in data: measure, search, train a classifier, train a detector with it, measure again.

    bash tools/quickstart.sh [--target-ms T] [--work-dir D] [--seed N] [--fresh]

It runs the same tools that you would (every command is printed), on scikit-learn's digit scans and on scenes made of
them, and ends with a table, a picture of detections and D/summary.json. A second call goes on where the first was
stopped; --fresh removes what the first left, and nothing else, from D.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
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
from prunet_zoo.mm.interrupts import Interrupted, resume_command, run_child
from prunet_zoo.search import cost_range
from prunet_zoo.space import load_space
from prunet_zoo.spec import load_spec

SPACE = "prunet_cpu_small"
ROOT = Path(__file__).resolve().parent.parent
SEARCH = "configs/search/tiered_prunet-cpu-small_digits.py"
CLASSIFY = "configs/classification/prunet-cpu-small_digits.py"
DETECT = "configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"
STAGES = "stages.json"  # marks a folder as one of the quickstart
OWN = (
    *("latency_table.jsonl", "search", "classifier", "detector"),
    *("measured.json", "detections.png", "summary.json", STAGES),
)
FRESH = ("--fresh",)


class StageError(PrunetError, RuntimeError):
    """A stage of the quickstart ended with an error; its own message stands above."""


class Quickstart:
    """Runs the stages in order and keeps their seconds in ``stages.json``, so that a second call can add to them."""

    def __init__(self, work_dir: Path, seed: int) -> None:
        self.dir, self.seed, self.console = work_dir, seed, Console()
        self.timing_file = work_dir / STAGES
        self.seconds: dict[str, float] = json.loads(self.timing_file.read_text()) if self.timing_file.is_file() else {}
        write_json(self.timing_file, self.seconds)

    def run(self, stage: str, title: str, *command: str) -> str:
        """Run ``python tools/<command>`` and return its standard output where the stage captures it.

        Raises:
            StageError: the stage failed. Interrupted: it was stopped by a signal, after it had saved what it could.
        """
        words = [str(word) for word in command]
        self.console.rule(title)
        self.console.print(f"$ python {shlex.join(words)}", style="dim", highlight=False, soft_wrap=True)
        start = time.perf_counter()
        # waiting threads that spin make a run ten times slower where something else needs a core; for the networks of
        # all stages but the detector a second thread gains nothing
        env = {"GOMP_SPINCOUNT": "0", **({} if stage == "detector" else {"OMP_NUM_THREADS": "1"}), **os.environ}
        status, output, signum = run_child([sys.executable, *words], ROOT, capture="--json" in words, env=env)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 1)
        write_json(self.timing_file, self.seconds)
        if signum is not None:
            again = resume_command(resumable=False, drop=FRESH)
            raise Interrupted(signum, f"stopped in stage '{stage}'. Continue the quickstart with:\n    {again}")
        if status:
            raise StageError(
                f"stage '{stage}' ended with status {status}; mend what it says above, then run again "
                "(with --fresh to start anew)"
            )
        return output

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
            "top1": classifier["metrics"]["top1"],  # of the last epoch, as the weights that the detector started from
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


def remove_own(folder: Path) -> None:
    """Remove what the quickstart left in ``folder``, and nothing else.

    Raises:
        StageError: the folder is not empty and no quickstart has used it.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / STAGES).is_file():
        raise StageError(
            f"{folder} has no {STAGES}, so it is not a folder of the quickstart and nothing is removed from it; "
            "give another --work-dir or leave out --fresh"
        )
    for path in (folder / name for name in OWN):  # stages.json goes last, so that this can be done again
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    budget = "latency budget; default: a third of the way from the fastest to the slowest network on this machine"
    parser.add_argument("--target-ms", type=float, metavar="T", help=budget)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "quickstart", metavar="D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier call left in D")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages."""
    args = make_parser().parse_args(argv)
    out = args.work_dir.resolve()
    if args.fresh:
        remove_own(out)
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
    # the last weights: the best ones were chosen on the test scans, which the scenes for validation are made of
    quick.run("detector", "4/6  Train it as the backbone of a detector", "tools/train.py", DETECT, "--arch", spec,
              "--weights", str(classifier / "last.safetensors"), "--work-dir", str(detector), *seed)  # fmt: skip
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
    run_tool(main, drop=FRESH)
