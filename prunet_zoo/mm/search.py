"""What tools/search.py does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from prunet_zoo.errors import LatencyError
from prunet_zoo.mm.cli import ConfigError
from prunet_zoo.mm.distributed import from_first, full_precision_on_cpu, processes
from prunet_zoo.mm.search_loop import RESULT_FILES
from prunet_zoo.mm.strategies import check_config, check_model
from prunet_zoo.mm.training import build_runner, close_hooks, make_robust, prepare_resume
from prunet_zoo.search.target import TRIES, summary


def set_target(
    cfg: Config,
    target: float | None,
    table: str | Path | None,
    verify: int | None = None,
    device: str | None = None,
) -> None:
    """Put ``--target-ms``, ``--table``, ``--verify`` and ``--device`` into a search config.

    Raises:
        ConfigError: the config is not one of a search, or has values of another kind there (`check_config`), both a
            table and a device are given, or a table where MACs or a predictor are searched for.
        LatencyError: the table file does not exist.
    """
    check_config(cfg)
    if target is not None:
        cfg.train_cfg.strategy.target = target
    if table is not None and device is not None:
        raise ConfigError("--table (measured latencies) and --device (predicted ones) exclude each other; give one")
    if device is not None:
        cfg.train_cfg.latency = dict(type="predictor", device=str(device))
    if table is not None:
        if not Path(table).is_file():
            raise LatencyError(
                f"latency table {table} does not exist; make it with: python tools/latency.py table SPACE --out {table}"
            )
        kind = cfg.train_cfg.latency.get("type", "latency")
        if kind != "latency":
            raise ConfigError(
                f"--table gives measured latencies, but {cfg.filename} says train_cfg.latency.type={kind!r}; leave "
                "--table out, or put the backend of the table there: train_cfg.latency=dict(backend='onnxruntime')"
            )
        cfg.train_cfg.latency.table = str(table)
    if verify is not None:
        cfg.train_cfg.verify = verify


def search(cfg: Config) -> dict[str, Any]:
    """Search as the config says; returns the report (in the first process, else an empty dict).

    With ``cfg.resume`` a finished search in the same work directory is not run again; where it was not verified and is
    to be now (``--verify``), only its end is.

    Raises:
        PrunetError: whatever the user can mend. `Interrupted` after a signal.
    """
    with processes(cfg):
        return _search(cfg)


def _search(cfg: Config) -> dict[str, Any]:
    check_config(cfg)
    report = from_first(lambda: _finished(cfg)) if cfg.get("resume") else {}
    full_precision_on_cpu(cfg)
    make_robust(cfg)
    prepare_resume(cfg)
    if report:
        return report if is_main_process() else {}
    check_model(cfg.model)
    runner = build_runner(cfg)
    try:
        runner.train()
    finally:
        close_hooks(runner)
    return _finished(cfg) if is_main_process() else {}


def _finished(cfg: Config) -> dict[str, Any]:
    """The report in the work directory, empty where a search (or the verification that is asked for) is not done, or
    the report cannot be read: the end is then done again.

    A network whose weights were trained on after the decision stays the one that was decided.
    """
    work_dir = Path(cfg.work_dir)
    if not all((work_dir / name).is_file() for name in RESULT_FILES):
        return {}
    try:
        report = dict(json.loads((work_dir / "report.json").read_text(encoding="utf-8")))
        summary(report)  # what the tool tells of it
        verified = bool(report["verify"] >= cfg.train_cfg.get("verify", TRIES))
        trained_on = bool(report.get("decided_epoch", 0) < report.get("epochs", 0))
    except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, or not what a search writes
        print_log(f"{work_dir / 'report.json'} is damaged: the results are written anew", "current", logging.WARNING)
        return {}
    if verified:
        return report
    if not trained_on:
        return {}
    print_log(
        f"the network in {work_dir} was decided with --verify {report['verify']} and trained on since; to try more "
        "networks, search again in another --work-dir",
        "current",
        logging.WARNING,
    )
    return report
