"""--cfg-options of every tool: KEY=VALUE, or one line that says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from prunet_zoo.errors import PrunetError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/classification/prunet-p0_imagenet.py"
PUBLISH = [CONFIG, "x.pth", "--out", "x.safetensors", "--licence", "MIT"]
ARGV = {"train": [CONFIG], "publish": PUBLISH, "pipeline": [CONFIG], "export": [CONFIG, "--format", "onnx"]}


def load(tool: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{tool}_options", ROOT / "tools" / f"{tool}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tool", ARGV)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "--cfg-options takes KEY=VALUE, got 'foo'"),
        ("=3", "--cfg-options takes KEY=VALUE, got '=3'"),
        ("a=[1,(2]", r"--cfg-options a=\[1,\(2\]: Imbalanced brackets"),
    ],
)
def test_a_wrong_option_is_told(tool: str, text: str, message: str) -> None:
    with pytest.raises(PrunetError, match=message):
        load(tool).main([*ARGV[tool], "--cfg-options", text])
