"""What is built can be installed and used: wheel, source archive, editable install."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import prunet_zoo

ROOT = Path(__file__).parents[1]
MIM = {"configs", "tools", "model-index.yml"}
DEMO = {"checkpoints/digits_classifier.safetensors", "checkpoints/digits_detector.safetensors"}

pytest.importorskip("setuptools", minversion="70.1")  # the first that builds wheels alone


def build(tree: Path, hook: str) -> Path:
    """Call a hook of PEP 517 as pip does; return the file that was made."""
    out = tree / "out"
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; print('made:' + b.{hook}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.rpartition("made:")[2].strip()


def copy_tree(target: Path) -> Path:
    skip = shutil.ignore_patterns(
        ".git", ".venv*", ".mim", "*_cache", ".hypothesis", "__pycache__", "work_dirs", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, target, ignore=lambda d, n: {*skip(d, n), *({"data"} & set(n) if d == str(ROOT) else ())})
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("wheel") / "tree")
    cache = tree / "tools" / "__pycache__"  # what a used checkout has and a wheel must not
    cache.mkdir()
    (cache / "search.pyc").touch()
    return build(tree, "build_wheel")


def relevant(folder: Path) -> set[str]:
    return {
        str(p.relative_to(ROOT))
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")
    }


def test_wheel_holds_package_data_and_mim(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("archs", "spaces", "zoo"):
        files = {f"prunet_zoo/{folder}/{p.name}" for p in (ROOT / "prunet_zoo" / folder).glob("*.json")}
        assert files
        assert files <= names
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "prunet_zoo").rglob("*.py") if ".mim" not in p.parts}
    assert sources == {n for n in names if n.endswith(".py") and ".mim" not in n}
    mim = {n.removeprefix("prunet_zoo/.mim/") for n in names if n.startswith("prunet_zoo/.mim/")}
    assert mim == relevant(ROOT / "configs") | relevant(ROOT / "tools") | {"model-index.yml"} | DEMO
    assert "prunet_zoo/py.typed" in names
    assert not [n for n in names if "__pycache__" in n or n.startswith(("tests/", "docs/"))]


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        meta = Parser().parsestr(archive.read(name).decode())
    assert meta["Version"] == prunet_zoo.__version__
    assert meta["Requires-Python"] == ">=3.10"
    needs = meta.get_all("Requires-Dist", [])
    plain = {re.split(r"[ <>=;\[]", n)[0] for n in needs if "extra ==" not in n}
    assert {"torch", "torchvision", "timm", "pydantic", "safetensors", "rich"} <= plain
    assert not plain & {"mmengine", "mmdet", "mmcv", "mmcv-lite", "onnx", "pytest"}
    assert set(meta.get_all("Provides-Extra", [])) == {"mm", "export", "openvino", "prune", "dev", "all", "onedl"}


def test_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.modules['mmengine'] = None\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import prunet_zoo, pathlib\n"
        "home = pathlib.Path(prunet_zoo.__file__).parent\n"
        "print(home, prunet_zoo.load_spec('prunet_p1').params(), sorted(p.name for p in (home / '.mim').iterdir()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{tmp_path / 'site' / 'prunet_zoo'} 39905672 {sorted({*MIM, 'checkpoints'})}"


def test_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    archive = build(copy_tree(tmp_path / "tree"), "build_sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert (tree / "LICENSE").exists()
    again = build(tree, "build_wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_editable_install_links_and_can_be_repeated(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    for _ in range(2):
        build(tree, "build_editable")
        mim = tree / "prunet_zoo" / ".mim"
        assert {p.name for p in mim.iterdir()} == MIM
        assert all(p.is_symlink() and p.resolve() == tree / p.name for p in mim.iterdir())
    wheel = build(tree, "build_wheel")  # the links must not be followed into the wheel, nor removed with their targets
    assert (tree / "configs").is_dir()
    assert not any(".mim/tools/tools" in n for n in zipfile.ZipFile(wheel).namelist())


def test_constraints_pin_every_direct_requirement() -> None:
    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[ <>=;\[]", line.strip())[0].lower().replace("_", "-") for line in lines}

    lines = [ln for ln in (ROOT / "constraints.txt").read_text().splitlines() if ln.strip() and not ln.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (>=|<) "3\.11")?', line) for line in lines)
    setup = (ROOT / "setup.py").read_text()
    wanted = re.findall(r'^\s+"([a-z][\w-]*[<>=][^"]*)",?|"([a-z][\w-]*>=[\d.]+)"', setup, re.MULTILINE)
    direct = names([a or b for a, b in wanted])
    assert {"torch", "mmdet", "mmcv-lite", "setuptools", "onnxruntime", "pytest"} <= direct
    forks = {name for name in direct if name.startswith("onedl-")}  # another environment, with other versions below
    assert len(forks) == 3 and direct - forks <= names(lines)
    pins = {line.split(" ")[0] for line in lines}
    assert {"torch==2.11.0", "torchvision==0.26.0", "mmengine==0.10.7", "mmdet==3.3.0", "mmcv-lite==2.1.0"} <= pins
    assert not [line for line in lines if line.startswith(("nvidia-", "triton", "cuda-"))]


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{prunet_zoo.__version__}]" in text


def test_index_is_valid_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert all((ROOT / path).exists() for path in index["Import"])
