"""The fingerprint of a config, kept in the work directory: ``--resume`` continues only a run of the same config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunet_zoo.errors import TrainingError
from prunet_zoo.files import write_json
from prunet_zoo.spec import stable_hash

FILE = "config_fingerprint.json"

# what changes nothing in the result: where files lie, how it is logged, on how many processes it is loaded. A search
# compares its latency table by content, see `SearchLoop.load_state_dict`.
_IGNORED = {
    "auto_resume",
    "backend_args",
    "custom_imports",
    "data_check",
    "data_prefix",
    "data_root",
    "default_scope",
    "digit_scenes",
    "env_cfg",
    "experiment_name",
    "find_unused_parameters",
    "launcher",
    "load_from",
    "log_level",
    "log_processor",
    "model_wrapper_cfg",
    "num_workers",
    "outfile_prefix",
    "persistent_workers",
    "pin_memory",
    "prefetch_factor",
    "resume",
    "runner_type",
    "table",
    "test_dataloader",
    "test_evaluator",
    "verify",
    "vis_backends",
    "visualizer",
    "work_dir",
}
# hooks that do not act on the weights
_SILENT_HOOKS = {"LoggerHook", "IterTimerHook", "ProgressHook", "RuntimeInfoHook", "VisualizationHook"}
_SILENT_HOOKS |= {"DetVisualizationHook", "SaveSafetensors", "NonFiniteLossHook", "InterruptHook", "ExactResumeHook"}
_SILENT_HOOKS |= {"CheckpointHook", "AtomicCheckpointHook", "DistSamplerSeedHook", "SyncBuffersHook"}
_SILENT_HOOKS |= {"SyncStatisticsHook"}


def fingerprint(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten what matters of a config (model, data, schedule, seed) to ``{'a.b.0.c': value}``, sorted by key."""
    flat: dict[str, Any] = {}
    _flatten("", {k: cfg[k] for k in cfg if not str(k).startswith("_")}, flat)
    return dict(sorted(flat.items()))


def fingerprint_hash(cfg: Mapping[str, Any]) -> str:
    """12 hex digits of the `fingerprint`."""
    return stable_hash(fingerprint(cfg))


def check_work_dir(work_dir: str | Path, cfg: Mapping[str, Any], resume: bool) -> None:
    """Let a run start in ``work_dir``, with ``resume`` only one of the same config. It writes nothing.

    Raises:
        TrainingError: the run in ``work_dir`` has another config; the differing keys are named.
    """
    path = Path(work_dir) / FILE
    new = fingerprint(cfg)
    if resume and path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"cannot read {path}, which tells of what config the run in {work_dir} is: {error}. "
                "If you are sure that it is this config's, remove that file and run again."
            ) from None
        differing = sorted(k for k in old.keys() | new.keys() if old.get(k, _MISSING) != new.get(k, _MISSING))
        if differing:
            shown = "; ".join(f"{k}: {_show(old, k)} there, {_show(new, k)} here" for k in differing[:6])
            more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
            raise TrainingError(
                f"{work_dir} holds a run of another config, so it cannot be resumed with this one. It differs in "
                f"{shown}{more}. Resume with the config it was started with, or choose another --work-dir."
            )


def claim_work_dir(work_dir: str | Path, cfg: Mapping[str, Any]) -> None:
    """Note in ``work_dir`` of what config its run is. To be called when the run has proved to be valid and starts."""
    write_json(Path(work_dir) / FILE, fingerprint(cfg))


_MISSING = object()


def _show(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "nothing"
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(path: str, value: Any, out: dict[str, Any]) -> None:
    if path in _IGNORED or path.rpartition(".")[2] in _IGNORED:
        return
    if isinstance(value, Mapping):
        if str(value.get("type", "")).rpartition(".")[2] in _SILENT_HOOKS:
            return
        for key, item in value.items():
            _flatten(f"{path}.{key}" if path else str(key), item, out)
    elif isinstance(value, list | tuple):
        kept = [v for v in value if not _is_silent(v)]  # a logging hook must not shift the numbers of the others
        for i, item in enumerate(kept):
            _flatten(f"{path}.{i}", item, out)
    elif isinstance(value, bool | int | float | str) or value is None:
        out[path] = value
    else:
        out[path] = getattr(value, "__name__", None) or str(value)


def _is_silent(value: Any) -> bool:
    return isinstance(value, Mapping) and str(value.get("type", "")).rpartition(".")[2] in _SILENT_HOOKS
