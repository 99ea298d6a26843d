"""Predict on images: class names and scores of a classifier, boxes of a detector, drawn into pictures.

    python tools/predict.py data/samples/digits --model digits_classifier --top 3
    python tools/predict.py data/samples/scenes --model digits_detector --out work_dirs/predict
    python tools/predict.py photo.jpg 'album/**/*.jpg' --model prunet_p0
    python tools/predict.py photos/ --model configs/detection/F.py --weights work_dirs/F/epoch_12.pth --json boxes.json

`python -m prunet_zoo.data.samples` makes data/samples. An image that cannot be read is named, the others are done; the
exit status is then 2.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from prunet_zoo.console import USER_ERROR, run_plain_tool
from prunet_zoo.files import write_atomic, write_json
from prunet_zoo.zoo.images import Failure, as_field, as_text, find_images, read_ahead
from prunet_zoo.zoo.index import find_model
from prunet_zoo.zoo.predict import Classifier, PredictError, ScoredClass, load_classifier, read_meta

if TYPE_CHECKING:
    from prunet_zoo.mm.predict import Box, Detector, DetectorInput

TOP, SCORE_THR, OUT = 5, 0.3, Path("work_dirs/predict")


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    images = "image files, folders (with the folders in them), or quoted patterns ('photos/**/*.jpg')"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    model = "a name of the zoo (prunet_p0, digits_detector, …), a config (.py), or a published file (.safetensors)"
    parser.add_argument("--model", required=True, metavar="M", help=model)
    weights = "weights of a config, .pth or .safetensors; of a name, instead of its own"
    parser.add_argument("--weights", metavar="F", help=weights)
    parser.add_argument("--top", type=_positive, metavar="K", help=f"classifier: how many classes ({TOP})")
    parser.add_argument("--score-thr", type=_share, metavar="S", help=f"detector: boxes from this score ({SCORE_THR})")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"detector: where pictures go ({OUT})")
    parser.add_argument("--json", metavar="F", help="write all predictions to this file")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at once (%(default)s)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, …; default: a GPU where there is one")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 1, got {text}")
    return value


def load_model(name: str, weights: str | None, device: str | None) -> Classifier | Detector:
    """The classifier or detector that --model names; MMEngine is imported only where it is needed."""
    if name.endswith(".py"):
        with _wants_mm():
            from prunet_zoo.mm.predict import load_config_model
        return load_config_model(name, weights, device)
    if name.endswith(".safetensors"):
        task = read_meta(name).get("task", "classification")
    elif name.endswith((".pth", ".tar", ".zip", ".json", ".onnx")):
        raise PredictError(f"--model takes a name of the zoo, a config or a .safetensors file, got {name}")
    else:
        task = find_model(name).task
    if task == "classification":
        return load_classifier(name, weights, device)
    with _wants_mm():
        from prunet_zoo.mm.predict import load_detector
    return load_detector(name, weights, device)


@contextmanager
def _wants_mm() -> Iterator[None]:
    """Around imports that need mmdet and what it needs: says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "prunet_zoo":
            raise
        raise PredictError(
            f"a detector or a config needs {package}, which is not installed: pip install 'prunet-zoo[mm]'"
        ) from None


