"""Pickles from elsewhere: code is never run, and none takes more memory than its file has."""

from __future__ import annotations

import argparse
import codecs
import collections
import io
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import MEMBER, STATE, is_state, refused, zipped
from synthetic import saved

from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo import pickles
from prunet_zoo.zoo.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("temporary")


class Hostile:
    """A pickle that would run a command when it is loaded."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a zip"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip format", "legacy format"])
@pytest.mark.parametrize("place", ["state_dict", "args", "beside", "namespace"])
def test_code_is_refused_and_not_run(place: str, legacy: bool, inside: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil: Any = Hostile(os.mkdir, str(marker))
    data = {
        "state_dict": {"state_dict": evil},
        "args": {"state_dict": STATE, "args": evil},
        "beside": {**STATE, "x": evil},
        "namespace": {"state_dict": STATE, "args": argparse.Namespace(x=evil)},
    }[place]
    raw = saved(data, legacy)
    text = refused(tmp_path / "x.zip", zipped((MEMBER, raw)) if inside else raw, "is refused: its pickle refers to")
    assert f"{os.mkdir.__module__}.mkdir, which is not on the list of plain types" in text and "it was not run" in text
    assert not marker.exists()


@pytest.mark.parametrize("call", [eval, exec, getattr, __import__, print])
def test_builtins_are_refused(call: Callable[..., Any], tmp_path: Path) -> None:
    refused(
        tmp_path / "x",
        saved({**STATE, "x": Hostile(call, "1")}),
        f"refers to builtins.{call.__name__}, which is not on",
    )


@pytest.mark.parametrize("protocol", range(5))
def test_plain_pickles_are_not_opened(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    refused(tmp_path / "x", pickle.dumps(Hostile(os.mkdir, str(marker)), protocol), "no checkpoint; it begins with")
    assert not marker.exists()


def test_a_tar_that_passes_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path, magic = tmp_path / "x", saved(STATE, legacy=True)[:15]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        file.addfile(tarfile.TarInfo(magic.decode("latin-1")))
    assert path.read_bytes().startswith(magic)
    refused(path, path.read_bytes(), "is a tar archive that looks like a torch checkpoint")


def test_classes_are_allowed_in_no_other_place(tmp_path: Path) -> None:
    before = list(torch.serialization.get_safe_globals())
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"state_dict": STATE, "args": argparse.Namespace(a=1)}))
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([np.dtype])  # by somebody else, and of those that are allowed here too
        assert is_state(read_checkpoint(path))
        assert torch.serialization.get_safe_globals() == [np.dtype]
        with pytest.raises(pickle.UnpicklingError, match="Namespace"):
            torch.load(path, weights_only=True)
        path.write_bytes(saved({"x": Hostile(os.getpid)}))
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert torch.serialization.get_safe_globals() == [np.dtype]
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_threads_take_turns(tmp_path: Path) -> None:
    """torch has one list of allowed classes for all of them."""
    path, before = tmp_path / "x.pth", torch.serialization.get_safe_globals()
    path.write_bytes(saved({"state_dict": STATE, "args": argparse.Namespace(a=1)}))
    with ThreadPoolExecutor(4) as pool:
        assert all(is_state(state) for state in pool.map(read_checkpoint, [path] * 200))
    assert sorted(map(str, torch.serialization.get_safe_globals())) == sorted(map(str, before))  # torch keeps a set


def test_numpy_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    from numpy._core import multiarray

    refused(
        tmp_path / "x",
        saved({**STATE, "x": Hostile(multiarray.scalar, np.dtype("O"), [1])}),
        "ObjectDType|numpy's numbers",
    )


ABSURD = [8, 1000, 2**31 - 1, 2**40, 2**62, 2**63 - 1, 2**64, 2**70]


def with_size(data: bytes, old: int, new: int) -> bytes:
    """A pickle in which every integer ``old`` (below 256) is ``new``."""
    return data.replace(b"K" + bytes([old]), pickle.dumps(new, 2)[2:-1])


@pytest.mark.parametrize("size", ABSURD)
@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a zip"])
def test_declared_sizes_beyond_the_file(size: int, inside: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.arange(201.0), "z": torch.zeros(2)}))) as file:
        entries = [(e.filename, file.read(e)) for e in file.infolist()]
    raw = zipped(*((name, with_size(data, 201, size) if name.endswith("data.pkl") else data) for name, data in entries))
    path = tmp_path / "x.pth"
    if size < 201:
        path.write_bytes(raw)
        assert read_checkpoint(path)["a"].shape == (size,)
        return
    refused(path, zipped((MEMBER, raw)) if inside else raw, "is damaged, truncated or no plain checkpoint")


@pytest.mark.parametrize("size", ABSURD)
def test_declared_sizes_beyond_the_file_in_the_legacy_format(size: int, tmp_path: Path) -> None:
    raw = with_size(saved({"a": torch.arange(201.0)}, legacy=True), 201, size)
    refused(tmp_path / "x.pth", raw, "is damaged, truncated or no plain checkpoint")


def test_a_tensor_that_is_larger_than_its_data(tmp_path: Path) -> None:
    for size in (2, 10**6, 10**12):
        raw = saved({"a": torch.zeros(1).expand(size)})
        refused(tmp_path / "x.pth", raw, rf"tensor 'a' of \[{size}\] is larger than the data")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_asks_for_memory(legacy: bool, tmp_path: Path) -> None:
    refused(
        tmp_path / "x.pth", saved({**STATE, "x": Hostile(bytearray, 10**13)}, legacy), "refers to builtins.bytearray"
    )


def allocated(path: Path, message: str, member: str | None = MEMBER) -> int:
    """Bytes that Python took at most while a file was refused."""
    tracemalloc.start()
    try:
        refused(path, path.read_bytes(), message, member)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def doubled(times: int, codec: str = "hex") -> Hostile | str:
    text: Hostile | str = "x" * 10
    for _ in range(times):
        text = Hostile(codecs.encode, text, codec)
    return text


@pytest.mark.parametrize("legacy", [False, True], ids=["zip format", "legacy format"])
def test_encode_is_for_bytes_alone(legacy: bool, tmp_path: Path) -> None:
    """Of protocol 2: ``encode(text, 'latin1')``. Any other codec may give a text that is longer than the first."""
    path = tmp_path / "x.pth"
    path.write_bytes(saved({**STATE, "x": doubled(21)}, legacy))
    assert path.stat().st_size < 4000
    assert allocated(path, "makes calls that torch.save writes for no") < 5_000_000  # loaded: 40 MB
    long = "ä" * 300
    for content in (
        {"codec, put aside": ["hex", Hostile(codecs.encode, "x", "hex")]},
        {"encode, put aside": [Hostile(codecs.encode, "x", "latin1"), Hostile(codecs.encode, "x", "hex")]},
        {"codec of another name": Hostile(codecs.encode, "x", "latin-1")},
        {"no codec": Hostile(codecs.encode, "x")},
        {"a long text twice": [Hostile(codecs.encode, long, "latin1"), Hostile(codecs.encode, long, "latin1")]},
        {"not called": codecs.encode},
    ):
        refused(path, saved({**STATE, "x": content}, legacy), "makes calls that torch.save writes for no")


def test_codecs_in_disguise(tmp_path: Path) -> None:
    """A text that is put aside as 'latin1' and replaced, or no text at all."""
    path = tmp_path / "x.pth"
    good = saved({**STATE, "x": [b"first", b"second"]})
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="1 of 4 values are not tensors"):  # its pickle is in order
        read_checkpoint(path)
    begin = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT
    encode, text, hexed = b"c_codecs\nencode\n", b"X\x01\0\0\0x", b"X\x03\0\0\0hex"
    latin = b"X\x06\0\0\0latin1"
    for body in (
        encode + text + latin + b"q\x01" + b"\x86R" + encode + text + hexed + b"q\x01h\x01\x86R",
        encode + text + b"U\x03hex\x86R",
        encode + text + latin + b"]\x87R",
        encode + b"q\x01]h\x01" + text + hexed + b"\x86R",
        encode + b"(" + text + hexed + b"tR",
        text + hexed + b"\x86q\x01" + encode + b"h\x01R",
        b"\x8c\x07_codecs\x8c\x06encode\x93" + text + hexed + b"\x86R",
        text + b"2" + hexed,
    ):
        refused(path, with_pickle(good, begin + text + body + b"s."), "makes calls|torch.save writes no operation")


def with_pickle(data: bytes, pickled: bytes, name: str = "data.pkl") -> bytes:
    """A file of torch.save with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = [(e.filename, file.read(e)) for e in file.infolist()]
    return zipped(*((n.replace("data.pkl", name), pickled if n.endswith("data.pkl") else d) for n, d in entries))


