"""Imports run one way, and only `registry.py` and `mm/` know MMEngine; an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prunet_zoo"

# what each unit (a file or a folder of the package) may import of the package, besides itself
BASE = {"errors", "files", "version"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "console": {"errors"},
    "jsonfile": {"errors"},
    "metadata": {"errors"},
    "spec": {*BASE, "jsonfile"},
    "space_layers": {*BASE, "spec"},
    "space": {*BASE, "spec", "space_layers"},
    "models": {*BASE, "spec", "metadata"},
    "supernet": {*BASE, "spec", "space", "models"},
    "page": set(),
    "cost": {*BASE, "spec", "space"},
    "latency": {*BASE, "jsonfile", "console", "page", "spec", "space", "cost", "models", "zoo"},
    "search": {
        *BASE,
        "page",
        "spec",
        "space",
        "cost",
        "models",
        "supernet",
    },  # a cost is a callable, never a latency backend
    "compare": {*BASE, "page", "latency"},
    "zoo": {*BASE, "jsonfile", "spec", "metadata", "models"},
    "data": {*BASE},
    "timm_hook": {*BASE, "zoo"},
    "registry": set(),
}
ANYTHING = {"__init__", "mm"}
OPENMMLAB = {"mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg", "mim"}
# importable without torch
LIGHT = {"version", "errors", "files", "console", "jsonfile", "metadata", "spec", "space_layers", "space", "timm_hook"}
HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "cv2"}


def imported(source: str, module: str) -> Iterator[str]:
    """Absolute names of everything that a source imports, wherever the statement stands."""
    package = module if module.endswith("__init__") else module.rpartition(".")[0]
    package = package.removesuffix(".__init__")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def unit_of(name: str) -> str:
    """The unit of the package that an absolute name is in; names of the package itself are in ``__init__``."""
    second = name.split(".")[1] if "." in name else "__init__"
    return second if second in ALLOWED or second in ANYTHING or (PACKAGE / second).is_dir() else "__init__"


def faults(source: str, module: str) -> list[str]:
    """What the source of ``module`` imports against the rules."""
    parts = module.split(".")
    unit = parts[1] if len(parts) > 1 else "__init__"
    found = []
    for name in imported(source, module):
        top = name.partition(".")[0]
        if top in OPENMMLAB and unit not in ("mm", "registry"):
            found.append(f"{module} imports {name}: only registry.py and mm/ may")
        if top in HEAVY and unit in LIGHT:
            found.append(f"{module} imports {name}: it must work without")
        if top == "prunet_zoo" and unit not in ANYTHING and unit_of(name) not in {unit, *ALLOWED.get(unit, set())}:
            found.append(f"{module} imports {name}: {unit} may import {sorted(ALLOWED.get(unit, set()))}")
    return found


def modules() -> list[tuple[str, Path]]:
    paths = sorted(p for p in PACKAGE.rglob("*.py") if ".mim" not in p.parts)
    return [(".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts), p) for p in paths]


def test_every_unit_has_a_rule() -> None:
    units = {name.split(".")[1] for name, _ in modules()}
    assert units <= set(ALLOWED) | ANYTHING, "say in ALLOWED what the new unit may import"


def test_the_rules_themselves_have_no_cycle() -> None:
    assert list(TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_run_one_way(module: str, path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("prunet_zoo.spec", "from prunet_zoo.models import create_model", True),
        ("prunet_zoo.spec", "import torch", True),
        ("prunet_zoo.spec", "def f():\n    from timm.layers import DropPath", True),
        ("prunet_zoo.space", "from prunet_zoo.spec import NetSpec", False),
        ("prunet_zoo.models.blocks", "from prunet_zoo import supernet", True),
        ("prunet_zoo.models.blocks", "from . import layers", False),
        ("prunet_zoo.models.blocks", "from ..supernet import prunode", True),
        ("prunet_zoo.models.__init__", "from .blocks import build_block", False),
        ("prunet_zoo.models.blocks", "from prunet_zoo import create_model", True),
        ("prunet_zoo.search.tiered", "def f():\n    import prunet_zoo.latency.table as t", True),
        ("prunet_zoo.search.tiered", "import importlib\nimportlib.import_module('prunet_zoo.latency')", True),
        ("prunet_zoo.data.digits", "from prunet_zoo.spec import NetSpec", True),
        ("prunet_zoo.data.digits", "from prunet_zoo.errors import DataError", False),
        ("prunet_zoo.latency.timing", "try:\n    import mmengine\nexcept ImportError:\n    pass", True),
        ("prunet_zoo.mm.backbone", "import mmengine\nfrom prunet_zoo import models", False),
        ("prunet_zoo.registry", "from mmengine import registry", False),
    ],
)
def test_the_check_sees_what_it_should(module: str, source: str, forbidden: bool) -> None:
    assert bool(faults(source, module)) is forbidden


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_import_without_mmengine_is_cheap() -> None:
    heavy = sorted(HEAVY | OPENMMLAB)
    code = BLOCK.format(names=["mmengine"]) + (
        "import prunet_zoo\n"
        "print(prunet_zoo.load_spec('prunet_p0').params(), prunet_zoo.load_space('prunet_gpu').count() > 0)\n"
        f"print([name for name in {heavy!r} if sys.modules.get(name)])\n"
    )
    assert run(code).splitlines() == ["22815080 True", "[]"]


def test_import_with_mmengine_loads_neither_mmcv_nor_mmdet() -> None:
    assert run("import sys, prunet_zoo; print('mmdet' in sys.modules, 'mmcv' in sys.modules)") == "False False"


def test_models_and_weights_need_torch_and_timm_alone() -> None:
    names = [*sorted(OPENMMLAB), "sklearn", "matplotlib", "onnx", "onnxruntime", "onnxscript", "cv2", "tensorboard"]
    code = BLOCK.format(names=names) + (
        "import tempfile, os, torch, prunet_zoo\n"
        "spec = prunet_zoo.load_space('prunet_cpu_small')\n"
        "model = prunet_zoo.create_model(spec.decode(spec.largest())).eval()\n"
        "path = os.path.join(tempfile.mkdtemp(), 'w.safetensors')\n"
        "prunet_zoo.save_weights(path, model.state_dict(), model.spec)\n"
        "x = torch.randn(1, 3, 32, 32)\n"
        "print(torch.equal(prunet_zoo.create_model(path).eval()(x), model(x)))\n"
    )
    assert run(code) == "True"


def test_the_lazy_names_are_there() -> None:
    import prunet_zoo

    for name in prunet_zoo.__all__:
        assert getattr(prunet_zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = prunet_zoo.creat_model
