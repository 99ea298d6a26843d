"""Zip files from elsewhere, read with distrust: one member is unpacked by name, after everything declared was checked.

Never ``extractall``. Sizes are limited as declared and as unpacked; only plain storage and deflate are read, because
the other methods unpack without a bound on memory.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from prunet_zoo.errors import CheckpointError, few
from prunet_zoo.files import WriteError

MAX_BYTES = 4 * 2**30  # of the unpacked member; a training checkpoint of the largest network has 0.7 GB
MAX_RATIO = 100  # of unpacked to packed size; weights have about 1.1
MAX_ENTRIES = 10_000
SUFFIXES = (".pth", ".pth.tar", ".pt", ".tar", ".safetensors")
_CHUNK = 2**20
_END, _END_SIZE = b"PK\x05\x06", 22  # end-of-central-directory record: signature, size without the comment
_DAMAGE = (  # what zipfile raises for bytes that are not as they should be
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file for reading.

    Raises:
        CheckpointError: it is truncated or has something before or behind it; it has too many entries; an entry leaves
            its folder, is a link or has the name of another.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is a zip file that is truncated or damaged ({error}); get it again") from None
    with archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise CheckpointError(f"{path} has {len(entries)} entries, at most {MAX_ENTRIES} are read")
        _check_bounds(path, archive)
        for entry in entries:
            reason = _suspicion(entry)
            if reason:
                raise CheckpointError(
                    f"{path} is refused: its entry {entry.orig_filename!r} {reason}. Nothing was unpacked."
                )
        twice = [name for name, count in Counter(e.filename for e in entries).items() if count > 1]
        if twice:
            raise CheckpointError(f"{path} is refused: it has several entries {twice[0]!r}. Nothing was unpacked.")
        yield archive


def _check_bounds(path: Path, archive: zipfile.ZipFile) -> None:
    """The first entry begins the file and the end record ends it: else a stored zip in the cut-off rest of an outer one
    would pass for the whole."""
    size, comment = path.stat().st_size, len(archive.comment)
    with open(path, "rb") as file:
        file.seek(max(0, size - _END_SIZE - comment))
        tail = file.read(_END_SIZE)
    whole = tail[:4] == _END and int.from_bytes(tail[20:22], "little") == comment
    if not whole or min((e.header_offset for e in archive.infolist()), default=0):
        raise CheckpointError(f"{path} is a zip file that is truncated, or with other data around it; get it again")


def _suspicion(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry is not to be trusted; None: it looks harmless."""
    name, mode = entry.orig_filename, entry.external_attr >> 16
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or PureWindowsPath(name).drive or ".." in parts:
        return "would climb out of its folder"
    if "\0" in name:
        return "has a zero byte in its name"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    return None


def is_torch_zip(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is itself a checkpoint in torch's zip format: one folder with ``data.pkl`` in it."""
    names = archive.namelist()
    folders = {name.partition("/")[0] for name in names}
    return len(folders) == 1 and f"{folders.pop()}/data.pkl" in names


def check_torch_zip(path: Path, archive: zipfile.ZipFile) -> None:
    """Check the sums of every entry of a torch checkpoint; torch itself does not.

    Raises:
        CheckpointError: an entry is damaged, or packed: torch writes plain ones, and maps them into memory.
    """
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: entry {entry.filename!r} is compressed, torch.save writes none like that")
        for _ in _chunks(path, archive, entry):
            pass


def find_member(path: Path, archive: zipfile.ZipFile, member: str | None) -> zipfile.ZipInfo:
    """The entry named ``member`` (in any folder), else the only checkpoint.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    files = [e for e in archive.infolist() if not e.is_dir() and not _is_finders(e.filename)]
    named = [e for e in files if member is not None and PurePosixPath(e.filename).name == member]
    found = named or [e for e in files if e.filename.lower().endswith(SUFFIXES)]
    if len(found) == 1:
        return found[0]
    wanted = f"{member!r} or one file" if member else "one file"
    has = f"it has {few(map(repr, [e.filename for e in found or files]))}" if files else "it is empty"
    problem = "which one is meant is not clear" if found else "there is no checkpoint in it"
    raise CheckpointError(f"{path}: {problem}; expected {wanted} ending in {', '.join(SUFFIXES)}; {has}")


def has_member(path: Path, member: str | None) -> bool:
    """Whether a file is a zip in which the checkpoint ``member`` lies (in any folder)."""
    if member is None or not zipfile.is_zipfile(path):
        return False
    with open_zip(path) as archive:
        return any(PurePosixPath(name).name == member for name in archive.namelist())


def _is_finders(name: str) -> bool:
    """Whether it is one of the files that macOS adds to a zip."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._")


def unpack(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write one entry to the file ``target``.

    Raises:
        CheckpointError: it is encrypted, too large, packed too tightly or in another way, or damaged.
        WriteError: the disk is full.
    """
    name = f"{path}: entry {entry.filename!r}"
    if entry.flag_bits & 0x1:
        raise CheckpointError(f"{name} is encrypted; unpack it yourself and give the file that was in it")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"{name} is compressed by method {entry.compress_type}; only deflate is read")
    if entry.file_size > MAX_BYTES:
        raise CheckpointError(f"{name} is refused: unpacked {entry.file_size:,} bytes, at most {MAX_BYTES:,} are read")
    if entry.file_size > MAX_RATIO * max(1, entry.compress_size):
        raise CheckpointError(
            f"{name} is refused as a zip bomb: {entry.compress_size:,} bytes would unpack to {entry.file_size:,}"
        )
    if entry.file_size == 0:
        raise CheckpointError(f"{name} is empty")
    try:
        with open(target, "xb") as file:
            for chunk in _chunks(path, archive, entry):
                file.write(chunk)
    except OSError as error:
        raise WriteError(
            f"cannot unpack {entry.filename!r} ({entry.file_size / 1e6:.0f} MB) to {target.parent}: "
            f"{error.strerror or error}; free some space there, or choose another folder for temporary files "
            "(environment variable TMPDIR)"
        ) from error


def _chunks(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of an entry; its checksum is checked, its size bounded by the declared one."""
    size = 0
    try:
        with archive.open(entry) as file:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if size > entry.file_size:  # zipfile itself stops there; this does not rely on it
                    raise zipfile.BadZipFile("more data than declared")
                yield chunk
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: entry {entry.filename!r} is damaged ({error}); get the file again") from None
    if size != entry.file_size:
        raise CheckpointError(f"{path}: entry {entry.filename!r} has {size} bytes instead of {entry.file_size}")
