"""Where fetch takes a file from: redirects, several addresses, files of this machine, proxies, no network at all."""

from __future__ import annotations

import io
import random
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fetching import DATA, SHA, assert_nothing, assert_whole, get
from server import Quirk, Server

from prunet_zoo.zoo import transfer
from prunet_zoo.zoo.fetch import ChecksumError, DownloadError, Retry
from prunet_zoo.zoo.partial import Part
from prunet_zoo.zoo.transfer import Refused


def test_redirect_keeps_the_range(server: Server, target: Path) -> None:
    server.add("/x.zip", DATA)
    go = Quirk(status=302, headers={"Location": "/x.zip"})
    server.quirks = [go, Quirk(drop=70_000), go]
    done = get(server.base + "/old", target)
    assert_whole(target, done)
    assert done.url == server.base + "/old"
    assert [r.range for r in server.requests] == [None, None, "bytes=70000-", "bytes=70000-"]


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x.zip"])
def test_redirect_out_of_http(server: Server, target: Path, to: str) -> None:
    server.quirks = [Quirk(status=302, headers={"Location": to})]
    with pytest.raises(DownloadError, match=r"not (followed|allowed)"):
        get(server.base + "/old", target)
    assert_nothing(target)


def test_redirect_from_https_to_http_and_in_circles(server: Server, target: Path) -> None:
    request = urllib.request.Request("https://example.invalid/x.zip")
    with pytest.raises(Refused, match="from https to http"):
        transfer._SafeRedirects().redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://example.invalid/")
    server.always = Quirk(status=302, headers={"Location": "/round"})
    with pytest.raises(DownloadError, match="302"):
        get(server.base + "/round", target)


def test_first_address_404_then_the_next(server: Server, target: Path) -> None:
    urls = [server.base + "/no.zip", server.add("/x.zip", DATA)]
    assert get(urls, target).url == urls[1]
    with pytest.raises(DownloadError) as caught:
        get([server.base + "/no.zip", server.base + "/nor.zip", "/nowhere/x.zip"], target)
    for text in ("/no.zip: 404", "/nor.zip: 404", "/nowhere/x.zip: there is no such file"):
        assert text in str(caught.value)


def test_a_part_is_never_continued_from_another_address(server: Server, target: Path) -> None:
    other = server.add("/other.zip", random.Random(2).randbytes(len(DATA)), etag='"same"')
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError):
        get(other, target, retry=Retry(tries=1))
    assert_whole(target, get(server.add("/x.zip", DATA, etag='"same"'), target))
    assert server.requests[1].range is None


def test_another_address_that_fails_leaves_the_part(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA)
    server.quirks = [Quirk(drop=70_000)]
    with pytest.raises(DownloadError):
        get(url, target, retry=Retry(tries=1))
    assert_whole(target, get([server.base + "/no.zip", url], target))
    assert server.requests[2].range == "bytes=70000-"


def test_files_of_this_machine(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "a folder" / "x.zip"
    source.parent.mkdir()
    source.write_bytes(DATA)
    for url in (str(source), source.as_uri(), "file://localhost" + quote(str(source))):
        assert_whole(target, get(url, target, sha256=SHA))
        target.unlink()
    for url, reason in ((str(tmp_path), "no such file"), ("file://host/x.zip", "not of 'host'"), ("", "no such file")):
        with pytest.raises(DownloadError, match=reason):
            get(url, target)
    with pytest.raises(ChecksumError):
        get(str(source), target, sha256="0" * 64)
    assert_nothing(target)


def test_addresses_that_are_none(target: Path) -> None:
    for url in ("http://[::1", "http://127.0.0.1:port/x", "http://", "http://a b/x"):
        with pytest.raises(DownloadError):
            get(url, target, retry=Retry(tries=1))


@pytest.mark.parametrize("url", ["http://", "http:///x.zip"])
def test_an_address_without_a_host_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, target: Path, url: str) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again what cannot be"))
    with pytest.raises(DownloadError, match=r"is no address that can be asked: no host given$"):
        get(url, target)


def test_letters_beyond_ascii(server: Server, target: Path) -> None:
    server.add("/m%C3%A4ny%20files/x.zip", DATA)
    for path in ("/mäny files/x.zip", "/m%C3%A4ny%20files/x.zip", "/mäny%20files/x.zip"):
        assert_whole(target, get(server.base + path, target))


def test_nobody_listens(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DownloadError, match=r"Connection refused \(6 tries\)"):
        get(f"http://127.0.0.1:{port}/x.zip", target)


def test_offline_is_told_at_once(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    def no_name(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for a network that is not there"))
    with pytest.raises(DownloadError, match="host is not found"):
        get("http://weights.invalid/x.zip", target)


def test_proxy(monkeypatch: pytest.MonkeyPatch, server: Server, target: Path) -> None:
    server.add("/x.zip", DATA)
    monkeypatch.setenv("http_proxy", server.base)
    monkeypatch.delenv("no_proxy", raising=False)
    assert_whole(target, get("http://weights.invalid/x.zip", target))


def test_user_and_password_stay_with_the_server(server: Server, target: Path) -> None:
    url = server.add("/x.zip", DATA).replace("//", "//me:s%40cret@")
    server.quirks = [Quirk(status=302, headers={"Location": "/x.zip"}), Quirk(drop=70_000)]
    with pytest.raises(DownloadError) as caught:
        get(url, target, retry=Retry(tries=1))
    assert "cret" not in str(caught.value) + Part(target).record.read_text()
    assert server.requests[0].headers["Authorization"] == "Basic bWU6c0BjcmV0"
    assert "Authorization" not in server.requests[1].headers
    done = get(url, target)
    assert_whole(target, done)
    assert "cret" not in done.url and server.requests[2].range == "bytes=70000-"
