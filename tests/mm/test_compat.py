"""The substitute for mmcv's compiled operators, and the classes that checkpoints may hold."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch

import prunet_zoo  # noqa: F401  (prepares)
from prunet_zoo.errors import PrunetError
from prunet_zoo.mm import compat

ROOT = Path(__file__).resolve().parents[2]
substituted = pytest.mark.skipif(
    not isinstance(sys.modules.get("mmcv._ext"), compat.SubstituteExt), reason="a compiled mmcv is installed"
)


def run_python(code: str, *path: Path, errors: bool = False) -> str:
    """What the code prints; with ``errors`` also what it says on stderr."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + (done.stderr if errors else "")


@substituted
def test_other_operators_say_what_to_install() -> None:
    from mmcv.ops import carafe

    message = r"carafe_forward.*mmcv-lite.*provides only deform_conv,.* nms,.* softnms\. .*pip install 'mmcv"
    with pytest.raises(PrunetError, match=message):
        carafe(torch.rand(1, 4, 3, 3), torch.rand(1, 9, 6, 6), 3, 1, 2)
    assert not hasattr(sys.modules["mmcv._ext"], "__wrapped__")


def test_provided_operators_are_named_without_their_directions() -> None:
    assert " ".join(compat.provided()) == (
        "deform_conv masked_col2im masked_im2col modulated_deform_conv ms_deform_attn nms nms_match "
        "roi_align roi_pool sigmoid_focal_loss softmax_focal_loss softnms"
    )


def test_import_is_cheap_and_in_time() -> None:
    out = run_python(
        """
        import sys, prunet_zoo
        print('mmcv' in sys.modules, 'mmdet' in sys.modules, 'mmcv._ext' in sys.modules)
        import mmcv, mmcv.ops, mmdet.models, importlib.util
        print(importlib.util.find_spec('mmcv._ext') is not None)
        """
    )
    substitute = isinstance(sys.modules.get("mmcv._ext"), compat.SubstituteExt)  # else a compiled one, not loaded yet
    assert out.split() == ["False", "False", str(substitute), "True"]


def test_the_one_warning_about_pkg_resources_is_silent() -> None:
    """MMEngine imports and reloads it; the same warning for somebody else's import, and others, are still said."""
    code = """
        import warnings
        {first}
        from mmengine.utils import is_installed
        print(is_installed('torch'))
        warnings.warn('pkg_resources is deprecated as an API: mine')
        exec("import warnings; warnings.warn('another')", {{'__name__': 'mmengine.utils.package_utils'}})
        """
    loud, silent = (run_python(code.format(first=first), errors=True) for first in ("", "import prunet_zoo"))
    if "See https" in loud:  # setuptools 67 to 81
        assert loud.count("pkg_resources is deprecated as an API. See") == 2
    assert "pkg_resources is deprecated as an API. See" not in silent
    assert "mine" in silent and "another" in silent and "True" in silent


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


def test_what_is_allowed_stays_so_after_a_loader_of_its_own() -> None:
    """onedl-mmengine allows `HistoryBuffer` for the time of a load, after which torch takes it off the list."""
    from mmengine.logging import HistoryBuffer

    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:
        pytest.skip("torch before 2.5 has no such block")
    with safe_globals([HistoryBuffer]):
        pass
    file = io.BytesIO()
    torch.save({"log": HistoryBuffer([1.0], [1])}, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=True)["log"], HistoryBuffer)
