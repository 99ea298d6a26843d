"""A zoo of one tiny model, ``tiny``: its archive is a zip with a safetensors file in it; no torch, so that processes
start quickly. ``python bench.py SPEC URL NAME…`` runs tools/download.py in that zoo."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.modules["mmengine"] = None  # type: ignore[assignment]  # the import is cheap without

import numpy as np
from safetensors.numpy import save

from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo import fetch, index
from prunet_zoo.zoo.index import ModelEntry

if TYPE_CHECKING:
    import pytest
    from server import Server

ROOT = Path(__file__).resolve().parents[2]
FILE = "tiny_21.12.0.zip"
SPEC = {
    "name": "tiny",
    "input_size": 32,
    "stages": [{"blocks": [{"type": "conv", "out_channels": 8, "stride": 2}]}],
    "tail": {"out_channels": 16},
    "num_classes": 10,
}


def write_spec(folder: Path) -> Path:
    """The spec of ``tiny``, as a file."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(SPEC))
    return path


def weights(seed: int = 0, spec: dict[str, Any] | None = None, size: int = 40_000) -> bytes:
    """A safetensors file with ``size`` random numbers."""
    numbers = np.frombuffer(random.Random(seed).randbytes(4 * size), dtype=np.int32)
    return save({"numbers": numbers}, metadata={} if spec is None else {"spec": json.dumps(spec)})


def archive(seed: int = 0, spec: dict[str, Any] | None = None, year: int = 2022) -> bytes:
    """A zip as it is published, always of the same bytes; another ``year``: packed anew."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr(zipfile.ZipInfo("tiny.safetensors", (year, 5, 1, 0, 0, 0)), weights(seed, spec or SPEC))
    return memory.getvalue()


def convert_checkpoint(source: str | Path, name: str, out: str | Path, published: bool = False) -> Path:
    """Stands in for the real conversion, which has tests of its own: unpacks, and refuses what is damaged."""
    assert published, "the licence of what was downloaded is that of the index"
    try:
        with zipfile.ZipFile(source) as file, file.open("tiny.safetensors") as inner, open(out, "wb") as outer:
            shutil.copyfileobj(inner, outer)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    return Path(out)


def make_zoo(patch: Any, spec: Path, url: str, sha256: str | None = None) -> ModelEntry:
    """Replace index and conversion; ``patch`` has ``setattr`` and ``setitem`` like pytest's monkeypatch."""
    entry = ModelEntry(
        name="tiny",
        arch=str(spec),
        config="none.py",
        classes=tuple("0123456789"),
        preprocess=index.Preprocess(input_size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        weights=index.Weights(file=FILE, url=url, sha256=sha256, licence="Apache-2.0", origin="a test"),
    )
    convert = types.ModuleType("prunet_zoo.zoo.convert")
    convert.convert_checkpoint = convert_checkpoint  # type: ignore[attr-defined]
    patch.setitem(sys.modules, convert.__name__, convert)
    from prunet_zoo.zoo import create, listing

    models = {"tiny": entry, **{name: e for name, e in index.load_index().items() if e.bundled}}
    for module in (index, create, listing):
        patch.setattr(module, "load_index", lambda: models)
    return entry


ARCHIVE = archive()
SHA = hashlib.sha256(ARCHIVE).hexdigest()


class Zoo:
    """The tiny zoo, its server and its weights folder."""

    def __init__(self, server: Server, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.server, self.patch = server, patch
        self.spec = write_spec(folder)
        self.url = server.add(f"/up/{FILE}", ARCHIVE)
        self.home = folder / "home"
        patch.setenv("PRUNET_HOME", str(self.home))
        patch.delenv("PRUNET_MIRROR", raising=False)
        patch.setattr(fetch, "RETRY", fetch.Retry(base=0.0, timeout=5.0))
        self.list()

    def list(self, sha256: str | None = None) -> None:
        self.entry = make_zoo(self.patch, self.spec, self.url, sha256)

    @property
    def ready(self) -> Path:
        return self.home / "tiny.safetensors"

    @property
    def archive(self) -> Path:
        return self.home / FILE

    @property
    def record(self) -> Path:
        return self.home / f"{FILE}.sha256"

    def change(self, seed: int = 1) -> bytes:
        """Put another file upstream."""
        data = archive(seed)
        self.server.add(f"/up/{FILE}", data)
        return data

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """tools/download.py in a process of its own."""
        command = [sys.executable, __file__, str(self.spec), self.url, *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)

    def check(self) -> None:
        """The weights are right or absent, and nothing is left that could be taken for them."""
        if self.ready.exists():
            assert self.ready.read_bytes() in (weights(0, SPEC), weights(1, SPEC))
            assert self.record.exists() or self.entry.weights.sha256, "made by download, but not recorded"
        names = {p.name for p in self.home.iterdir()} if self.home.is_dir() else set()
        known = ("", ".sha256", ".lock", ".part", ".part.json")
        assert names <= {"tiny.safetensors", *(FILE + ending for ending in known)}
        if self.archive.exists() and self.record.exists():
            assert self.record.read_text().split()[0] == hashlib.sha256(self.archive.read_bytes()).hexdigest()


class _Patch:
    setattr = staticmethod(setattr)

    @staticmethod
    def setitem(mapping: dict[str, Any], key: str, value: Any) -> None:
        mapping[key] = value


STEPS = ("before the conversion", "while converting", "converted", "installed", "recorded", "ready")


def die_when(step: str) -> None:
    """Let this process be killed at a step of a download."""
    from prunet_zoo.zoo import download, partial

    def die(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_for(name: str, function: Any) -> Any:
        return lambda path, *args, **more: (die if Path((path, *args)[-1]).name == name else function)(
            path, *args, **more
        )

    def die_writing(source: Path, name: str, out: Path, published: bool) -> Path:
        out.with_name(f".{out.name}.x7_.tmp").write_bytes(b"half")
        out.write_bytes(b"half")
        die()
        return out

    module: Any = sys.modules["prunet_zoo.zoo.convert"]
    if step == "before the conversion":
        module.convert_checkpoint = die
    elif step == "while converting":
        module.convert_checkpoint = die_writing
    elif step == "converted":
        partial.Part.install = die  # type: ignore[method-assign]
    elif step == "installed":
        download.write_record = die
    elif step == "recorded":
        os.replace = die_for("tiny.safetensors", os.replace)
    elif step == "ready":
        Path.unlink = die_for(FILE, Path.unlink)  # type: ignore[method-assign]


if __name__ == "__main__":
    make_zoo(_Patch, Path(sys.argv[1]), sys.argv[2])
    die_when(os.environ.get("BENCH_DIES", ""))
    tool = str(ROOT / "tools" / "download.py")
    sys.argv = [tool, *sys.argv[3:]]
    runpy.run_path(tool, run_name="__main__")
