"""Checkpoints that are whole or absent, and the newest one that can be resumed from."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from prunet_zoo.files import write_atomic
from prunet_zoo.registry import HOOKS, register

BACKEND = "prunet_atomic"
INTERRUPTED = "interrupted.pth"
LAST = "last_checkpoint"
_NEEDED = ("meta", "state_dict", "message_hub", "optimizer")


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, but a write leaves the old file or the new one, never a part.

    Raises (from the writes):
        WriteError: disk full or folder not writable; the old file is untouched.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[str] | None = None

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomic(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomic(filepath, obj.encode(encoding))

    def remove(self, filepath: str | Path) -> None:
        if self._held is None:
            super().remove(filepath)
        else:
            self._held.append(str(filepath))

    @contextmanager
    def remove_last(self) -> Iterator[list[str]]:
        """Within the block files are only marked for removal; they go after it, if it did not fail.

        Yields:
            Paths not to be removed after all (written anew in the meantime).
        """
        keep: list[str] = []
        self._held = []
        try:
            yield keep
            doomed = [path for path in self._held if path not in keep]
        finally:
            self._held = None
        for path in doomed:
            Path(path).unlink(missing_ok=True)


register_backend(BACKEND, AtomicLocalBackend, force=True)


@register(HOOKS)
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's `CheckpointHook` (same arguments) whose files are whole or absent at any moment.

    Checkpoints and ``last_checkpoint`` are written under a temporary name and renamed, and an outdated checkpoint is
    removed only after the new one stands. `save_now` stores a run that is being stopped, also within an epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.backend_args: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        if self.backend_args is None and "://" not in str(self.out_dir or ""):
            self.backend_args = {"backend": BACKEND}

    def save_now(self, runner: Runner, epoch: int, iteration: int) -> str:
        """Save the state after ``iteration`` steps, ``epoch`` of them whole epochs; returns the file's path."""
        path = self.file_backend.join_path(self.out_dir, INTERRUPTED)
        runner.message_hub.update_info("last_ckpt", path)
        self._write(runner, INTERRUPTED, {"epoch": epoch, "iter": iteration})
        return str(path)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        doomed = None
        if self.max_keep_ckpts > 0 and not (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                doomed = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        self._write(runner, name, meta)
        if is_main_process():
            outdated = [INTERRUPTED] if doomed is None else [INTERRUPTED, self.filename_tmpl.format(doomed)]
            for path in (self.file_backend.join_path(self.out_dir, entry) for entry in outdated):
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        if not isinstance(self.file_backend, AtomicLocalBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        with self.file_backend.remove_last() as keep:
            super()._save_best_checkpoint(runner, metrics)
            best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
            keep.extend(str(path) for path in best)

    def _write(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        runner.message_hub.update_info("last_ckpt_iter", meta["iter"])
        runner.call_hook("before_gathering")  # in all processes; what follows runs in the first one alone
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_atomic(Path(runner.work_dir) / LAST, str(self.file_backend.join_path(self.out_dir, name)))


def find_resumable(
    work_dir: str | Path,
    config_hash: str | None = None,
    patterns: Sequence[str] = ("epoch_*.pth", "iter_*.pth", INTERRUPTED),
) -> Path | None:
    """The newest checkpoint in ``work_dir`` that is whole; damaged ones are skipped, which is said in the log.

    Args:
        work_dir: where a run left its checkpoints.
        config_hash: skip checkpoints of another config (`prunet_zoo.mm.guard.fingerprint_hash`); None takes any.
        patterns: what the checkpoints of a run are called.

    Returns:
        The file that ``last_checkpoint`` names, else the youngest of the others; None where there is none.
    """
    work_dir = Path(work_dir)
    found = {path for pattern in patterns for path in work_dir.glob(pattern) if path.is_file()}
    order = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    named = _named_last(work_dir)
    if named is not None:
        order = [named, *(path for path in order if path != named)]
    for path in order:
        reason = check_checkpoint(path, config_hash)
        if reason is None:
            return path
        print_log(f"checkpoint {path} is not used: {reason}; trying the one before", "current", logging.WARNING)
    return None


def check_checkpoint(path: str | Path, config_hash: str | None = None) -> str | None:
    """Why a run cannot be resumed from ``path``: damaged, incomplete, or of another config. None: it can."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # checks every record's CRC, which torch.load does not
        if broken is not None:
            return f"damaged (record {broken})"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError) as error:
        return f"damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    except Exception as error:  # pickle.UnpicklingError and whatever a damaged pickle provokes
        return f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if not isinstance(checkpoint, dict):
        return "not a training checkpoint"
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        return f"not a training checkpoint (it lacks {', '.join(missing)})"
    stored = checkpoint["meta"].get("config_hash")
    if config_hash is not None and stored is not None and stored != config_hash:
        return "left by a run of another config"
    return None


def _named_last(work_dir: Path) -> Path | None:
    """The file that ``last_checkpoint`` names, looked up in ``work_dir`` too: the folder may have been moved."""
    try:
        text = (work_dir / LAST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    for path in (work_dir / Path(text).name, Path(text)) if text else ():
        if path.is_file():
            return path
    return None
