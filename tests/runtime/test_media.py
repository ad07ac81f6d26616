"""Every accepted source gives its picture; everything else is one clear line, in bounded time."""

import base64
import contextlib
import gzip
import io
import ipaddress
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtp_llm.errors import (
    ImageDecodeError,
    ImageDownloadFailed,
    ImageError,
    ImageInputTooLong,
    ImageUnsupported,
    Overloaded,
    UserError,
)
from rtp_llm.runtime import download, media
from rtp_llm.runtime.media import WEB_FORMATS, MediaPolicy, fetch, fetch_all

OPEN = MediaPolicy()
SERVER = MediaPolicy(allow_local=False, allow_private=False, formats=WEB_FORMATS)


def encoded(mode="RGB", size=(6, 4), fmt="PNG", colour=None) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else 200).save(out, fmt)
    return out.getvalue()


PNG = encoded()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


class Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_CONNECT(self):
        type(self).seen.append((self.path, dict(self.headers)))
        self.answer(status=502)

    def do_GET(self):
        type(self).seen.append((self.path, dict(self.headers)))
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        match parts.path:
            case "/missing":
                self.answer(b"no", 404)
            case "/html":
                self.answer(b"<!DOCTYPE html><html><body>Sign in</body></html>")
            case "/to":
                location = query["url"].encode().decode("latin-1")
                self.answer(status=int(query.get("status", 302)), Location=location)
            case "/loop":
                self.answer(status=302, Location="/loop")
            case "/huge":
                self.answer(b"x", length=1 << 40)
            case "/endless":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"x" * 65536)
            case "/cut":
                self.answer(PNG[:20], length=len(PNG))
            case "/silent":
                select.select([self.connection], [], [], 3)  # or until the client goes
            case "/drip" | "/drip-head":
                with contextlib.suppress(OSError):
                    if parts.path == "/drip":
                        self.send_response(200)
                        self.end_headers()
                    for _ in range(60):
                        self.wfile.write(b"H")
                        self.wfile.flush()
                        time.sleep(0.05)
            case "/many-headers":
                self.answer(PNG, **{f"X-{i}": "x" * 1000 for i in range(200)})
            case "/long-reason":
                self.wfile.write(b"HTTP/1.0 404 " + b"\x1b[31mno " * 5000 + b"\r\n\r\n")
            case "/gzip":
                bomb = gzip.compress(b"\0" * (100 << 20), 1, mtime=0)
                self.answer(bomb, **{"Content-Encoding": "gzip"})
            case "/slow.png":
                time.sleep(0.5)
                self.answer(PNG)
            case path if path.isascii() and " " not in path:
                self.answer(PNG)


