"""kill -9 in detection training and --resume: the same bits as without the break, whatever mmdet's parts remember."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunet_zoo.mm.checkpoint import check_checkpoint
from prunet_zoo.mm.hidden_state import UnknownValueError, decode, encode, hidden_state, put_back

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / "scale_configs"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the same bits are promised on CPU")
Run = Callable[..., list[tuple[int, str]]]
NO_VAL = ("--cfg-options", "val_cfg=None", "val_dataloader=None", "val_evaluator=None")


def ended(results: list[tuple[int, str]], status: int = 0) -> str:
    (have, text), *_ = results
    assert have == status, text
    return text


def same_bits(a: Path, b: Path) -> None:
    """Weights, averages, optimiser, what a transform keeps, generators: all of two checkpoints but times and paths."""
    one, two = (torch.load(path, weights_only=True) for path in (a, b))
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "states", "rng"):
        assert (part in one) == (part in two)
        if part in one:
            assert equal(one[part], two[part]), part


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    ("config", "kill"),
    [
        ("random_atss.py", 8),  # five steps an epoch: within the second
        ("random_atss.py", "epoch_2.pth"),  # half of it is on the disk
        ("rtmdet.py", 7),  # transforms have kept images of the first epoch
        ("rtmdet.py", 18),  # after PipelineSwitchHook (third epoch on)
        pytest.param("yolox.py", 7, marks=pytest.mark.slow),
        ("yolox.py", 18),  # BatchSyncRandomResize has drawn sizes; after YOLOXModeSwitchHook
    ],
)
def test_killed_and_resumed_gives_the_same_bits(run: Run, wholes: Path, tmp_path: Path, config: str, kill: Any) -> None:
    whole = wholes / config
    if not whole.exists():
        ended(run("train", [str(CONFIGS / config), "--work-dir", str(whole), *NO_VAL]))
    argv = [str(CONFIGS / config), "--work-dir", str(tmp_path / "killed"), *NO_VAL]
    ended(run("train", argv, kill=kill if isinstance(kill, str) else (0, kill)), -signal.SIGKILL)
    last = max((path.name for path in whole.glob("epoch_*.pth")), key=lambda name: int(name[6:-4]))
    stand = sorted((tmp_path / "killed").glob("epoch_*.pth"))
    assert stand and all(check_checkpoint(path) is None for path in stand)
    assert not (tmp_path / "killed" / last).exists()
    text = ended(run("train", [*argv[:3], "--resume", *argv[3:]]))
    assert "bit for bit" not in text
    same_bits(whole / last, tmp_path / "killed" / last)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A folder for the uninterrupted runs, by config."""
    return tmp_path_factory.mktemp("wholes")


def test_a_cache_in_workers_is_said_to_be_lost(run: Run, scenes: Path, tmp_path: Path) -> None:
    argv = [str(CONFIGS / "rtmdet.py"), "--work-dir", str(tmp_path / "run"), *NO_VAL, "train_dataloader.num_workers=1"]
    ended(run("train", argv, kill=(0, 7)), -signal.SIGKILL)
    text = ended(run("train", [*argv[:3], "--resume", *argv[3:]], kill=(0, 3)), -signal.SIGKILL)
    assert text.count("CachedMixUp and CachedMosaic collect images") == 1 and "num_workers=0" in text


@pytest.mark.slow
def test_a_real_process_killed_from_outside(scenes: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SCENES": str(scenes)}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(CONFIGS / "rtmdet.py"), *NO_VAL, "--work-dir"]
    assert subprocess.run([*command, str(tmp_path / "whole")], env=env, timeout=300).returncode == 0
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=env)
    while not (tmp_path / "killed" / "epoch_1.pth").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run([*command, str(tmp_path / "killed"), "--resume"], env=env, timeout=300)
    assert again.returncode == 0
    same_bits(tmp_path / "whole" / "epoch_4.pth", tmp_path / "killed" / "epoch_4.pth")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values_come_back(value: Any) -> None:
    back = decode(encode(value))
    assert back == value and repr(back) == repr(value)  # types too: (1,) is not [1], nor True 1


def test_what_mmdet_keeps_comes_back_through_a_file(tmp_path: Path) -> None:
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks, PolygonMasks

    kept = {
        "img": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "gt_bboxes": HorizontalBoxes(torch.tensor([[1.0, 2, 3, 4]])),
        "gt_bboxes_labels": np.array([3], dtype=np.int64),
        "gt_ignore_flags": np.array([False]),
        "scale_factor": (np.float32(0.5), 0.25),
        "masks": BitmapMasks(np.ones((1, 2, 4), dtype=np.uint8), 2, 4),
        "polygons": PolygonMasks([[np.array([0.0, 0, 1, 0, 1, 1])]], 2, 4),
    }
    torch.save(encode([kept]), tmp_path / "x.pth")
    kept["img"][:] = 0  # the checkpoint has a copy
    (back,) = decode(torch.load(tmp_path / "x.pth", weights_only=True))
    assert list(back) == list(kept) and back["img"].sum() == sum(range(24)) and back["img"].dtype == np.uint8
    assert torch.equal(back["gt_bboxes"].tensor, kept["gt_bboxes"].tensor)
    assert type(back["scale_factor"][0]) is np.float32 and type(back["scale_factor"]) is tuple
    assert (back["masks"].masks == 1).all() and (back["polygons"].height, back["polygons"].width) == (2, 4)
    assert np.array_equal(back["polygons"].masks[0][0], kept["polygons"].masks[0][0])
    back["img"][0, 0, 0] = 9  # and can be written to
    with pytest.raises(UnknownValueError, match=r"builtins\.object"):
        encode([object()])


class Keeps:
    """A transform that keeps images."""

    def __init__(self, cache: list[Any], name: str) -> None:
        self.results_cache, self.name = cache, name

    def __repr__(self) -> str:
        return f"Keeps({self.name})"


def runner_with(*transforms: Any, workers: int = 0) -> Any:
    inner = SimpleNamespace(pipeline=SimpleNamespace(transforms=[SimpleNamespace(transforms=list(transforms))]))
    dataset = SimpleNamespace(datasets=[SimpleNamespace(dataset=inner)])  # as ConcatDataset and RepeatDataset hold them
    return SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=dataset, num_workers=workers), model=torch.nn.Identity()
    )


def test_caches_find_their_transform_only() -> None:
    state = hidden_state(runner_with(Keeps([{"img": 1}], "a"), object(), Keeps([2], "b")))
    other, same = Keeps([], "other"), Keeps([], "b")
    put_back(runner_with(other, object(), same), state)
    assert other.results_cache == [] and same.results_cache == [2]
    late = Keeps([], "a")
    put_back(runner_with(late), state)  # a pipeline that came later takes what was left
    assert late.results_cache == [{"img": 1}] and not state["caches"]
    assert "workers" in hidden_state(runner_with(Keeps([1], "a"), workers=2))["lost"]
    assert "builtins.object" in hidden_state(runner_with(Keeps([object()], "a")))["lost"]