def test_a_pickle_under_a_name_in_capitals(tmp_path: Path) -> None:
    """torch finds it, so it must be looked at."""
    evil = pickle.dumps({"x": Hostile(bytearray, 10**13)}, 2)
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as file:
        entries = [(e.filename, file.read(e)) for e in file.infolist()]
    refused(tmp_path / "x.pth", zipped(("archive/DATA.PKL", evil), *entries), "refers to builtins.bytearray")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip format", "legacy format"])
def test_nothing_goes_through_a_tensor_that_declares_more_than_it_has(legacy: bool, tmp_path: Path) -> None:
    long, pairs = torch.zeros(1).expand(10**6), torch.zeros(1).expand(10**6, 2)
    path = tmp_path / "x.pth"
    for evil in (
        Hostile(set, long),
        Hostile(collections.Counter, long),
        Hostile(torch.Size, long),
        Hostile(collections.OrderedDict, pairs),
    ):
        content: Any = {**STATE, "x": evil}
        path.write_bytes(saved(content, legacy))
        assert allocated(path, "is refused") < 5_000_000
    for name, state in (("argparse\nNamespace", "N"), ("collections\nOrderedDict", "R")):
        made = f"c{name}\n)".encode() + (b"\x81" if state == "N" else b"R")
        body = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + b"X\x01\0\0\0x" + made
        whole = saved({"x": torch.zeros(1)})
        for value in (b"(K\x01K\x02t", b"h\x01", b"]", b"K\x01\x85"):
            refused(path, with_pickle(whole, body + b"q\x01" + value + b"bs."), "makes calls that torch.save")
        refused(path, with_pickle(whole, body + b"q\x01h\x01\x81s."), "makes calls that torch.save")


