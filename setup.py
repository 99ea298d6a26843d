"""Packaging of prunet_zoo.

``configs/``, ``tools/`` and ``model-index.yml`` are installed as ``prunet_zoo/.mim/``, where OpenMMLab's tools look for
them: as symbolic links by an editable install, as copies in a wheel. A wheel also has the two demo networks there.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM = ("configs", "tools", "model-index.yml")
DEMO = ("checkpoints/digits_classifier.safetensors", "checkpoints/digits_detector.safetensors")

REQUIRES = [
    "torch>=2.4",
    "torchvision>=0.19",
    "timm>=1.0.9",
    "pydantic>=2.4",
    "safetensors>=0.4.3",
    "rich>=13.0",
    "scipy>=1.10",
    "matplotlib>=3.7",
    "scikit-learn>=1.3",
    "numpy>=1.23",
    "pillow>=9.4",
    "filelock>=3.12",
    "pyyaml>=6.0",
]
EXTRAS = {
    # mmcv-lite needs no compiler; a compiled mmcv serves as well
    "mm": [
        "mmengine>=0.10.7,<0.11",
        "mmdet>=3.3.0,<3.4",
        "mmcv-lite>=2.1.0,<2.2",  # mmdet 3.3 refuses 2.2
        "pycocotools>=2.0.7",
        "tensorboard>=2.14",
        "setuptools<82",  # mmengine 0.10.7 imports pkg_resources, which setuptools 82 dropped
    ],
    "export": ["onnx>=1.16", "onnxscript>=0.1", "onnxruntime>=1.18"],
    "openvino": ["onnx>=1.16", "onnxscript>=0.1", "openvino>=2025.0"],
    "prune": ["torch-pruning>=1.6,<2"],  # networks that are no specs: timm's and others
    "dev": ["pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.90", "ruff>=0.6", "mypy>=1.10", "pre-commit>=3.5"],
}
EXTRAS["all"] = [requirement for extra in EXTRAS.values() for requirement in extra]
# the maintained forks, instead of "mm": they have the same import names, so an environment holds one or the other
EXTRAS["onedl"] = [
    "onedl-mmengine>=0.10.12,<0.11",
    "onedl-mmcv>=2.3.6,<2.4",
    "onedl-mmdetection>=3.5.1,<3.6",
    "pycocotools>=2.0.7",
    "tensorboard>=2.14",
]


def read_version() -> str:
    """The version as text: importing the package here would need its dependencies."""
    text = (ROOT / "prunet_zoo" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('prunet_zoo/version.py must have a line __version__ = "…"')
    return found[1]


def remove(path: Path) -> None:
    """Delete a file, a link (never what it points to) or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder without caches."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
    else:
        shutil.copy2(source, target)


class BuildPyWithMim(build_py):
    """`build_py` that also installs ``.mim/``."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, "editable_mode", False)
        base = ROOT / "prunet_zoo" if editable else Path(self.build_lib) / "prunet_zoo"
        for name in MIM if editable else MIM + DEMO:
            source, target = ROOT / name, base / ".mim" / name
            remove(target)
            if editable:
                try:
                    target.parent.mkdir(exist_ok=True)
                    target.symlink_to(Path("..") / ".." / name, target_is_directory=source.is_dir())
                    continue
                except OSError:  # Windows without the right to make links
                    remove(target)
            copy(source, target)


setup(
    name="prunet_zoo",
    version=read_version(),
    description="PruNet model zoo: latency-aware architecture search, classifiers and mmdet backbones",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["prunet_zoo", "prunet_zoo.*"]),
    package_data={
        "prunet_zoo": [
            "archs/*.json",
            "spaces/*.json",
            "zoo/*.json",
            "latency/*.json",
            "latency/devices/*.json",
            "py.typed",
        ]
    },
    include_package_data=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildPyWithMim},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