@contextlib.contextmanager
def serving(handler=Handler, context: ssl.SSLContext | None = None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def host():
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def url(host):
    return f"http://{host}"


@pytest.fixture
def names(monkeypatch):
    """Names that resolve to chosen addresses: a list gives another one at each look-up, a tuple all."""
    table: dict[str, list[str] | tuple[str, ...] | str] = {}
    real = socket.getaddrinfo

    def lookup(host, port, *args, **kwargs):
        if host not in table:
            return real(host, port, *args, **kwargs)
        answer = table[host]
        if isinstance(answer, tuple):
            return [info for a in answer for info in real(a, port, *args, **kwargs)]
        address = answer.pop(0) if isinstance(answer, list) else answer
        return real(address, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return table


# ---------------------------------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same_picture(url, tmp_path):
    path = tmp_path / "图片 é 1%20.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    sources = [
        f"{url}/a.png",
        f"{url.upper()}/a.png",
        f"{url}/图片 é.png?q=ü b",
        f"data:image/png;base64,{text}",
        f"DATA:;base64,{urllib.parse.quote(text.rstrip('='))}",
        "data:image/png," + urllib.parse.quote_from_bytes(PNG),
        str(path),
        path,
        path.as_uri(),
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        io.BytesIO(PNG),
        path.open("rb"),
        Image.open(path),
    ]
    loaded = fetch_all(sources, OPEN)
    expected = np.array(Image.open(io.BytesIO(PNG)))
    assert all(np.array_equal(np.array(x.image), expected) for x in loaded)
    assert [x.from_pil for x in loaded] == [False] * 14 + [True]
    sources[-2].close()


def test_relative_path_and_file_object_that_stands_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    assert fetch("a.png", OPEN).image.size == (6, 4)
    file = io.BytesIO(PNG)
    assert len(fetch_all([file, file], OPEN)) == 2


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [("1", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("CMYK", "JPEG")]
    + [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG")]
    + [("RGB", "BMP"), ("RGB", "PPM"), ("RGB", "ICO"), ("RGB", "TIFF")],
)
def test_picture_formats_are_decoded(mode, fmt):
    data = encoded(mode, (20, 16), fmt, 0 if mode in ("1", "P", "L", "I", "I;16", "F") else None)
    assert fetch(data, OPEN).image.convert("RGB").size in [(20, 16), (16, 13)]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such.png", ImageDownloadFailed, "'no/such.png': this file does not exist; give a URL"),
        ("", ImageDownloadFailed, "does not exist"),
        ("a\0b", ImageDownloadFailed, "cannot be read as a file"),
        ("x" * 5000, ImageDownloadFailed, "cannot be read as a file"),
        ("/dev/zero", ImageDownloadFailed, "not a file"),
        ("/", ImageDownloadFailed, "not a file"),
        ("file://elsewhere/a.png", ImageUnsupported, "another host"),
        ("ftp://host/a.png", ImageUnsupported, "scheme 'ftp' is not supported; give a URL, a data"),
        (None, ImageUnsupported, "not NoneType"),
        (17, ImageUnsupported, "not int"),
        ({"url": "x"}, ImageUnsupported, "not dict"),
        (io.StringIO("x"), ImageUnsupported, "mode 'rb'"),
        (b"", ImageDecodeError, "is empty"),
        (b"hello world", ImageDecodeError, "b'hello wo' and is of no known picture format"),
        (b" <!DOCTYPE html><p>", ImageUnsupported, "an HTML page"),
        (b"<svg xmlns='x'/>", ImageUnsupported, "an SVG drawing"),
        (b"<?xml version='1.0'?><!-- x --><svg/>", ImageUnsupported, "an SVG drawing"),
        (b"%PDF-1.7 ...", ImageUnsupported, "a PDF document"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            ImageDecodeError,
            "no known picture",
        ),
        (PNG[:45], ImageDecodeError, "damaged or cut short"),
        (encoded("RGB", (90, 90), "JPEG")[:400], ImageDecodeError, "cannot be decoded|cut short"),
        ("data:image/png", ImageDecodeError, "no comma"),
        ("data:image/png;base64,@@@@", ImageDecodeError, "not valid base64"),
        ("http://", ImageDownloadFailed, "only http"),
        ("http://[::1", ImageDownloadFailed, "cannot be downloaded"),
        ("http://host:port/", ImageDownloadFailed, "cannot be downloaded"),
        ("http://me:secret@host/", ImageDownloadFailed, "user name"),
        ("http://me:secret@[", ImageDownloadFailed, "not a valid URL"),
        ("http://me:secret@\uff0fhost/", ImageDownloadFailed, "not a valid URL"),
        ("http://127.0.0.1:9/x?sig=secret", ImageDownloadFailed, "cannot be downloaded"),
        ("http://127.0.0.1:9/#secret", ImageDownloadFailed, "cannot be downloaded"),
        ("file://[", ImageUnsupported, "not a URL"),
        ("data:\n\n", ImageDecodeError, "no comma"),
        (gzip.compress(PNG, mtime=0), ImageUnsupported, "compressed by gzip"),
    ],
)
def test_bad_sources_are_one_line(source, error, message):
    with pytest.raises(error, match=message) as caught:
        fetch(source, OPEN)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "secret" not in str(caught.value)


