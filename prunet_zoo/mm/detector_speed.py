"""Latency of a trained detector on one image, split as in `detector_latency`; the reading of the file is not in it.

$ python -m prunet_zoo.mm.detector_speed WORK_DIR [--threads 1] [--seconds 2] [--json]      # of a run of tools/train.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from prunet_zoo.errors import DataError
from prunet_zoo.mm.checks import check_files
from prunet_zoo.mm.cli import ConfigError, load_config, run_tool
from prunet_zoo.mm.detector_latency import DetectorTimer
from prunet_zoo.mm.draw import find_run
from prunet_zoo.mm.training import device_name


def measure_detector(work_dir: str | Path, threads: int = 1, seconds: float = 2.0) -> dict[str, Any]:
    """Time a trained detector on the first image of its validation data, batch 1, in PyTorch.

    Args:
        work_dir: of a training run.
        threads: CPU threads.
        seconds: to spend on timed runs, at least five, after three that are not.

    Returns:
        `DetectorTimer.summary`'s times (ms), ``input_size`` (H, W in px, as the network sees it), the setting.

    Raises:
        CheckpointError: no run's folder. ConfigError: no validation data. DataError: it is missing or empty.
    """
    from mmdet.apis import init_detector

    config, checkpoint = find_run(work_dir)
    cfg = load_config(config)
    if cfg.get("val_dataloader") is None:
        raise ConfigError(f"{config} has no val_dataloader, whose first image is what is timed")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        init_default_scope(cfg.get("default_scope", "mmdet"))
        check_files({"val_dataloader": cfg.val_dataloader}, ("val",))
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
        if not len(dataset):
            raise DataError(f"the validation data of {config} have no image")
        model = init_detector(cfg, str(checkpoint), palette="random", device=device)
        batch = pseudo_collate([dataset[0]])
        with torch.no_grad():
            size = model.data_preprocessor(batch, False)["inputs"].shape[-2:]
        timer = DetectorTimer(model, batch, candidates=None)
        for _ in range(3):
            timer.run()
        until = time.perf_counter() + seconds
        while len(timer.runs) < 5 or time.perf_counter() < until:
            timer.sample()
    finally:
        torch.set_num_threads(before)
    return {
        **timer.summary(),
        "input_size": list(size),
        "threads": threads,
        "backend": "torch",
        "backend_version": torch.__version__,
        "device": device_name(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prunet_zoo.mm.detector_speed", description=measure_detector.__doc__
    )
    parser.add_argument("work_dir", help="work directory of a training run: its config and last checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on runs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools and mmengine tell what they load
        record = measure_detector(args.work_dir, args.threads, args.seconds)
    short = f"{record['total_ms']:.4g} ms for one image of {record['input_size']} px, {record['device']}"
    print(json.dumps(record, indent=2) if args.json else short)
    return 0


if __name__ == "__main__":
    run_tool(main)
