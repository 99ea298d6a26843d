"""Files from elsewhere: every form is read alike; what is damaged or hostile is refused with its reason, code is never
run, and nothing is left behind."""

from __future__ import annotations

import argparse
import errno
import io
import os
import pickle
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from synthetic import saved

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.files import WriteError
from prunet_zoo.zoo import archive
from prunet_zoo.zoo.checkpoint import pick_state, read_checkpoint

STATE = {"a": torch.arange(7.0), "b.weight": torch.randn(3, 5), "b.count": torch.tensor(4)}
MEMBER = "0.5ms-D.pth.tar"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder for temporary files: empty after each test, whatever was read in it."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def zipped(
    *entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
        file.comment = comment
    return buffer.getvalue()


def is_state(found: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(STATE) and all(torch.equal(found[k], v) for k, v in STATE.items())


def refused(path: Path, data: bytes, message: str, member: str | None = MEMBER) -> str:
    """Write ``data`` and check that it is refused with the path and ``message`` (a pattern); returns the whole text."""
    path.write_bytes(data)
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path, member)
    assert str(caught.value).startswith((str(path), f"checkpoint {path}"))
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


GOOD = {
    "torch": lambda: saved(STATE),
    "torch, legacy": lambda: saved(STATE, legacy=True),
    "safetensors": lambda: safetensors_bytes(STATE),
    "zip": lambda: zipped((MEMBER, saved(STATE))),
    "zip, deflated": lambda: zipped((MEMBER, saved(STATE)), method=zipfile.ZIP_DEFLATED),
    "zip, legacy": lambda: zipped((MEMBER, saved(STATE, legacy=True))),
    "zip, safetensors": lambda: zipped((MEMBER, safetensors_bytes(STATE))),
    "zip, in a folder": lambda: zipped(("a/", b""), (f"a/{MEMBER}", saved(STATE)), ("a/other.pth", b"x")),
    "zip, another name": lambda: zipped(("README.md", b"x"), ("other.PTH", saved(STATE))),
    "zip, made by macOS": lambda: zipped(
        ("other.pth", saved(STATE)), ("__MACOSX/._other.pth", b"x"), ("._b.pth", b"x")
    ),
    "zip with a comment": lambda: zipped((MEMBER, saved(STATE)), comment=b"a comment"),
    "training checkpoint": lambda: saved({"state_dict": STATE, "args": argparse.Namespace(a=1, b=["x", {"c": None}])}),
}


@pytest.mark.parametrize("form", GOOD)
def test_every_form_gives_the_same(form: str, tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(GOOD[form]())
    found = read_checkpoint(path, MEMBER)
    path.unlink()
    assert is_state(found)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(sorted(GOOD)), data=st.data())
def test_cut_off_anywhere_it_is_refused(form: str, data: st.DataObject, tmp_path: Path, temporary: Path) -> None:
    whole, path = GOOD[form](), tmp_path / "any"
    # the ends of what is nested are where a part could pass for the whole
    marks = [m.end() for m in re.finditer(rb"PK\x05\x06", whole)]
    near = st.sampled_from([m + d for m in marks for d in range(-4, 30)] or [len(whole) - 1])
    length = data.draw(st.one_of(st.integers(0, len(whole) - 1), near.map(lambda n: min(n, len(whole) - 1))))
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_checkpoint(path, MEMBER)
    assert list(temporary.iterdir()) == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from([f for f in sorted(GOOD) if f.startswith("zip")]), data=st.data())
def test_a_changed_byte_in_a_zip_never_changes_a_tensor(
    form: str, data: st.DataObject, tmp_path: Path, temporary: Path
) -> None:
    raw, path = bytearray(GOOD[form]()), tmp_path / "any"
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    try:
        found = read_checkpoint(path, MEMBER)
    except PrunetError:  # the usual end; a few bytes (dates, comments) change nothing
        return
    finally:
        assert list(temporary.iterdir()) == []
    assert is_state(found)


