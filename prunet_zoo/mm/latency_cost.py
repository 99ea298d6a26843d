"""What a search run pays for: a latency table, read or measured, one network's latency scaled by MACs, a predictor's
word for another device, or MACs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunet_zoo.cost import Cost, MacsCost, ScaledCost
from prunet_zoo.errors import LatencyError, TrainingError
from prunet_zoo.files import write_json
from prunet_zoo.latency import LatencyTable, build_table, measure
from prunet_zoo.latency.predictor import Predictor, list_devices
from prunet_zoo.space import SearchSpace

TABLE_FILE, START_FILE = "latency_table.jsonl", "start_latency.json"
TYPES = ("latency", "scaled", "predictor", "macs")
_OF_A_RECORD = (
    "backend", "backend_version", "device", "accelerator", "dtype", "batch", "threads", "memory_format", "date"
)  # fmt: skip


def make_cost(
    space: Any,
    work_dir: str,
    type: str = "latency",
    table: str | None = None,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    dtype: str = "fp32",
    accelerator: str = "cpu",
    memory_format: str = "contiguous",
    device: str | None = None,
) -> Cost:
    """Return the cost of a search.

    Args:
        space: the `SearchSpace`, or the `TracedSpace` of a network of timm.
        work_dir: folder of the run, in which what is measured is kept.
        type: 'latency' (ms): a table; where there can be none, because a layer's cost depends on the one before it, as
            'scaled'. 'scaled' (ms): the space's largest network is measured, others are in proportion to MACs; networks
            that the search finds are measured anyway. 'predictor' (ms, for a device that need not be at hand) or 'macs'
            (millions).
        table: file made by ``tools/latency.py table``; None measures one (resumable).
        backend, threads, batch, dtype, accelerator, memory_format: what the search is for; a table of anything else is
            refused.
        device: for 'latency' the name of the device that the table must be of; None: this machine's. For 'predictor'
            a name of `list_devices` or a file of ``tools/latency.py fit``.

    Raises:
        UnknownNameError, SpecError: there is no such predictor, or its file is none.
        LatencyError: the table is of another space, device, backend, thread count, batch or dtype; there can be no
            table, or no prediction, for the space.
        TrainingError: the file of an earlier measurement is damaged.
    """
    traced = not isinstance(space, SearchSpace)
    if type not in TYPES:
        raise LatencyError(f"latency.type must be {', '.join(map(repr, TYPES[:-1]))} or {TYPES[-1]!r}, got {type!r}")
    if type == "macs":
        return _macs(space)
    if type == "predictor":
        return _predictor(device, traced)
    wanted: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "batch": batch,
        "dtype": dtype,
        "accelerator": accelerator,
        "memory_format": memory_format,
    }
    if type == "scaled" or not space.additive:
        if table is not None:
            raise LatencyError(
                f"there is no latency table for {space.name!r} here: its layers cost what they do only together, or "
                "latency.type='scaled' was asked for; leave --table out, and networks are measured as they are found"
            )
        return _scaled(space, Path(work_dir) / START_FILE, wanted)
    if table is None:
        return build_table(space, Path(work_dir) / TABLE_FILE, **wanted)
    loaded = LatencyTable.load(table)
    loaded.require(space=space, device=device, **wanted)
    return loaded


def _predictor(device: str | None, traced: bool) -> Cost:
    if traced:
        raise LatencyError(
            "predictors know this package's blocks, not the layers of other networks; leave --device out and search "
            "for this machine, or for MACs (train_cfg.latency.type=macs)"
        )
    if device is None:
        raise LatencyError(
            f"latency.type='predictor' needs latency.device (--device): one of {', '.join(list_devices())}, or a "
            "file of tools/latency.py fit"
        )
    return Predictor.load(device)


def _macs(space: Any) -> Any:
    if isinstance(space, SearchSpace):
        return MacsCost()
    from prunet_zoo.supernet.traced_cost import TracedCost

    return TracedCost(space)


def _scaled(space: Any, path: Path, setting: dict[str, Any]) -> Cost:
    """The cost by the latency of the largest network, measured once for a work directory."""
    start = space.decode(space.largest())
    known: dict[str, Any] | None = None
    if path.is_file():
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
            same = known["space"] == space.hash and all(known["record"][k] == v for k, v in setting.items())
        except (ValueError, TypeError, KeyError) as error:
            raise TrainingError(f"{path} is damaged ({error}); remove it to measure again") from None
        known = known if same else None
    if known is None:
        known = {"space": space.hash, "record": measure(start, **setting).to_dict()}
        write_json(path, known)
    record = known["record"]
    return ScaledCost(_macs(space), start, record["median_ms"], {key: record[key] for key in _OF_A_RECORD})
