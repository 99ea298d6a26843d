"""fetch against a loopback server that misbehaves: the file is right or absent, never wrong."""

from __future__ import annotations

import hashlib
import random
import re
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from fetching import DATA, OTHER, SHA, assert_nothing, assert_whole, get, whole_only
from server import GOOD, Quirk, Server

from prunet_zoo.zoo import transfer
from prunet_zoo.zoo.fetch import ChecksumError, DiskError, DownloadError, Retry
from prunet_zoo.zoo.partial import Origin, Part


def test_normal(server: Server, target: Path) -> None:
    done = get(server.add("/a/x.zip", DATA), target, sha256=SHA)
    assert_whole(target, done)
    assert done.url == f"{server.base}/a/x.zip"
    (request,) = server.requests
    assert request.headers["User-Agent"].startswith("prunet_zoo/") and request.headers["Accept-Encoding"] == "identity"
    assert request.range is None


def test_what_stood_there_is_replaced_only_at_the_end(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    get(url, target)
    server.add("/x.zip", OTHER)
    with pytest.raises(ChecksumError):
        get(url, target, sha256=SHA)
    assert target.read_bytes() == DATA


def test_dropped_in_the_middle_and_continued(server: Server, target: Path) -> None:
    server.quirks = [Quirk(drop=70_000), Quirk(drop=50_000)]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-", "bytes=120000-"]
    assert server.requests[1].headers["If-Range"] == server.etags["/x.zip"]
    until = time.monotonic() + 5
    while server.sent < len(DATA) and time.monotonic() < until:  # it counts a piece after it was sent
        time.sleep(0.01)
    assert server.sent == len(DATA)


def test_continued_by_a_later_call(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError, match="1 tries"):
        get(url, target, retry=Retry(tries=1))
    assert not target.exists() and Part(target).size == 70_000
    assert_whole(target, get(url, target))
    assert server.requests[1].range == "bytes=70000-"


def test_continued_by_the_date_where_there_is_no_etag(server: Server, target: Path) -> None:
    url, date = server.add("/x.zip", DATA, etag=""), formatdate(1e9, usegmt=True)
    server.always = Quirk(headers={"Last-Modified": date}, if_range=False)
    server.quirks = [Quirk(headers={"Last-Modified": date}, drop=70_000)]
    assert_whole(target, get(url, target))
    assert server.requests[1].range == "bytes=70000-" and server.requests[1].headers["If-Range"] == date


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_not_continued_where_a_change_could_not_be_told(server: Server, target: Path, etag: str) -> None:
    server.quirks = [Quirk(drop=70_000)]
    assert_whole(target, get(server.add("/x.zip", DATA, etag=etag), target))
    assert [r.range for r in server.requests] == [None, None]


def test_complete_but_not_yet_named(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    target.parent.mkdir()
    part = Part(target)
    part.begin(Origin(url=url, etag=server.etags["/x.zip"], total=len(DATA)))
    part.path.write_bytes(DATA)
    assert_whole(target, get(url, target))
    assert server.requests == []


def test_404_is_final(server: Server, target: Path) -> None:
    with pytest.raises(DownloadError, match=f"{re.escape(server.base)}/no.zip: 404 Not Found"):
        get(server.base + "/no.zip", target)
    assert len(server.requests) == 1
    assert_nothing(target)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_three_errors_of_the_server_then_fine(server: Server, target: Path, status: int) -> None:
    server.quirks = [Quirk(status=status)] * 3
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert len(server.requests) == 4


def test_errors_without_end(server: Server, target: Path) -> None:
    server.always = Quirk(status=503)
    with pytest.raises(DownloadError, match=r"503 Service Unavailable \(6 tries\)"):
        get(server.add("/x.zip", DATA), target)
    assert len(server.requests) == 6
    assert_nothing(target)


def test_wait_grows_and_is_bounded(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.quirks = [Quirk(status=500)] * 5
    get(server.add("/x.zip", DATA), target, retry=Retry(base=1.0, cap=6.0))
    for wait, middle in zip(waits, (1, 2, 4, 6, 6), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle


def test_progress_begins_the_count_anew(server: Server, target: Path) -> None:
    server.always = Quirk(drop=21_000)
    with pytest.raises(DownloadError, match="3 tries"):
        get(server.add("/x.zip", DATA), target, retry=Retry(tries=3, base=0.0))
    Part(target).discard()
    server.requests.clear()
    assert_whole(target, get(server.base + "/x.zip", target, retry=Retry(tries=3, base=0.0, progress=20_000)))
    assert len(server.requests) == 10


@pytest.mark.parametrize("date", [False, True])
def test_retry_after(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path, date: bool) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    after = formatdate(time.time() + 7, usegmt=True) if date else "7"
    server.quirks = [Quirk(status=429, headers={"Retry-After": after})]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert len(waits) == 1 and 4 < waits[0] <= 8


def test_retry_after_that_is_too_long(server: Server, target: Path) -> None:
    server.quirks = [Quirk(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(DownloadError, match="come back in 3600 s"):
        get(server.add("/x.zip", DATA), target)
    assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["", "soon", "-1", "Mon, 99 Foo", "²", "9" * 400, "Fri, 31 Dec 9999 23:59:59 -1200"])
def test_retry_after_that_says_nothing(server: Server, target: Path, text: str) -> None:
    server.quirks = [Quirk(status=503, headers={"Retry-After": text})]
    assert_whole(target, get(server.add("/x.zip", DATA), target))


def test_server_without_ranges(server: Server, target: Path) -> None:
    server.quirks = [Quirk(drop=70_000), Quirk(ranges=False)]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-"] and server.requests[1].status == 200


def test_range_not_satisfiable(server: Server, target: Path) -> None:
    server.quirks = [Quirk(drop=70_000), Quirk(status=416)]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-", None]


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-199999/200000", "bytes 60000-189999/200000", "bytes 70001-199999/200000", "bytes 70000-199999/200001",
     "bytes 70000-199999/199999", "bytes 70000-69999/200000", "bytes 70000-100000/200000",
     "items 1-2/3", "bytes */200000", f"bytes 70000-199999/{'9' * 5000}", f"bytes {'7' * 5000}-8/9",
     "bytes ²-199999/200000"],
)  # fmt: skip
def test_other_bytes_than_asked_for(server: Server, target: Path, content_range: str) -> None:
    server.quirks = [Quirk(drop=70_000), Quirk(content_range=content_range)]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-", None]


def test_a_part_that_nobody_asked_for(server: Server, target: Path) -> None:
    server.always = Quirk(status=206)
    with pytest.raises(DownloadError, match="unexpected answer 206"):
        get(server.add("/x.zip", DATA), target)


def test_declared_longer_than_sent(server: Server, target: Path) -> None:
    server.always = Quirk(length=len(DATA) + 100, if_range=True, ranges=False)
    with pytest.raises(DownloadError, match=r"ended after 200,000 of 200,100 bytes \(6 tries\)"):
        get(server.add("/x.zip", DATA), target)
    assert not target.exists()


def test_declared_shorter_than_it_is(server: Server, target: Path) -> None:
    server.always = Quirk(length=len(DATA) - 100)
    url = server.add("/x.zip", DATA)
    with pytest.raises(ChecksumError, match=f"expected {SHA}"):
        get(url, target, sha256=SHA)
    with pytest.raises(DownloadError, match="not these weights: cut off"):
        get(url, target, check=whole_only)
    assert_nothing(target)


def test_changed_between_the_parts(server: Server, target: Path) -> None:
    url = server.add("/x.zip", OTHER)
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError):
        get(url, target, retry=Retry(tries=1))
    server.add("/x.zip", DATA)
    assert_whole(target, get(url, target))
    assert server.requests[1].range == "bytes=70000-" and server.requests[1].status == 200


@pytest.mark.parametrize("length", [len(DATA), len(OTHER)])
def test_changed_and_the_server_ignores_if_range(server: Server, target: Path, length: int) -> None:
    url = server.add("/x.zip", random.Random(2).randbytes(length))
    server.quirks = [Quirk(drop=70_000), Quirk(if_range=False)]
    with pytest.raises(DownloadError):
        get(url, target, retry=Retry(tries=1))
    server.add("/x.zip", DATA)
    assert_whole(target, get(url, target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-", None]


def test_a_lying_etag_is_found_by_the_hash(server: Server, target: Path) -> None:
    url = server.add("/x.zip", random.Random(2).randbytes(len(DATA)), etag='"same"')
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError):
        get(url, target, retry=Retry(tries=1))
    server.add("/x.zip", DATA, etag='"same"')
    assert_whole(target, get(url, target, sha256=SHA))
    assert [r.range for r in server.requests] == [None, "bytes=70000-", None]  # a mixture, then anew


def test_wrong_hash(server: Server, target: Path) -> None:
    url = server.add("/x.zip", OTHER)
    with pytest.raises(ChecksumError, match=f"sha256 {hashlib.sha256(OTHER).hexdigest()}, expected {SHA}"):
        get(url, target, sha256=SHA)
    assert len(server.requests) == 1
    assert_nothing(target)


def test_check_refuses_and_the_next_address_is_asked(server: Server, target: Path) -> None:
    urls = [server.add("/bad.zip", OTHER), server.add("/x.zip", DATA)]
    assert_whole(target, get(urls, target, check=whole_only))


def test_an_error_of_another_kind_in_the_check_keeps_the_part(server: Server, target: Path) -> None:
    def full(path: Path) -> None:
        raise DiskError("full")

    url = server.add("/x.zip", DATA)
    with pytest.raises(DiskError, match=r"^full$"):
        get(url, target, check=full)
    assert_whole(target, get(url, target))
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/zip"])
def test_a_web_page_does_not_even_replace_the_part(server: Server, target: Path, kind: str) -> None:
    url = server.add("/x.zip", DATA)
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError):
        get(url, target, retry=Retry(tries=1))
    page = b"\n<!DOCTYPE html><title>Please log in</title>"
    server.quirks = [Quirk(body=page, headers={"Content-Type": kind})]
    with pytest.raises(DownloadError, match="a web page, not with the file"):
        get(url, target)
    assert not target.exists()
    assert Part(target).size == 70_000
    assert_whole(target, get(url, target))


def test_compressed_on_the_way(server: Server, target: Path) -> None:
    server.always = Quirk(headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="encoding 'gzip'"):
        get(server.add("/x.zip", DATA), target)
    assert_nothing(target)


def test_chunked(server: Server, target: Path) -> None:
    server.always = Quirk(chunked=True)
    assert_whole(target, get(server.add("/x.zip", DATA), target))


def test_chunked_and_dropped(server: Server, target: Path) -> None:
    server.quirks = [Quirk(chunked=True, drop=70_000)]
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert [r.range for r in server.requests] == [None, "bytes=70000-"]


def test_endless(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    monkeypatch.setattr(transfer, "LARGEST", 100_000)
    for quirk in (GOOD, Quirk(chunked=True)):
        server.always = quirk
        with pytest.raises(DownloadError, match="100,000"):
            get(server.add("/x.zip", DATA), target)
        assert_nothing(target)


def test_slow_server(server: Server, target: Path) -> None:
    server.quirks = [Quirk(begin=lambda: time.sleep(0.6))]
    assert_whole(target, get(server.add("/x.zip", DATA), target, retry=Retry(base=0.0, timeout=0.3)))
    assert len(server.requests) == 2


@pytest.mark.parametrize("record", ["", "{", '{"url": 3}', "\xff\xfe", '{"url": "x", "evil": 1}'])
def test_a_part_with_a_damaged_record_is_not_continued(server: Server, target: Path, record: str) -> None:
    target.parent.mkdir()
    Part(target).path.write_bytes(OTHER[:1000])
    Part(target).record.write_text(record, "latin-1")
    assert_whole(target, get(server.add("/x.zip", DATA), target))
    assert server.requests[0].range is None