@pytest.mark.parametrize(
    "name",
    ["../x.pth", "a/../../x.pth", "/etc/x.pth", "C:\\x.pth", "c:x.pth", "\\\\server\\share\\x", "a\\..\\..\\x", ".."],
)
def test_entries_that_climb_out(name: str, tmp_path: Path) -> None:
    data = zipped((MEMBER, saved(STATE)), (name, b"x"))
    assert repr(name) in refused(tmp_path / "x.zip", data, "would climb out of its folder. Nothing was unpacked")


def test_names_with_dots_climb_nowhere(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped(("a..b/..c", b"x"), (f"a..b/{MEMBER}", saved(STATE))))
    assert is_state(read_checkpoint(tmp_path / "x.zip", MEMBER))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices(kind: int, tmp_path: Path) -> None:
    link = zipfile.ZipInfo(MEMBER)
    link.external_attr = (kind | 0o777) << 16
    refused(tmp_path / "x.zip", zipped((link, b"/etc/passwd")), "is a link or a device")


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped((MEMBER, saved(STATE)), (MEMBER, b"x"))
    refused(tmp_path / "x.zip", data, "several entries")


def test_a_zero_byte_in_a_name(tmp_path: Path) -> None:
    data = zipped(("aXb.pth", saved(STATE))).replace(b"aXb.pth", b"a\0b.pth")
    refused(tmp_path / "x.zip", data, "zero byte")


def test_encrypted(tmp_path: Path) -> None:
    raw = bytearray(zipped((MEMBER, b"x" * 40)))
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    refused(tmp_path / "x.zip", bytes(raw), "is encrypted; unpack it yourself")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_bound_on_memory(method: int, tmp_path: Path) -> None:
    refused(tmp_path / "x.zip", zipped((MEMBER, saved(STATE)), method=method), "only deflate is read")