def test_a_data_uri_is_never_dumped():
    with pytest.raises(ImageDecodeError) as caught:
        fetch("data:image/png;base64," + "QUFB" * 10000, OPEN)
    assert len(str(caught.value)) < 300


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_picture_are_an_image_error(data):
    for damaged in (data, PNG[: len(data)] + data, PNG[:33] + data):
        with contextlib.suppress(ImageError):
            fetch(damaged, OPEN)


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=60) | st.text("/\\:@[]%.#?1a\ud800\n", max_size=30))
def test_text_that_names_no_picture_is_an_image_error(text):
    policy = MediaPolicy(allow_private=False, timeout=0.2, allowed_domains=())
    for source in (text, "data:" + text, "data:;base64," + text, "http://" + text, "file://" + text):
        with pytest.raises(ImageError):
            fetch(source, policy)


# ----------------------------------------------------------------------------------------- limits


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_decoding():
    start = time.monotonic()
    with pytest.raises(ImageInputTooLong, match="too many pixels|400,000,000"):
        fetch(png_header(20000, 20000), OPEN)
    with pytest.raises(ImageInputTooLong, match=r"12000×9000 = 108,000,000 pixels.* 100,000,000"):
        fetch(png_header(12000, 9000), OPEN)
    with pytest.raises(ImageInputTooLong, match="6×4 = 24 pixels, the limit is 23"):
        fetch(PNG, MediaPolicy(max_pixels=23))
    with pytest.raises(ImageInputTooLong):
        fetch(Image.new("L", (6, 4)), MediaPolicy(max_pixels=23))
    assert time.monotonic() - start < 2


def test_too_many_bytes_are_refused(url, tmp_path):
    policy = MediaPolicy(max_bytes=len(PNG) - 1)
    (tmp_path / "a.png").write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    for source in (PNG, io.BytesIO(PNG), tmp_path / "a.png", f"{url}/a.png", "data:," + "a" * 9999):
        with pytest.raises(ImageInputTooLong, match=f"the limit is {len(PNG) - 1}|the limit"):
            fetch(source, policy)
    with pytest.raises(ImageInputTooLong):
        fetch(f"data:image/png;base64,{text}", policy)
    with pytest.raises(ImageInputTooLong, match="1,099,511,627,776 bytes"):
        fetch(f"{url}/huge", OPEN)
    with pytest.raises(ImageInputTooLong, match="more than 1,000,000 bytes"):
        fetch(f"{url}/endless", MediaPolicy(max_bytes=1_000_000))


@pytest.mark.parametrize("path", ["silent", "drip", "drip-head"])
def test_a_slow_server_costs_no_more_than_the_timeout(url, path):
    start = time.monotonic()
    with pytest.raises(ImageDownloadFailed, match=r"no answer within 0\.4 s"):
        fetch(f"{url}/{path}", MediaPolicy(timeout=0.4))
    assert time.monotonic() - start < 2.5


# ------------------------------------------------------------------------------------------- HTTP


def test_what_a_server_may_answer(url):
    with pytest.raises(ImageDownloadFailed, match="answered 404 Not Found"):
        fetch(f"{url}/missing", OPEN)
    with pytest.raises(ImageUnsupported, match="an HTML page"):
        fetch(f"{url}/html", OPEN)
    with pytest.raises(ImageDownloadFailed, match=f"after 20 of {len(PNG)} bytes"):
        fetch(f"{url}/cut", OPEN)
    with pytest.raises(ImageDownloadFailed, match="more than 5 redirects"):
        fetch(f"{url}/loop", OPEN)
    assert fetch(f"{url}/to?url=/a.png&status=307", OPEN).image.size == (6, 4)
    assert fetch(f"{url}/to?url={urllib.parse.quote('/é b.png')}", OPEN).image.size == (6, 4)
    for target in ("file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://host/x"):
        with pytest.raises(ImageDownloadFailed, match="only http"):
            fetch(f"{url}/to?url={urllib.parse.quote(target)}", OPEN)


def test_a_dead_server_and_an_unknown_host(names):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(ImageDownloadFailed, match="cannot be downloaded: .*refused"):
        fetch(f"http://127.0.0.1:{port}/", OPEN)
    names["nowhere.example"] = "not an address"
    with pytest.raises(ImageDownloadFailed, match=r"host nowhere\.example is unknown"):
        fetch("http://nowhere.example/", OPEN)


