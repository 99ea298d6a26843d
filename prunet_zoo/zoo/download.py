"""Weights by name: downloaded once, checked, converted, and then found in the weights folder.

    download("prunet_p0")  →  <home>/prunet_p0.safetensors

``<home>`` is ``$PRUNET_HOME``, ``checkpoints/`` of a checkout, or the user's cache. The archive is asked of each base
in ``$PRUNET_MIRROR``, then of the published address. It counts as downloaded once it was converted strictly, and is
removed then, because the converted file holds all of it; its sha256 stays in ``<file>.sha256``. That record is written
before the converted file gets its name, so whatever interrupts it: weights that were made here have their record.
"""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from prunet_zoo.errors import CheckpointError
from prunet_zoo.files import sha256_of
from prunet_zoo.metadata import read_metadata
from prunet_zoo.spec import load_spec
from prunet_zoo.zoo.fetch import ChecksumError, DiskError, DownloadError, Fetched, exclusive, fetch
from prunet_zoo.zoo.home import expand_user
from prunet_zoo.zoo.index import ModelEntry, find_model
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.ready import ForeignWeightsError, archive_path, check_ready, ready_path
from prunet_zoo.zoo.records import Recorded, read_record, record_path, write_record
from prunet_zoo.zoo.reporter import Reporter


def download(name: str, *, force: bool = False, progress: bool = True, keep: bool = False) -> Path:
    """Return the path of a model's weights (safetensors, spec inside); bring and convert them where they are not there.

    Several processes may ask at once: one works, the others wait. A file put at ``<home>/<archive's name>`` by hand is
    taken instead of a download.

    Args:
        name: a model of the zoo, with or without ``prunet://``.
        force: bring the archive again and replace what is there, once it is converted. An unfinished download is gone
            on with, because the server is asked whether the file is still the same; a finished one is not taken.
        progress: show messages and progress on standard error; else messages go to the log.
        keep: leave the archive beside the converted file (for a mirror).

    Raises:
        UnknownNameError: no such model.
        ChecksumError: the file is not the one recorded or listed.
        DownloadError: no address gave it; says where to put it by hand. Nothing is left but a part that the next call
            goes on from.
        CheckpointError: a file that was put there by hand is not these weights, or a bundled one is missing.
    """
    entry = find_model(name)
    ready, reporter = ready_path(entry), Reporter(progress)
    if entry.bundled:
        if not ready.is_file():
            raise CheckpointError(
                f"{ready}, the weights of {entry.name!r} that come with the package, is missing; restore it (git "
                "checkout) or install the package again"
            )
        return ready
    archive = archive_path(entry)
    if not (force or keep) and _is_ready(ready, entry, Reporter(show=False)):
        settled = _unrecorded(entry, archive) is None or not os.access(archive.parent, os.W_OK)
        if settled:
            return ready  # without a lock: the folder may be read-only
    with exclusive(archive, reporter):
        if not force and _is_ready(ready, entry, reporter):
            _record_what_is_left(entry, archive, ready, reporter)
            if archive.is_file() or not keep:
                return ready  # another process made it
        _make(entry, archive, ready, force, keep, reporter)
    return ready


def addresses(entry: ModelEntry) -> list[str]:
    """Where the archive may be found: on each mirror of ``$PRUNET_MIRROR`` (blanks or commas between), then upstream.

    Raises:
        DownloadError: a mirror is none of an http, https or file address or a folder.
        FolderError: a mirror begins with ``~`` and a user that does not exist.
    """
    found = []
    for base in re.split(r"[\s,]+", os.environ.get("PRUNET_MIRROR", "").strip()):
        scheme = base.partition("://")[0].lower() if "://" in base else ""
        if scheme in ("http", "https", "file"):
            found.append(f"{base.rstrip('/')}/{quote(entry.weights.file)}")
        elif re.fullmatch(r"[\w.-]+:\d+(/.*)?", base):
            raise DownloadError(f"$PRUNET_MIRROR has {base!r}; is http:// before it missing?")
        elif scheme:
            raise DownloadError(
                f"$PRUNET_MIRROR has {scheme}://…; a mirror is an address beginning with http://, https:// or file://, "
                "or a folder"
            )
        elif base:
            found.append(str(expand_user(base, "$PRUNET_MIRROR") / entry.weights.file))
    return [*found, *([entry.weights.url] if entry.weights.url else [])]