def test_zip_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Iterator[bytes]:
        raise AssertionError("it was opened")

    bomb = zipped((MEMBER, bytes(50_000_000)), method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    plain = zipped((MEMBER, saved(STATE)))
    monkeypatch.setattr(archive, "_chunks", never)
    refused(tmp_path / "x.zip", bomb, "zip bomb: [0-9,]+ bytes would unpack to 50,000,000")
    monkeypatch.setattr(archive, "MAX_BYTES", 500)
    refused(tmp_path / "x.zip", plain, "at most 500 are read")
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    refused(tmp_path / "x.zip", zipped(*((f"{i}", b"") for i in range(4))), "4 entries, at most 3")


@pytest.mark.parametrize("declared", [1, 5_000_000, 49_999_999])
def test_a_bomb_that_declares_less_than_it_has(declared: int, tmp_path: Path) -> None:
    raw = bytearray(zipped((MEMBER, bytes(50_000_000)), method=zipfile.ZIP_DEFLATED))
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, declared)
    path = tmp_path / "x.zip"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is damaged \(Bad CRC|zip bomb"):
        read_checkpoint(path, MEMBER)


def test_a_bad_checksum(tmp_path: Path) -> None:
    for data, where in ((zipped((MEMBER, saved(STATE))), MEMBER), (saved(STATE), r"data/\d")):
        raw = bytearray(data)
        position = raw.index(STATE["a"].numpy().tobytes())
        raw[position] ^= 1
        refused(tmp_path / "x.zip", bytes(raw), rf"entry '.*{where}' is damaged \(Bad CRC-32")


def test_which_member_is_meant(tmp_path: Path) -> None:
    path, good = tmp_path / "x.zip", saved(STATE)
    text = refused(path, zipped(("a.pth", good), ("b.pth.tar", good)), "which one is meant is not clear")
    assert "'a.pth', 'b.pth.tar'" in text and repr(MEMBER) in text
    refused(path, zipped((f"a/{MEMBER}", good), (f"b/{MEMBER}", good)), "which one is meant is not clear")
    refused(path, zipped(("a.txt", b"x")), r"no checkpoint in it; .* it has 'a\.txt'")
    refused(path, zipped(("a.pth/", b"")), "no checkpoint in it; .* it is empty")
    refused(path, zipped(), "no checkpoint in it; .* it is empty")
    refused(path, zipped((MEMBER, b"")), "is empty")
    refused(path, zipped(("a.pth", good), ("b.pth", good)), "expected one file ending in", member=None)


def test_other_data_around_a_zip(tmp_path: Path) -> None:
    for form in ("zip", "torch"):
        good = GOOD[form]()
        refused(tmp_path / "x", good + b"more", "truncated, or with other data around it")
        refused(tmp_path / "x", zipped((MEMBER, b"x"))[:-22] + good, "other data around it|truncated or damaged")


def test_a_zip_in_the_zip(tmp_path: Path) -> None:
    inner = zipped((MEMBER, saved(STATE)))
    refused(tmp_path / "x.zip", zipped((MEMBER, inner)), rf"x\.zip: entry '{MEMBER}' is a zip inside a zip")
    climbing = zipped(("archive/data.pkl", b"x"), ("archive/../x", b"x"))
    refused(tmp_path / "x.zip", zipped((MEMBER, climbing)), "would climb out")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; get it again"),
        (b"<!DOCTYPE html><html>Not found</html>", "the error page of a server.*begins with b'<!DOCTYPE"),
        (b"\n <html><body>", "the error page of a server"),
        (b'{"requestStatus": {"statusCode": "NOT_FOUND"}}', "the error page of a server"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "begins with b'version https://git-lfs"),
        (b"\x1f\x8b\x08\x00", "of an unknown kind"),
        (b"x", "of an unknown kind"),
        (struct.pack("<Q", 2**60) + b"{}", "safetensors, but damaged or truncated"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_no_checkpoint(data: bytes, message: str, inside: bool, tmp_path: Path) -> None:
    if inside:
        data, message = zipped((MEMBER, data)), message.removesuffix("; get it again")
    refused(tmp_path / "x.zip", data, message)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.zip does not exist"):
        read_checkpoint(tmp_path / "none.zip")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_checkpoint(tmp_path)


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
    assert f"{os.mkdir.__module__}.mkdir, which could run code; it was not run" in text
    assert not marker.exists()


@pytest.mark.parametrize("call", [eval, exec, getattr, __import__, print])
def test_builtins_are_refused(call: Callable[..., Any], tmp_path: Path) -> None:
    refused(tmp_path / "x", saved({**STATE, "x": Hostile(call, "1")}), f"refers to (builtins.)?{call.__name__}")


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
    assert torch.serialization.get_safe_globals() == before


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
    refused(tmp_path / "x.pth", saved({**STATE, "x": Hostile(bytearray, 10**13)}, legacy), "calls bytearray")


@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a zip"])
def test_compressed_torch_files(inside: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as file:
        entries = [(e.filename, file.read(e)) for e in file.infolist()]
    raw = zipped(*entries, method=zipfile.ZIP_DEFLATED)
    raw = zipped((MEMBER, raw)) if inside else raw
    refused(tmp_path / "x.pth", raw, "is compressed, torch.save writes none")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds nothing"),
        ({"epoch": 3}, r"1 of 1 values are not tensors \('epoch' is a int\)"),
        ({"state_dict": {"x": 1, "y": torch.zeros(1)}}, r"key 'state_dict', is no state dict: 1 of 2"),
        ({"state_dict_ema": {}, "state_dict": STATE}, "key 'state_dict_ema', holds nothing"),
        ({"model": [1]}, "key 'model', holds a list"),
        ({3: torch.zeros(1)}, "1 of 1 values are not tensors"),
        ({"x": torch.zeros(3).to_sparse()}, "'x' is sparse"),
    ],
)
def test_files_without_a_state_dict(data: Any, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "x.pth", saved(data), message)


def test_a_tensor_named_like_a_key() -> None:
    assert set(pick_state({"model": torch.zeros(1), "x": torch.zeros(1)}, "here")) == {"model", "x"}


def test_a_full_disk_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.zip"
    path.write_bytes(GOOD["zip"]())
    original = open
    fake = lambda file, mode="r": Full() if mode == "xb" else original(file, mode)  # noqa: E731
    monkeypatch.setattr(archive, "open", fake, raising=False)
    with pytest.raises(WriteError, match=rf"cannot unpack '{MEMBER}' .*No space left on device.*TMPDIR"):
        read_checkpoint(path, MEMBER)