def test_headers_are_sent_and_secrets_stay_with_their_host(url, host):
    policy = MediaPolicy(
        headers={"user-agent": "me", "Authorization": "Bearer x", "X-Api-Key": "x"}
    )
    Handler.seen.clear()
    fetch(f"{url}/to?url=/a.png", policy)
    assert [h["Authorization"] for _, h in Handler.seen] == ["Bearer x"] * 2
    assert Handler.seen[0][1]["user-agent"] == "me"
    with serving() as other:
        Handler.seen.clear()
        fetch(f"{url}/to?url=http://{other}/a.png", policy)
    assert [h.get("Authorization") for _, h in Handler.seen] == ["Bearer x", None]
    assert [h.get("X-Api-Key") for _, h in Handler.seen] == ["x", None]
    assert Handler.seen[1][1]["user-agent"] == "me"


def test_urls_are_fetched_at_the_same_time_and_equal_ones_once(url):
    Handler.seen.clear()
    start = time.monotonic()
    sources = [f"{url}/slow.png?{i % 4}" for i in range(8)]
    assert [x.image.size for x in fetch_all(sources, OPEN)] == [(6, 4)] * 8
    assert time.monotonic() - start < 1.6
    assert len(Handler.seen) == 4


def test_one_failure_does_not_wait_for_the_others(url):
    start = time.monotonic()
    with pytest.raises(ImageDownloadFailed, match="404"):
        fetch_all([f"{url}/missing", f"{url}/silent"], OPEN)
    assert time.monotonic() - start < 1.6


def test_of_several_images_the_message_says_which(url, tmp_path):
    with pytest.raises(ImageDecodeError, match="^image 2 of 3: image of 4 bytes cannot be decoded"):
        fetch_all([PNG, b"nope", f"{url}/missing"], OPEN)
    with pytest.raises(ImageDownloadFailed, match="^image 3 of 3: .*404"):
        fetch_all([PNG, f"{url}/a.png", f"{url}/missing"], OPEN)
    with pytest.raises(ImageDecodeError, match="^image of 4 bytes"):
        fetch_all([b"nope"], OPEN)


