"""What the tests of `fetch` share: the file that is fetched, and what must hold after it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from prunet_zoo.errors import CheckpointError
from prunet_zoo.zoo.fetch import Fetched, Retry, fetch
from prunet_zoo.zoo.partial import Part

DATA = random.Random(0).randbytes(200_000)
OTHER = random.Random(1).randbytes(190_000)
SHA = hashlib.sha256(DATA).hexdigest()
QUICK = Retry(base=0.0, timeout=5.0)


def get(url: str | list[str], target: Path, **options: Any) -> Fetched:
    return fetch([url] if isinstance(url, str) else url, target, **{"retry": QUICK, **options})


def assert_whole(target: Path, done: Fetched | None = None) -> None:
    assert target.read_bytes() == DATA
    assert not Part(target).path.exists() and not Part(target).record.exists()
    assert done is None or (done.sha256, done.size) == (SHA, len(DATA))


def assert_nothing(target: Path) -> None:
    left = sorted(p.name for p in target.parent.iterdir()) if target.parent.exists() else []
    assert left == []


def whole_only(path: Path) -> None:
    if path.read_bytes() != DATA:
        raise CheckpointError("cut off")