class Run:
    """One call of the tool: predicts batch after batch, prints, draws, and keeps the records for --json."""

    def __init__(self, args: argparse.Namespace, model: Classifier | Detector, images: list[Path]) -> None:
        self.model, self.images, self.batch_size = model, images, args.batch_size
        self.top, self.score_thr = args.top or TOP, SCORE_THR if args.score_thr is None else args.score_thr
        self.table = sys.stdout.isatty()
        self.console = Console() if self.table else Console(stderr=True)
        self.records: list[dict[str, Any]] = []
        self.failed: list[Failure] = []
        self.pictures: dict[Path, Path] = {}
        if model.task == "detection":
            from prunet_zoo.mm.draw_boxes import picture_paths

            self.pictures = dict(zip(images, picture_paths(images, args.out or OUT), strict=True))

    def predict(self) -> None:
        """Work through all images."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        hidden = not self.console.is_terminal or len(self.images) == 1
        with Progress(*columns, console=self.console, disable=hidden, transient=True) as bar:
            task = bar.add_task(self.model.name, total=len(self.images), rate="")
            start = time.perf_counter()
            for good, failed in read_ahead(self.images, self.batch_size, self.model.read):
                if good:
                    self._batch(good)
                for failure in failed:
                    self.failed.append(failure)
                    print(f"error: {as_field(failure.error)}", file=sys.stderr, flush=True)
                done = len(self.records) + len(self.failed)
                bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - start):.1f} images/s")

    def _batch(self, batch: list[tuple[Path, Any]]) -> None:
        paths, inputs = [path for path, _ in batch], [item for _, item in batch]
        try:
            if isinstance(self.model, Classifier):
                for path, classes in zip(paths, self.model.classify(inputs, self.top), strict=True):
                    self._show_classes(path, classes)
            else:
                found = self.model.detect(inputs, self.score_thr)
                for path, item, boxes in zip(paths, inputs, found, strict=True):
                    self._show_boxes(path, item, boxes)
        except RuntimeError as error:
            if "out of memory" not in str(error) and "DefaultCPUAllocator" not in str(error):
                raise
            raise PredictError(
                f"a batch of {len(paths)} does not fit into memory; give a smaller --batch-size"
            ) from None

    def _show_classes(self, path: Path, classes: list[ScoredClass]) -> None:
        rows = [(f"{c.score:.4f}", c.name) for c in classes]
        self._print(path, rows, "")
        predictions = [{"label": c.label, "class": c.name, "score": c.score} for c in classes]
        self.records.append({"path": as_text(path), "predictions": predictions})

    def _show_boxes(self, path: Path, item: DetectorInput, boxes: list[Box]) -> None:
        from prunet_zoo.mm.draw_boxes import draw_boxes, encode

        picture = self.pictures[path]
        write_atomic(picture, encode(draw_boxes(item.image, boxes), picture))
        rows = [(f"{b.score:.4f}", b.name, " ".join(f"{v:.1f}" for v in b.box)) for b in boxes]
        self._print(path, rows, f"no object with a score of at least {self.score_thr:g}")
        found = [{"label": b.label, "class": b.name, "score": b.score, "box": list(b.box)} for b in boxes]
        size = {"width": item.image.width, "height": item.image.height}
        self.records.append({"path": as_text(path), **size, "boxes": found, "picture": as_text(picture)})

    def _print(self, path: Path, rows: Sequence[tuple[str, ...]], nothing: str) -> None:
        """A table on a terminal; elsewhere a line for each class or box, its fields separated by tabs."""
        if not self.table:
            for row in rows or [("", nothing)]:
                print("\t".join(as_field(field) for field in (str(path), *row)))
            return
        self.console.print(Text(as_field(path), style="bold"))
        grid = Table(box=None, show_header=False, padding=(0, 2))
        for row in rows or [("", nothing)]:
            grid.add_row(*(Text(as_field(field)) for field in row))
        self.console.print(grid)


def run(args: argparse.Namespace) -> int:
    """Load, predict, write; returns the exit status."""
    images = find_images(args.images, leave_out=args.out or OUT)
    model = load_model(args.model, args.weights, args.device)
    wrong = {"--top": args.top} if model.task == "detection" else {"--score-thr": args.score_thr, "--out": args.out}
    given = [option for option, value in wrong.items() if value is not None]
    if given:
        raise PredictError(f"{model.name} is for {model.task}, which does not take {' or '.join(given)}; leave it out")
    start = time.perf_counter()
    work = Run(args, model, images)
    work.predict()
    sys.stdout.flush()
    if args.json:
        record = {
            "model": as_text(model.name),
            "task": model.task,
            "device": str(model.device),
            "command": as_text(shlex.join(["python", *sys.argv])),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 3),
            "images": work.records,
            "failed": [{"path": as_text(failure.path), "error": as_text(failure.error)} for failure in work.failed],
        }
        write_json(args.json, record)
    if work.pictures and work.records:
        print(f"{len(work.records)} picture(s) in {args.out or OUT}", file=sys.stderr)
    if work.failed:
        print(f"error: {len(work.failed)} of {len(images)} images could not be read (named above)", file=sys.stderr)
        return USER_ERROR
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run(args)
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    run_plain_tool(main, stopped="stopped; what was printed and drawn is whole")
