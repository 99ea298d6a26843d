"""The substitute for mmcv's compiled operators, and the classes that checkpoints may hold."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from pickle import UnpicklingError
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prunet_zoo  # noqa: F401  (prepares)
from prunet_zoo.errors import PrunetError
from prunet_zoo.mm import compat, ops

ROOT = Path(__file__).resolve().parents[2]
substituted = pytest.mark.skipif(
    not isinstance(sys.modules.get("mmcv._ext"), compat.SubstituteExt), reason="a compiled mmcv is installed"
)


def run_python(code: str, *path: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reference_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    """mmcv's CPU loop, literally."""
    order = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2] - boxes[:, 0] + offset) * (boxes[:, 3] - boxes[:, 1] + offset)
    kept: list[int] = []
    gone = np.zeros(len(boxes), bool)
    for a, i in enumerate(order):
        if gone[i]:
            continue
        kept.append(int(i))
        for j in order[a + 1 :]:
            w = max(0.0, min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]) + offset)
            h = max(0.0, min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]) + offset)
            if w * h / (areas[i] + areas[j] - w * h) > threshold:
                gone[j] = True
    return kept


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 12)] * 2), max_size=14),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([0, 1]),
    st.randoms(use_true_random=False),
)
@example([(0, 0, 2, 2), (0, 0, 2, 9)], 0.3, 1, Random(0))  # an IoU of exactly 0.3
def test_nms_is_mmcvs(rows, threshold, offset, random) -> None:
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in rows], np.float32).reshape(-1, 4)
    scores = np.array(random.sample(range(100), len(rows)), np.float32) / 100
    kept = ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset)
    assert kept.tolist() == reference_nms(boxes, scores, threshold, offset)


@substituted
def test_nms_through_mmcv() -> None:
    from mmcv.ops import batched_nms, nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 0, 10, 11]])
    scores = torch.tensor([0.5, 0.6, 0.7])
    dets, kept = nms(boxes, scores, 0.5)
    assert kept.tolist() == [2, 1]  # the touching box stays
    assert dets.shape == (2, 5)
    assert nms(boxes, scores, 0.5, score_threshold=0.65)[1].tolist() == [2]
    assert nms(boxes[:0], scores[:0], 0.5)[1].numel() == 0
    assert nms(boxes[:1], scores[:1], 0.5)[1].tolist() == [0]
    _, kept = batched_nms(boxes, scores, torch.tensor([0, 0, 1]), {"type": "nms", "iou_threshold": 0.5})
    assert kept.tolist() == [2, 1, 0]  # another class does not suppress
    half, _ = nms(boxes.numpy().astype(np.float16), scores.numpy().astype(np.float16), 0.5)
    assert len(half) == 2


def test_offset_decides_for_adjacent_pixels() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 0, 9], [0, 0, 1, 9]]), torch.tensor([0.9, 0.8])
    # with the offset the widths are 1 and 2 px: IoU ½; without it the first box has no area
    assert ops.nms(boxes, scores, 0.45, offset=1).tolist() == [0]
    assert ops.nms(boxes, scores, 0.45, offset=0).tolist() == [0, 1]


@substituted
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_is_mmdets_formula(weighted: bool) -> None:
    from mmcv.ops import sigmoid_focal_loss
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

    torch.manual_seed(0)
    logits = torch.randn(12, 5).mul(4).double().requires_grad_()
    target = torch.randint(0, 6, (12,))  # 5 is background
    weight = torch.rand(5) if weighted else None
    ours = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "sum")
    (gradient,) = torch.autograd.grad(ours, logits)
    onehot = torch.nn.functional.one_hot(target, 6)[:, :5]
    factor = torch.cat((weight, torch.ones(1)))[target].view(-1, 1) if weighted else torch.ones(12, 1)
    theirs = (py_sigmoid_focal_loss(logits, onehot, gamma=2.0, alpha=0.25, reduction="none") * factor).sum()
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@substituted
def test_other_operators_say_what_to_install() -> None:
    from mmcv.ops import RoIAlign

    with pytest.raises(PrunetError, match=r"roi_align_forward.*mmcv-lite.*use_torchvision.*pip install 'mmcv"):
        RoIAlign(7)(torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 0, 0, 4, 4]]))
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")


def test_import_is_cheap_and_in_time() -> None:
    out = run_python(
        """
        import sys, prunet_zoo
        print('mmcv' in sys.modules, 'mmdet' in sys.modules, 'mmcv._ext' in sys.modules)
        import mmcv, mmcv.ops, mmdet.models, importlib.util
        print(importlib.util.find_spec('mmcv._ext') is not None)
        """
    )
    assert out.split() == ["False", "False", "True", "True"]


def test_compiled_mmcv_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("raise RuntimeError('prepare must not import mmcv')")
    (tmp_path / "mmcv" / "_ext.py").write_text("compiled = True")
    out = run_python("import sys, prunet_zoo; print('mmcv._ext' in sys.modules)", tmp_path)
    assert out.split() == ["False"]
    (tmp_path / "mmcv" / "_ext.py").unlink()  # the same without a compiled module: the substitute is put in place
    assert run_python("import sys, prunet_zoo; print('mmcv._ext' in sys.modules)", tmp_path).split() == ["True"]


def test_loaded_extension_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert compat.provide_mmcv_ext() is False
    assert sys.modules["mmcv._ext"] is compiled


def test_without_mmcv_nothing_is_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    assert compat.provide_mmcv_ext() is False
    assert "mmcv._ext" not in sys.modules


def test_checkpoint_of_mmengine_loads_with_the_check_on(tmp_path: Path) -> None:
    from mmengine.logging import HistoryBuffer
    from mmengine.optim import OneCycleLR

    buffer = HistoryBuffer()
    for value in (1.0, 2, 0.5):
        buffer.update(value)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = OneCycleLR(optimizer, eta_max=1.0, total_steps=5).state_dict()
    kept = {
        "schedule": schedule,
        "log": buffer,
        "f32": np.float32(1.5),
        "i64": np.int64(7),
        "array": np.arange(3.0),
        "flag": np.bool_(True),
    }
    torch.save({"state_dict": {"w": torch.ones(2)}, "message_hub": kept}, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)["message_hub"]
    assert loaded["log"].mean() == buffer.mean()
    assert loaded["schedule"]["anneal_func"] is schedule["anneal_func"]
    assert loaded["f32"] == np.float32(1.5)
    assert loaded["array"].tolist() == [0.0, 1.0, 2.0]


class _Calls:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def _hostile() -> list[_Calls]:
    from mmengine.logging import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

    return [
        _Calls(getattr, OneCycleParamScheduler, "__init__"),
        _Calls(OneCycleParamScheduler, None),
        _Calls(os.getcwd),
        _Calls(getattr, "text", "join"),
        _Calls(getattr, HistoryBuffer, "__init__"),
        _Calls(getattr, np.dtype, "min"),
    ]


@pytest.mark.parametrize("index", range(6))
def test_everything_else_stays_forbidden(tmp_path: Path, index: int) -> None:
    torch.save({"x": _hostile()[index]}, tmp_path / "b.pth")
    with pytest.raises(UnpicklingError):
        torch.load(tmp_path / "b.pth", weights_only=True)