def test_storages_are_not_called(tmp_path: Path) -> None:
    for kind in (torch.storage.UntypedStorage, torch.FloatStorage):
        refused(tmp_path / "x", saved({**STATE, "x": Hostile(kind, 10**9)}), "makes calls that torch.save")


def test_a_pickle_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST", 500)
    refused(tmp_path / "x", saved({str(i): torch.zeros(1) for i in range(9)}), "its pickle is larger than 500 bytes")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip format", "legacy format"])
def test_what_training_checkpoints_hold_is_taken(legacy: bool, tmp_path: Path) -> None:
    numbers = [np.float64(1), np.float64(2), np.float32(1), np.int64(3), np.bool_(True), np.bool_(True), np.uint8(7)]
    args = argparse.Namespace(a=[1, None, 2.5, 10**20, b"bytes", b"bytes", "latin1"], d={"x": (1, 2, 3, 4)}, e={})
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()  # with its metadata
    state["parameter"] = torch.nn.Parameter(torch.zeros(2))
    state["half"] = torch.zeros(2, dtype=torch.bfloat16)
    rest = {"numbers": numbers, "args": args, "kind": torch.float32, "device": torch.device("cpu"), "text": "ä" * 999}
    rest["empty"] = collections.OrderedDict(a=collections.OrderedDict())
    path = tmp_path / "x.pth"
    path.write_bytes(saved({"state_dict": state, **rest}, legacy))
    found = read_checkpoint(path)
    assert set(found) == set(state) and all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Path("x"), "PosixPath"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (np.zeros(3), "_reconstruct"),
        (torch.zeros(3).to_sparse(), "_rebuild_sparse_tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_unusual_types_are_named(value: Any, name: str, tmp_path: Path) -> None:
    text = refused(tmp_path / "x", saved({"state_dict": STATE, "args": value}), f"{name}, which is not on the list of")
    assert "save the state dict alone" in text
