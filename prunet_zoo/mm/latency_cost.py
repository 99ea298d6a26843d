"""What a search run pays for: a latency table, read or measured, a predictor's word for another device, or MACs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunet_zoo.errors import LatencyError
from prunet_zoo.latency import LatencyTable, build_table
from prunet_zoo.latency.predictor import Predictor, list_devices
from prunet_zoo.search import Cost, MacsCost
from prunet_zoo.space import SearchSpace

TABLE_FILE = "latency_table.jsonl"


def make_cost(
    space: SearchSpace,
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
    """Return the cost of a search: the table in ``table``, or one measured here and kept in ``work_dir``.

    Args:
        space: the search space.
        work_dir: folder of the run.
        type: 'latency' (ms), 'predictor' (ms, predicted for a device that need not be at hand) or 'macs' (millions).
        table: file made by ``tools/latency.py table``; None measures one (resumable).
        backend, threads, batch, dtype, accelerator, memory_format: what the search is for; a table of anything else is
            refused.
        device: for 'latency' the name of the device that the table must be of; None: this machine's. For 'predictor'
            a name of `list_devices` or a file of ``tools/latency.py fit``.

    Raises:
        UnknownNameError, SpecError: there is no such predictor, or its file is none.
        LatencyError: the table is of another space, device, backend, thread count, batch or dtype.
    """
    if type == "macs":
        return MacsCost()
    if type == "predictor":
        if device is None:
            raise LatencyError(
                f"latency.type='predictor' needs latency.device (--device): one of {', '.join(list_devices())}, or a "
                "file of tools/latency.py fit"
            )
        return Predictor.load(device)
    if type != "latency":
        raise LatencyError(f"latency.type must be 'latency', 'predictor' or 'macs', got {type!r}")
    wanted: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "batch": batch,
        "dtype": dtype,
        "accelerator": accelerator,
        "memory_format": memory_format,
    }
    if table is None:
        return build_table(space, Path(work_dir) / TABLE_FILE, **wanted)
    loaded = LatencyTable.load(table)
    loaded.require(space=space, device=device, **wanted)
    return loaded