def wait_until(condition, seconds=8.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def downloads() -> int:
    return sum(t.name == "media" for t in threading.enumerate())


def test_a_request_that_fails_leaves_no_thread_and_no_socket(url):
    fetch(f"{url}/a.png", OPEN)
    wait_until(lambda: not downloads())
    before = len(os.listdir("/proc/self/fd"))
    gone = time.monotonic()
    for _ in range(3):
        with pytest.raises(ImageDownloadFailed, match="404"):
            fetch_all([f"{url}/missing"] + [f"{url}/silent?{i}" for i in range(12)], OPEN)
    wait_until(lambda: not downloads())
    assert time.monotonic() - gone < 2.5  # they were cut, they did not wait for their server
    assert download._slots._value == download.DOWNLOADS
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # the server's own, after them


def test_a_look_up_that_hangs_costs_the_timeout_and_stops_nobody_else(url, monkeypatch):
    real, free = socket.getaddrinfo, threading.Event()

    def lookup(host, *args, **kwargs):
        if host == "slow.example":
            free.wait(10)
            raise socket.gaierror("gave up")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(download, "_slots", threading.Semaphore(2))
    start = time.monotonic()
    with pytest.raises(ImageDownloadFailed, match=r"no answer within 0\.3 s"):
        fetch_all([f"http://slow.example/{i}" for i in range(9)], MediaPolicy(timeout=0.3))
    with pytest.raises(Overloaded, match="downloads are running already"):  # both still look up
        fetch(f"{url}/a.png", MediaPolicy(timeout=0.3))
    assert fetch("data:;base64," + base64.b64encode(PNG).decode(), OPEN).image.size == (6, 4)
    assert time.monotonic() - start < 2.5
    free.set()
    wait_until(lambda: download._slots._value == 2)
    assert fetch(f"{url}/a.png", OPEN).image.size == (6, 4)


def test_pictures_are_decoded_in_turn_within_the_budget_of_pixels(monkeypatch):
    monkeypatch.setattr(media, "_decoding", media._Turns(50))  # two pictures of 6 × 4 at once
    lock, now, most = threading.Lock(), 0, 0

    def use(image):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return image.image.size

    sizes = []
    picture, large = PNG, encoded(size=(20, 20))
    threads = [
        threading.Thread(target=lambda: sizes.extend(fetch_all([picture, large], OPEN, use)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(sizes) == [(6, 4)] * 6 + [(20, 20)] * 6 and most <= 2
    with pytest.raises(ZeroDivisionError):  # an error gives its share back
        fetch_all([large], OPEN, lambda _: 1 / 0)
    assert fetch(large, OPEN).image.size == (20, 20)


def test_hostile_answers_are_one_line(url):
    for path, message in (
        ("many-headers", "more than 100 headers"),
        ("long-reason", r"answered 404 \[31mno"),
    ):
        with pytest.raises(ImageDownloadFailed, match=message) as caught:
            fetch(f"{url}/{path}", OPEN)
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    with pytest.raises(ImageUnsupported, match="compressed by gzip"):  # and is not unpacked
        fetch(f"{url}/gzip", OPEN)


def test_proxies_of_the_environment_are_ignored(url, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(f"{url}/a.png", OPEN).image.size == (6, 4)


# ------------------------------------------------------------------------------------- data: URIs


def test_spellings_of_data_uris():
    picture = encoded(size=(40, 30), colour=(255, 239, 190))
    for body in (
        base64.urlsafe_b64encode(picture).decode(),
        base64.encodebytes(picture).decode(),
        base64.b64encode(picture).decode().replace("+", "%2B").replace("/", "%2f"),
    ):
        for head in ("image/png;base64", "text/html;base64", ";base64", "image/gif;x=y;BASE64"):
            assert fetch(f"data:{head},{body}", SERVER).image.size == (40, 30)
    for body in ("QUJD=QUJD", "A", "ä" * 8, "QUJ\0D", "%zz%%"):
        with pytest.raises(ImageDecodeError):
            fetch(f"data:image/png;base64,{body}", SERVER)


def test_a_data_uri_takes_no_more_memory_than_a_few_times_its_length():
    policy = MediaPolicy(max_bytes=20_000_000)
    for body in ("%41" * 5_000_000, "A " * 5_000_000, "A" * 40_000_000, "%" * 20_000_000):
        for head in ("data:,", "data:;base64,"):
            uri = head + body
            tracemalloc.start()
            with pytest.raises(ImageError):
                fetch(uri, policy)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 4 * len(uri)


# ----------------------------------------------------------------- what a server must not reach


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.1.1", "100.64.0.1", "0.0.0.0"]
    + ["224.0.0.1", "224.0.1.1", "255.255.255.255", "240.0.0.1", "169.254.169.254", "198.18.0.1"]
    + ["::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "fec0::1"]
    + ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe"]
    + ["2002:7f00:1::", "64:ff9b:1::a00:1", "2001:db8::1", "168.63.129.16", "100.100.100.200"]
    + ["192.0.0.9", "192.88.99.1", "3fff::1", "2001:0:7f00:1::1", "fe80::a9fe:a9fe", "::7f00:1"],
)
def test_addresses_off_the_public_internet_are_refused(address):
    ip = ipaddress.ip_address(address)
    assert download.refusal(ip, False, SERVER)
    start = time.monotonic()
    with pytest.raises(ImageDownloadFailed, match="not on the public"):
        fetch(f"http://{f'[{address}]' if ip.version == 6 else address}:8009/", SERVER)
    assert time.monotonic() - start < 2


def test_the_zone_of_an_address_does_not_hide_it(monkeypatch):
    info = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::a9fe:a9fe%eth0", 80, 0, 1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [info])
    with pytest.raises(ImageDownloadFailed, match="link-local or a cloud's metadata address"):
        fetch("http://metadata.example/", OPEN)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_allowed(address):
    assert download.refusal(ipaddress.ip_address(address), False, SERVER) is None


@pytest.mark.parametrize(
    "form",
    ["2130706433", "0x7f.1", "127.1", "0177.0.0.1", "0x7f000001", "017700000001", "0", "localhost"]
    + ["127.0.0.1.", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.0.0.1"]
    + ["[::ffff:7f00:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[::]"],
)
def test_other_spellings_of_loopback_are_refused(form):
    with pytest.raises(ImageDownloadFailed, match="not on the public"):
        fetch(f"http://{form}:8009/", SERVER)


def test_metadata_addresses_are_refused_even_in_process(names):
    with pytest.raises(ImageDownloadFailed, match="metadata address"):
        fetch("http://169.254.169.254/latest/meta-data", OPEN)
    names["allowed.example"] = "169.254.169.254"
    policy = MediaPolicy(
        allow_private=False,
        allowed_domains=("allowed.example",),
        allowed_cidrs=("169.254.0.0/16", "10.0.0.0/8"),
    )
    with pytest.raises(ImageDownloadFailed, match="is refused") as caught:
        fetch("http://allowed.example/", policy)
    assert "metadata address" in str(caught.value.__cause__)


def test_private_networks_open_for_allowed_domains_only(host, names):
    names["files.example"] = names["other.example"] = "127.0.0.1"
    port = host.split(":")[1]
    policy = MediaPolicy(
        allow_private=False,
        allowed_domains=("files.example", "*.cdn.example"),
        allowed_cidrs=("127.0.0.0/8",),
    )
    assert fetch(f"http://FILES.example.:{port}/a.png", policy).image.size == (6, 4)
    with pytest.raises(ImageDownloadFailed, match=r"other\.example is not among the allowed"):
        fetch(f"http://other.example:{port}/a.png", policy)
    # the networks count for listed names; without a list, for none
    open_names = MediaPolicy(allow_private=False, allowed_cidrs=("127.0.0.0/8",))
    with pytest.raises(ImageDownloadFailed, match="is refused"):
        fetch(f"http://files.example:{port}/a.png", open_names)
    assert download.is_listed("a.cdn.example", policy.allowed_domains)
    assert not download.is_listed("cdn.example", policy.allowed_domains)
    assert not download.is_listed("evilcdn.example", policy.allowed_domains)


def test_a_redirect_to_a_private_address_is_refused(host, names):
    names["public.example"] = "127.0.0.1"
    port = host.split(":")[1]
    policy = MediaPolicy(
        allow_private=False,
        allowed_domains=("public.example", "10.0.0.7"),
        allowed_cidrs=("127.0.0.0/8",),
    )
    for target, message in (
        ("http://10.0.0.7/", "10.0.0.7 is refused"),
        (f"http://{host}/", "not"),
    ):
        with pytest.raises(ImageDownloadFailed, match=message):
            fetch(f"http://public.example:{port}/to?url={target}", policy)


def test_the_address_that_was_checked_is_the_one_connected_to(host, names, monkeypatch):
    connected = []
    real = socket.socket.connect

    def connect(self, address):
        connected.append(address[0])
        if address[0] == "8.8.8.8":
            raise ConnectionRefusedError("not in a test")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    names["rebinding.example"] = [
        "8.8.8.8",
        "127.0.0.1",
        "127.0.0.1",
    ]  # public at the first look-up
    with pytest.raises(ImageDownloadFailed):
        fetch(f"http://rebinding.example:{host.split(':')[1]}/a.png", SERVER)
    assert connected == ["8.8.8.8"]


def test_one_private_address_among_public_ones_refuses_the_host(host, names, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    for addresses in (("8.8.8.8", "127.0.0.1"), ("127.0.0.1", "8.8.8.8"), ("8.8.8.8", "::1")):
        names["mixed.example"] = addresses
        with pytest.raises(ImageDownloadFailed, match="not on the public"):
            fetch(f"http://mixed.example:{host.split(':')[1]}/a.png", SERVER)


@pytest.mark.parametrize(
    "source",
    ["http://good.com@127.0.0.1/", "http://good.com\\@127.0.0.1/", "http://127.0.0.1\\.good.com/"]
    + ["http://good.com:80@127.0.0.1/", "http://@127.0.0.1/", "http://127%2e0.0.1/", "http://a b/"]
    + ["http://127.0.\t0.1:8009/", "http://127.0.0.1\n:8009/", "http://127.0.0.1#@good.com/"]
    + ["http://127.0.0.1?@good.com/", "http:///127.0.0.1/", "http:\\\\127.0.0.1/", " http://127.0.0.1/"]
    + ["http://[fe80::1%25eth0]/", "http://[::1]good.com/", "http://good.com\uff0f@127.0.0.1/"]
    + ["http://[127.0.0.1]/", "http://-/", "http://../", "http://" + "a." * 200 + "com/", "http:/127.0.0.1"]
    + ["http://\uff05/", "http://a\ud800b/", "//127.0.0.1/", "gopher://127.0.0.1/", "jar:http://127.0.0.1!/"],
)
def test_tricks_with_urls_connect_to_nothing(source, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(ImageError) as caught:
        fetch(source, SERVER)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_ports_of_other_services_are_refused_unless_the_host_is_listed(host, names):
    names["listed.example"] = "8.8.8.8"
    for port in (0, 22, 25, 1023):
        with pytest.raises(ImageDownloadFailed, match=f"port {port} is refused"):
            fetch(f"http://8.8.8.8:{port}/", SERVER)
    with pytest.raises(ImageDownloadFailed, match="port 0 is refused"):
        fetch("http://127.0.0.1:0/", OPEN)
    listed = MediaPolicy(allow_private=False, allowed_domains=("127.0.0.1",))
    with pytest.raises(ImageDownloadFailed, match="not on the public"):
        fetch("http://127.0.0.1:22/", listed)


def test_names_of_a_private_network_cannot_be_told_from_unknown_ones(names):
    names["db.example"], names["nothing.example"] = "10.0.3.4", "not an address"
    messages = set()
    for name in names:
        with pytest.raises(ImageDownloadFailed) as caught:
            fetch(f"http://{name}/", SERVER)
        messages.add(str(caught.value).replace(name, "NAME"))
    assert messages == {"host NAME is refused: it is unknown or not on the public internet"}


def test_local_files_below_the_allowed_folder_only(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(PNG)
    (inside / "link.png").symlink_to(outside / "a.png")
    policy = MediaPolicy(allow_local=inside)
    assert fetch(inside / "a.png", policy).image.size == (6, 4)
    refused = [outside / "a.png", inside / "link.png", f"{inside}/../out/a.png", "/no/such/file"]
    for path in [*refused, (outside / "a.png").as_uri()]:
        with pytest.raises(ImageDownloadFailed, match="outside the allowed folder"):
            fetch(path, policy)
    for path in (inside / "a.png", str(inside / "a.png"), (inside / "a.png").as_uri(), "nothing"):
        with pytest.raises(ImageDownloadFailed, match="local files are not allowed here"):
            fetch(path, SERVER)


def test_a_link_that_appears_after_the_check_is_not_followed(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(PNG)
    real, opened = os.open, []

    def swapping(path, flags, *args, **kwargs):
        if not opened:  # the path was resolved and checked
            (inside / "sub").rename(tmp_path / "gone")
            (inside / "sub").symlink_to(outside)
        opened.append(path)
        return real(path, flags, *args, **kwargs)

    policy = MediaPolicy(allow_local=inside)
    assert fetch(inside / "sub" / "a.png", policy).image.size == (6, 4)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "open", swapping)
    with pytest.raises(ImageDownloadFailed, match="cannot be read as a file"):
        fetch(inside / "sub" / "a.png", policy)
    assert [str(p) for p in opened] == [str(inside), "sub", "a.png"][: len(opened)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stranger_does_not_learn_what_lies_outside_the_folder(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret").mkdir(mode=0)
    (tmp_path / "loop").symlink_to("loop")
    (inside / "dangling").symlink_to(tmp_path / "nothing")
    found = set()
    for path in ("../loop", "../secret/a", "../nothing", "..", "dangling", "../" * 40 + "etc/passwd"):
        with pytest.raises(ImageDownloadFailed) as caught:
            fetch(f"{inside}/{path}", MediaPolicy(allow_local=inside))
        found.add(str(caught.value).partition("' ")[2])
    assert found == {"lies outside the allowed folder of local images"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_pipe_is_not_waited_for(tmp_path, whole):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageDownloadFailed, match="is not a file"):
        fetch(tmp_path / "pipe.png", MediaPolicy(allow_local=whole or tmp_path))


# ----------------------------------------------------------------------------------- proxy and TLS


def test_a_proxy_gets_the_request_with_its_login(host, names):
    names["pictures.example"] = "8.8.8.8"
    Handler.seen.clear()
    policy = MediaPolicy(allow_private=False, proxy=f"http://me:pa%3Ass@{host}")
    assert fetch("http://pictures.example/a.png?x=1", policy).image.size == (6, 4)
    path, headers = Handler.seen[0]
    assert path == "http://pictures.example:80/a.png?x=1"
    assert headers["Host"].startswith("pictures.example")
    assert headers["Proxy-Authorization"] == "Basic " + base64.b64encode(b"me:pa:ss").decode()
    with pytest.raises(ImageDownloadFailed, match="502"):
        fetch("https://pictures.example/a.png", policy)
    path, headers = Handler.seen[1]
    assert path == "pictures.example:443" and "Proxy-Authorization" in headers
    for refused in ("http://127.0.0.1/", "http://2130706433/", "https://169.254.169.254/"):
        with pytest.raises(ImageDownloadFailed, match="is refused"):
            fetch(refused, policy)
    assert len(Handler.seen) == 2


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls_verifies_the_name_that_was_asked_for(tmp_path, names, monkeypatch):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += [
        "-subj",
        "/CN=good.example",
        "-addext",
        "subjectAltName=DNS:good.example",
        "-keyout",
        key,
        "-out",
        cert,
    ]
    subprocess.run(command, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    names["good.example"] = names["bad.example"] = "127.0.0.1"
    with serving(context=server) as address:
        port = address.split(":")[1]
        with pytest.raises(ImageDownloadFailed, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(f"https://good.example:{port}/a.png", OPEN)
        trusting = ssl.create_default_context(cafile=str(cert))
        monkeypatch.setattr(download, "_tls", lambda: trusting)
        assert fetch(f"https://good.example:{port}/a.png", OPEN).image.size == (6, 4)
        with pytest.raises(ImageDownloadFailed, match="Hostname mismatch"):
            fetch(f"https://bad.example:{port}/a.png", OPEN)
        start = time.monotonic()
        with pytest.raises(ImageDownloadFailed, match="no answer within"):
            fetch(f"https://good.example:{port}/drip", MediaPolicy(timeout=0.4))
        assert time.monotonic() - start < 2.5


def test_a_policy_that_cannot_be_meant_is_refused():
    with pytest.raises(UserError, match=r"10\.0\.0\.0/99"):
        MediaPolicy(allowed_cidrs=("10.0.0.0/99",))
    for proxy in ("squid", "https://me:secret@host:1", "http://host:x"):
        with pytest.raises(UserError, match="is not a URL") as caught:
            MediaPolicy(proxy=proxy)
        assert "secret" not in str(caught.value)
    for domains in ("a.example", ("https://a.example",), ("*",), ("bücher.example",)):
        with pytest.raises(UserError, match="allowed_domains"):
            MediaPolicy(allowed_domains=domains)
    with pytest.raises(UserError, match="formats: 'EPS'"):
        MediaPolicy(formats=("PNG", "EPS"))
    with pytest.raises(UserError, match="timeout=0"):
        MediaPolicy(timeout=0)
    with pytest.raises(UserError, match="X-Api-Key would be sent to any host"):
        MediaPolicy(allow_private=False, headers={"X-Api-Key": "x"})
