"""A picture of what a detector finds: a grid of images with its boxes, and the annotated ones in another colour.

$ python -m prunet_zoo.mm.draw WORK_DIR --out detections.png      # of a run of tools/train.py
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from prunet_zoo.errors import CheckpointError, DataError, PrunetError
from prunet_zoo.files import write_atomic
from prunet_zoo.mm.checks import check_files, how_to_restore
from prunet_zoo.mm.cli import ConfigError, load_config

FOUND, ANNOTATED = "#ff3b30", "#34c759"  # red and green


def draw_detections(
    config: str | Path | Config,
    checkpoint: str | Path,
    images: int | Sequence[str | Path],
    out_png: str | Path,
    score_thr: float = 0.3,
    columns: int = 4,
    device: str | None = None,
) -> Path:
    """Detect on ``images`` and write the grid to ``out_png``.

    Args:
        config: the detector's config, with its validation data where there is any.
        checkpoint: the detector's weights.
        images: paths, or how many images to take from the beginning of the validation data. Images that belong to the
            validation data show their annotated boxes too.
        out_png: written whole or not at all.
        score_thr: boxes with a lower score are not drawn.
        columns: images in a row.
        device: where to compute; a GPU when there is one.

    Returns:
        Path of the picture.

    Raises:
        ConfigError: the config is missing, broken, or not of a detector.
        DataError: no images, or a file of the data is missing.
    """
    cfg = load_config(config) if isinstance(config, str | Path) else config
    model_cfg = cfg.get("model") or {}
    if not {"backbone", "detector"} & set(model_cfg):
        raise ConfigError(
            f"{cfg.filename or 'the config'} has no detector to draw with, but a model of type "
            f"{model_cfg.get('type')!r}; give the work directory of a detector's training run"
        )
    from mmdet.apis import inference_detector, init_detector

    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    annotated = _annotated(cfg) if "val_dataloader" in cfg else {}
    paths = list(annotated)[:images] if isinstance(images, int) else [str(path) for path in images]
    if not paths:
        raise DataError("no image to draw: give paths, or a number and a config with validation data")
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(f"image {missing[0]} does not exist; {how_to_restore(missing[0])}")
    model = init_detector(cfg, str(checkpoint), palette="random", device=device)
    results = inference_detector(model, paths)
    classes = model.dataset_meta["classes"]
    write_atomic(out_png, _grid(paths, results, annotated, classes, score_thr, min(columns, len(paths))))
    return Path(out_png)


def _annotated(cfg: Config) -> dict[str, list[tuple[list[float], int]]]:
    """Path → annotated (box, label) of each validation image, in order."""
    check_files({"val_dataloader": cfg.val_dataloader}, ("val",))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    found = {}
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        found[str(info["img_path"])] = [(i["bbox"], i["bbox_label"]) for i in info["instances"]]
    return found


def _grid(
    paths: Sequence[str],
    results: Sequence[Any],
    annotated: dict[str, list[tuple[list[float], int]]],
    classes: Sequence[str],
    score_thr: float,
    columns: int,
) -> bytes:
    """PNG of all images; ``results`` are mmdet's data samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(3 * columns, 3 * rows + 0.35), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, path, result in zip(axes, paths, results, strict=False):
        with Image.open(path) as image:
            axis.imshow(image.convert("RGB"), interpolation="nearest")
        for box, label in annotated.get(path, []):
            _box(axis, box, ANNOTATED, classes[label], below=True)
        found = result.pred_instances.cpu()
        found = found[found.scores.argsort()]  # the best is drawn last, and seen
        for box, label, score in zip(
            found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        ):  # fmt: skip
            if score >= score_thr:
                _box(axis, box, FOUND, f"{classes[label]} {score:.2f}", below=False)
    title = f"red: found (class, score ≥ {score_thr:g})" + ("; green: annotated" if annotated else "")
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _box(axis: Any, box: Sequence[float], colour: str, text: str, below: bool) -> None:
    """Draw one box (x1, y1, x2, y2 in px) with its text above, or below, it."""
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.4))
    axis.text(
        x1, y2 if below else y1 - 1, text, color="white", fontsize=7, va="top" if below else "bottom", clip_on=True,
        bbox={"facecolor": colour, "alpha": 0.75, "pad": 0.8, "linewidth": 0},
    )  # fmt: skip


def find_run(work_dir: str | Path) -> tuple[Path, Path]:
    """Config and last checkpoint of a run's work directory.

    Raises:
        CheckpointError: the folder holds no run, or not exactly one config.
    """
    folder = Path(work_dir)
    configs = sorted(folder.glob("*.py"))
    pointer = folder / "last_checkpoint"
    if len(configs) != 1 or not pointer.is_file():
        raise CheckpointError(
            f"{folder} is not the work directory of one training run (it has {len(configs)} config(s) and "
            f"{'a' if pointer.is_file() else 'no'} last_checkpoint); give --config and --checkpoint"
        )
    checkpoint = Path(pointer.read_text().strip())
    if not checkpoint.is_file():  # the folder was moved since
        checkpoint = folder / checkpoint.name
    if not checkpoint.is_file():
        raise CheckpointError(f"{pointer} names {checkpoint}, which does not exist")
    return configs[0], checkpoint


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m prunet_zoo.mm.draw", description="Draw what a detector finds.")
    parser.add_argument("work_dir", nargs="?", help="work directory of a training run: its config and last checkpoint")
    parser.add_argument("--config", help="another config")
    parser.add_argument("--checkpoint", help="another checkpoint")
    parser.add_argument("--images", nargs="+", help="image files (default: the first ones of the validation data)")
    parser.add_argument("--count", type=int, default=12, help="how many validation images (%(default)s)")
    parser.add_argument("--score-thr", type=float, default=0.3, help="draw boxes from this score on (%(default)s)")
    parser.add_argument("--out", default="detections.png", help="PNG to write (%(default)s)")
    args = parser.parse_args(argv)
    try:
        config, checkpoint = args.config, args.checkpoint
        if not (config and checkpoint):
            if not args.work_dir:
                raise CheckpointError("give a work directory, or both --config and --checkpoint")
            found = find_run(args.work_dir)
            config, checkpoint = config or found[0], checkpoint or found[1]
        if not Path(checkpoint).is_file():
            raise CheckpointError(f"checkpoint {checkpoint} does not exist")
        path = draw_detections(config, checkpoint, args.images or args.count, args.out, args.score_thr)
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