def held_to(entry: ModelEntry) -> Recorded | None:
    """The sha256 that the archive must have: listed in the index, else recorded beside it; None: not known yet."""
    return Recorded(entry.weights.sha256) if entry.weights.sha256 else read_record(archive_path(entry))


def _is_ready(path: Path, entry: ModelEntry, reporter: Reporter) -> bool:
    """Whether the converted file can be used; a damaged one is to be made again, another's is not overwritten."""
    if not path.is_file():
        return False
    try:
        check_ready(path, entry)
    except ForeignWeightsError as error:
        raise CheckpointError(
            f"{error}. Move it away to have {entry.name!r} there, or replace it: python tools/download.py --force "
            f"{entry.name}"
        ) from None
    except CheckpointError as error:
        reporter.say(f"{error}; making it again")
        return False
    return True


def _unrecorded(entry: ModelEntry, archive: Path) -> Path | None:
    """A file that lies there whole and whose sha256 nobody has recorded; None: there is none."""
    if entry.weights.sha256 or record_path(archive).exists():
        return None
    part = Part(archive)
    return archive if archive.is_file() else part.path if part.complete else None


def _record_what_is_left(entry: ModelEntry, archive: Path, ready: Path, reporter: Reporter) -> None:
    """Record the file that ready weights were made from, where it still lies there and was not recorded; any other is
    left alone. The caller holds the lock."""
    left = _unrecorded(entry, archive)
    if left is not None and read_metadata(ready).get("source_sha256") == json.dumps(_digest(left)):
        _record(entry, archive, Fetched(left, _digest(left), left.stat().st_size, str(left)), reporter)
        Part(archive).discard()


def _record(entry: ModelEntry, archive: Path, made: Fetched, reporter: Reporter) -> None:
    write_record(archive, Recorded(made.sha256, _checkpoint_sha256(made.path, entry)))
    reporter.say(
        f"upstream publishes no checksum for {archive.name}; recorded on first use: sha256 {made.sha256} of "
        f"{made.url}, in {record_path(archive)}"
    )


def _make(entry: ModelEntry, archive: Path, ready: Path, force: bool, keep: bool, reporter: Reporter) -> None:
    """Bring the archive and convert it; the caller holds the lock. The record comes first, the ready file last."""
    held, there = held_to(entry), archive.is_file()
    new = ready.with_name(f".{entry.name}.new.safetensors")
    _remove_leftovers(archive, new)
    if force and Part(archive).complete:
        Part(archive).discard()
    try:
        if there and not force:
            made = _convert_local(entry, archive, new, held, reporter)
        else:
            made = _convert_fetched(entry, archive, new, held, reporter)
        if held is None:
            _record(entry, archive, made, reporter)
        os.replace(new, ready)
    finally:
        new.unlink(missing_ok=True)
    if not (keep or there):
        archive.unlink(missing_ok=True)
    reporter.say(f"{entry.name}: {ready}")


def _remove_leftovers(archive: Path, new: Path) -> None:
    """Remove what a killed process left of files that it was writing; the caller holds the lock."""
    writing = (new.name, archive.name, record_path(archive).name, Part(archive).record.name)
    patterns = [new.name, *(f".{glob.escape(name)}.*.tmp" for name in writing)]
    for path in [path for pattern in patterns for path in archive.parent.glob(pattern)]:
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DownloadError(f"{path} cannot be read: {error.strerror or error}") from error


