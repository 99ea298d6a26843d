"""Checkpoints are whole or absent; a damaged newest one does not end a resume."""

from __future__ import annotations

import errno
import logging
import os
import random
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.runner import Runner

from prunet_zoo.files import WriteError
from prunet_zoo.mm.checkpoint import BACKEND, check_checkpoint, find_resumable
from prunet_zoo.mm.cli import load_config
from prunet_zoo.mm.rng import rng_state, set_rng_state
from prunet_zoo.mm.training import build_runner, close_hooks, make_robust


def config(path: Path, work_dir: Path, epochs: int = 2, **changes: object) -> Config:
    cfg = load_config(path, {"train_cfg.max_epochs": epochs, **changes})
    cfg.work_dir, cfg.visualizer, cfg.log_level = str(work_dir), None, "WARNING"
    cfg.experiment_name = uuid.uuid4().hex  # MMEngine shares state between runs of one name in one process
    make_robust(cfg)
    return cfg


def run(path: Path, work_dir: Path, epochs: int = 2, **changes: object) -> Runner:
    runner = build_runner(config(path, work_dir, epochs, **changes))
    runner.train()
    return runner


def checkpoint(path: Path, **extra: object) -> Path:
    torch.save(
        {"meta": {"epoch": 1}, "state_dict": {"w": torch.rand(500)}, "message_hub": {}, "optimizer": {}, **extra}, path
    )
    return path


def test_files_of_a_run(tiny_config: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    run(tiny_config, work_dir, 3, **{"default_hooks.checkpoint.max_keep_ckpts": 2})
    assert {p.name for p in work_dir.glob("epoch_*")} == {"epoch_2.pth", "epoch_3.pth"}
    assert (work_dir / "last_checkpoint").read_text() == str(work_dir / "epoch_3.pth")
    assert len(list(work_dir.glob("best_top1_*"))) == 1
    assert not list(work_dir.rglob("*.tmp"))
    assert find_resumable(work_dir) == work_dir / "epoch_3.pth"


def test_full_disk_keeps_the_old_files(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one checkpoint only, the one before stays, `last_checkpoint` names it, nothing is half there."""
    work_dir = tmp_path / "run"
    run(tiny_config, work_dir, 1)
    before = (work_dir / "epoch_1.pth").read_bytes()
    real = os.fsync

    def full(handle: int) -> None:
        if ".pth." in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    cfg = config(tiny_config, work_dir, 2, **{"default_hooks.checkpoint.max_keep_ckpts": 1})
    cfg.resume, cfg.load_from = True, str(work_dir / "epoch_1.pth")
    monkeypatch.setattr(os, "fsync", full)
    runner = build_runner(cfg)
    with pytest.raises(WriteError, match=r"epoch_2\.pth.*No space left.*Nothing was overwritten"):
        runner.train()
    close_hooks(runner)
    assert (work_dir / "epoch_1.pth").read_bytes() == before
    assert {p.name for p in work_dir.glob("epoch_*")} == {"epoch_1.pth"}
    assert (work_dir / "last_checkpoint").read_text().endswith("epoch_1.pth")
    assert list(work_dir.glob("best_top1_*")) and not list(work_dir.rglob("*.tmp"))


def test_previous_best_goes_only_after_the_new_one_stands(tmp_path: Path) -> None:
    backend = get_file_backend(str(tmp_path), backend_args={"backend": BACKEND})
    for name in ("old", "same"):
        backend.put(b"1", tmp_path / name)
    with backend.remove_last() as keep:
        backend.remove(tmp_path / "old")
        backend.remove(tmp_path / "same")
        assert (tmp_path / "old").exists()
        keep.append(str(tmp_path / "same"))
    assert not (tmp_path / "old").exists() and (tmp_path / "same").exists()
    with pytest.raises(RuntimeError), backend.remove_last():
        backend.remove(tmp_path / "same")
        raise RuntimeError
    assert (tmp_path / "same").exists()  # what failed removes nothing


def test_damaged_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(1, 5):
        path = checkpoint(tmp_path / f"epoch_{i}.pth")
        os.utime(path, (i, i))
    newest, third, second = (tmp_path / f"epoch_{i}.pth" for i in (4, 3, 2))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])  # cut short
    raw = bytearray(third.read_bytes())
    raw[len(raw) // 2] ^= 0xFF  # one flipped byte, which torch.load does not notice
    third.write_bytes(bytes(raw))
    torch.load(third, weights_only=True)
    second.write_bytes(b"")
    (tmp_path / "last_checkpoint").write_text(str(newest))
    with caplog.at_level(logging.WARNING, logger="current"):
        assert find_resumable(tmp_path) == tmp_path / "epoch_1.pth"
    for path in (newest, third, second):
        assert check_checkpoint(path).startswith("damaged")


def test_last_checkpoint_wins_and_may_be_missing_or_stale(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path / "epoch_1.pth"), checkpoint(tmp_path / "epoch_2.pth")
    os.utime(first, (1, 1))
    (tmp_path / "last_checkpoint").write_text("/moved/since/epoch_1.pth")
    assert find_resumable(tmp_path) == first  # by name: the folder was moved
    for text in ("", "/nowhere/epoch_9.pth"):
        (tmp_path / "last_checkpoint").write_text(text)
        assert find_resumable(tmp_path) == second
    (tmp_path / "last_checkpoint").unlink()
    assert find_resumable(tmp_path) == second
    assert find_resumable(tmp_path / "empty") is None


def test_checkpoint_of_another_config_or_kind_is_not_taken(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "epoch_1.pth", meta={"config_hash": "aaa"})
    assert check_checkpoint(path, "aaa") is None and check_checkpoint(path) is None
    assert "another config" in str(check_checkpoint(path, "bbb"))
    torch.save({"state_dict": {}}, path)
    assert "lacks meta" in str(check_checkpoint(path))
    torch.save({"meta": Path("x")}, path)  # a class that is not allowed
    assert "cannot be read" in str(check_checkpoint(path))


def test_rng_state_survives_a_file_and_stays_plain(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn(), torch.rand(3)  # with a cached second value in two of them
    torch.save(rng_state(), tmp_path / "rng.pth")

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(4).tolist()

    first = draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draw() == first
