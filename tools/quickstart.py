"""The whole way on built-in data: measure, search, train a classifier, train a detector with it, measure again.

    bash tools/quickstart.sh [--target-ms T] [--work-dir D] [--seed N] [--fresh]

It runs the pipeline of configs/pipeline/digits.py: the same tools that you would (every command is printed), on
scikit-learn's digit scans and on scenes made of them. It ends with a table, a picture of detections, D/report.html and
D/summary.json. A second call goes on where the first was stopped and skips what stands; --fresh removes what the first
left, and nothing else, from D.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunet_zoo.files import write_json
from prunet_zoo.mm.cli import load_config, run_tool
from prunet_zoo.mm.pipeline import REPORT, STATE, Pipeline, StageError
from prunet_zoo.mm.pipeline_config import PipelineConfig
from prunet_zoo.mm.pipeline_report import show, write_report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/pipeline/digits.py"
SUMMARY = "summary.json"
FRESH = ("--fresh",)


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of the report that a reader wants first."""
    measured, detector = report["measured"], report["detectors"]["detector"]["metrics"]
    return {
        "target_ms": report["target_ms"],
        "predicted_ms": report["predicted_ms"],
        "measured_ms": measured["median_ms"],
        "top1": report["classifier"]["metrics"]["top1"],  # of the last epoch, as the weights the detector started from
        "map50": detector["coco/bbox_mAP_50"],
        "map": detector["coco/bbox_mAP"],
        "params": report["network"]["params"],
        "macs": report["network"]["macs"],
        "seconds": report["seconds"],
        "device": measured["device"],
        "date": measured["date"],
        "seed": report["seed"],
    }


def remove_own(folder: Path, config: PipelineConfig) -> None:
    """Remove what the quickstart left in ``folder``, and nothing else.

    Raises:
        StageError: the folder is not empty and no quickstart has used it.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / STATE).is_file():
        raise StageError(
            f"{folder} has no {STATE}, so it is not a folder of the quickstart and nothing is removed from it; "
            "give another --work-dir or leave out --fresh"
        )
    own = [name for stage in config.stages for name in stage.own]
    for path in (folder / name for name in (*own, *REPORT, SUMMARY, STATE)):  # the record goes last: can be done again
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
    config = PipelineConfig(load_config(ROOT / CONFIG), out, ROOT, ROOT, args.target_ms, args.seed)
    if args.fresh:
        remove_own(out, config)
    pipeline = Pipeline(config, again=FRESH)
    pipeline.run()
    report = write_report(pipeline)
    write_json(out / SUMMARY, summarise(report))
    show(report, out, pipeline.console)
    pipeline.console.print(f"detections: {out / 'detections.png'}", highlight=False, soft_wrap=True)
    pipeline.console.print(f"summary: {out / SUMMARY}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_tool(main, drop=FRESH)