def _convert_local(entry: ModelEntry, archive: Path, new: Path, held: Recorded | None, reporter: Reporter) -> Fetched:
    """Convert the file that lies there: put there by hand, or kept."""
    digest = _digest(archive)
    if held is not None and digest != held.sha256 and not _is_same(archive, entry, held, reporter):
        raise ChecksumError(
            f"{archive} has sha256 {digest}, {_who_says(entry, archive)} {held.sha256}; it was not used. Remove it to "
            f"download the right one{_if_trusted(entry, archive)}"
        )
    reporter.say(f"taking {archive}")
    try:
        _convert(archive, entry, new, reporter)
    except CheckpointError as error:
        raise CheckpointError(
            f"{archive}, which was found there, is not the file of {entry.name!r}: {error}. Replace it, or remove it "
            "to download it"
        ) from error
    Part(archive).discard()  # of a download that is not needed any more
    return Fetched(archive, digest, archive.stat().st_size, str(archive))


def _convert_fetched(entry: ModelEntry, archive: Path, new: Path, held: Recorded | None, reporter: Reporter) -> Fetched:
    """Download the archive; an address whose file cannot be converted counts as one that does not have it."""
    reserve = 4 * load_spec(entry.arch).params() if entry.arch else 0  # the converted file: float32
    urls = addresses(entry)
    try:
        done = fetch(
            urls,
            archive,
            sha256=held.sha256 if held else None,
            reserve=reserve,
            check=lambda part: _convert(part, entry, new, reporter),
            same=lambda part: held is not None and _is_same(part, entry, held, reporter),
            reporter=reporter,
        )
    except ChecksumError as error:
        known = f"{_who_says(entry, archive)} {held.sha256 if held else None}"
        raise ChecksumError(f"{error}\n{known}; what was sent was not used{_if_trusted(entry, archive)}") from error
    except DiskError:
        raise
    except DownloadError as error:
        raise DownloadError(f"{error}\n{_by_hand(entry, archive)}") from error
    return done


def _checkpoint_sha256(source: Path, entry: ModelEntry) -> str:
    from prunet_zoo.zoo.checkpoint import checkpoint_sha256  # torch is loaded only now

    return checkpoint_sha256(source, entry.weights.member)


def _is_same(source: Path, entry: ModelEntry, held: Recorded, reporter: Reporter) -> bool:
    """Whether the checkpoint in a file of another sha256 is the recorded one, packed anew."""
    try:
        same = held.checkpoint is not None and _checkpoint_sha256(source, entry) == held.checkpoint
    except CheckpointError:
        return False  # there is none in it
    if same:
        reporter.say(f"{source.name} was packed anew since it was recorded; the checkpoint in it is the same")
    return same


def _convert(source: Path, entry: ModelEntry, new: Path, reporter: Reporter) -> None:
    from prunet_zoo.zoo.convert import convert_checkpoint  # torch is loaded only now

    reporter.say(f"converting {source.name} to {ready_path(entry).name}")
    convert_checkpoint(source, entry.name, new, published=True)
    check_ready(new, entry)  # a fine-tuned head is converted too, but is not what the name promises


def _who_says(entry: ModelEntry, archive: Path) -> str:
    return "the index says" if entry.weights.sha256 else f"recorded in {record_path(archive)} at the first download:"


def _if_trusted(entry: ModelEntry, archive: Path) -> str:
    if entry.weights.sha256:
        return ""
    return f". If you know why it changed and trust it, delete {record_path(archive)} and run the same again"


def _by_hand(entry: ModelEntry, archive: Path) -> str:
    host = urlsplit(entry.weights.url or "").hostname
    return (
        f"Without a way to {host}: bring {entry.weights.url} from another machine, put it at\n  {archive}\nand run the "
        f"same again; or bring {ready_path(entry).name} from the weights folder of a machine that has it. A mirror can "
        "be named by $PRUNET_MIRROR (http://, https://, file:// or a folder), another weights folder by $PRUNET_HOME."
    )
