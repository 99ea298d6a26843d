"""Files from elsewhere: every form is read alike; what is damaged or hostile is refused with its reason, and nothing is
left behind. Pickles that hold code or ask for memory: test_hostile_pickles.py."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import MEMBER, STATE, is_state, refused, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes
from synthetic import saved

from prunet_zoo.errors import CheckpointError, PrunetError
from prunet_zoo.files import WriteError
from prunet_zoo.zoo import archive
from prunet_zoo.zoo.checkpoint import pick_state, read_checkpoint

pytestmark = pytest.mark.usefixtures("temporary")
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


@pytest.mark.parametrize("inside", [False, True], ids=["bare", "in a zip"])
def test_compressed_torch_files(inside: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as file:
        entries = [(e.filename, file.read(e)) for e in file.infolist()]
    raw = zipped(*entries, method=zipfile.ZIP_DEFLATED)
    raw = zipped((MEMBER, raw)) if inside else raw
    refused(tmp_path / "x.pth", raw, "is compressed, torch.save writes none")


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
