"""Fetch and decode images: any source that the API accepts → a decoded PIL image, safely.

The standard library's http.client does the downloads: a connection goes to the very address that
was checked, so that a name cannot resolve to something else in between (DNS rebinding).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import (
    ImageDecodeError,
    ImageDownloadFailed,
    ImageError,
    ImageInputTooLong,
    ImageUnsupported,
    UserError,
)

ACCEPTED = "a URL, a data: URI, a path, bytes, a file object or a PIL image"
# decoders for pictures only: Pillow's others include one that starts Ghostscript
FORMATS = [
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF"),
    *("AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI"),
]
NOT_PICTURES = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF document",
}
HEADERS = {"User-Agent": "rtp-llm", "Accept": "image/*,*/*;q=0.8"}
SECRET_HEADERS = ("authorization", "cookie")
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
PARALLEL = 8
CHUNK = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# where clouds hand out credentials; the last is Azure's, in public address space
METADATA = [
    ipaddress.ip_address(address)
    for address in (
        *("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
        *("100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
]
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA gives out for the public internet


@dataclass(frozen=True)
class MediaPolicy:
    """What may be fetched. The defaults suit callers in the same process; a server tightens them.

    Metadata addresses of clouds are refused under every policy.
    """

    allow_local: bool | str | os.PathLike[str] = True  # paths: all, none, or those below a folder
    allowed_domains: tuple[str, ...] | None = None  # "example.com", "*.example.com"; None: all
    allow_private: bool = True  # False: only addresses of the public internet …
    allowed_cidrs: tuple[str, ...] = ()  # … and, for allowed_domains, of these networks
    max_bytes: int = 64 << 20
    max_pixels: int = 100_000_000  # Pillow itself stops at about 179 million
    timeout: float = 30.0  # seconds for one image, redirects included, name look-ups not
    headers: Mapping[str, str] = field(default_factory=dict)  # sent with every request
    proxy: str | None = None  # http://[user:password@]host:port; then it checks what it connects to

    def __post_init__(self) -> None:
        for cidr in self.allowed_cidrs:
            try:
                ipaddress.ip_network(cidr, strict=False)
            except ValueError as e:
                raise UserError(f"allowed_cidrs: {e}; write it like 10.1.0.0/16") from e
        if self.proxy and not urllib.parse.urlsplit(self.proxy).hostname:
            raise UserError(f"proxy {self.proxy!r} is not a URL: write it like http://host:3128")


@dataclass(frozen=True)
class LoadedImage:
    image: Image.Image  # decoded, in its own mode
    from_pil: bool  # the caller gave a PIL object
    name: str = "the image"  # for messages


def fetch(source: Any, policy: MediaPolicy) -> LoadedImage:
    """One image of any accepted kind, decoded (first frame), not yet converted.

    Raises ImageDownloadFailed (dead or refused URL or path), ImageInputTooLong (bytes, pixels),
    ImageDecodeError (damaged data), ImageUnsupported (kind of source, scheme or file).
    """
    name = _short(source)
    if isinstance(source, Image.Image):
        return LoadedImage(_loaded(source, name, policy), True, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = _read_file_object(source, name, policy)
    elif isinstance(source, os.PathLike):
        data = _read_path(os.fspath(source), name, policy)
    elif not isinstance(source, str):
        raise ImageUnsupported(f"an image must be {ACCEPTED}, not {type(source).__name__}")
    elif source[:5].lower() == "data:":
        data = _read_data_uri(source, name, policy)
    elif match := re.match(r"([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE):
        scheme = match[1].lower()
        if scheme in ("http", "https"):
            data = _download(source, policy)
        elif scheme == "file":
            data = _read_path(_file_url_path(source), name, policy)
        else:
            raise ImageUnsupported(f"{name}: scheme {scheme!r} is not supported; give {ACCEPTED}")
    else:
        data = _read_path(source, name, policy)
    return LoadedImage(_decode(data, name, policy), False, name)


def fetch_all(sources: Iterable[Any], policy: MediaPolicy) -> list[LoadedImage]:
    """`fetch` of each, in order; URLs are downloaded at the same time, equal ones once."""
    sources = list(sources)
    urls = {s for s in sources if isinstance(s, str) and re.match("https?://", s, re.IGNORECASE)}
    if not urls:
        return [fetch(s, policy) for s in sources]
    pool = ThreadPoolExecutor(min(PARALLEL, len(urls)), thread_name_prefix="media")
    try:
        waiting = {url: pool.submit(fetch, url, policy) for url in sorted(urls)}
        # a file object or PIL image may stand twice in the list: those stay in this thread
        return [
            waiting[s].result() if isinstance(s, str) and s in urls else fetch(s, policy)
            for s in sources
        ]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _short(source: Any) -> str:
    """A name for messages: one line, never a whole data URI."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image ({source.mode}, {source.width}×{source.height})"
    if hasattr(source, "read"):
        return f"file object {getattr(source, 'name', type(source).__name__)}"
    text = str(source)
    if text[:5].lower() == "data:":
        return f"{text[:5]}{text[5:].partition(',')[0][:40]},… ({len(text)} characters)"
    return repr(text if len(text) <= 100 else text[:60] + "…" + text[-39:])


# ------------------------------------------------------------------------------ bytes to a picture


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(data: bytes, name: str, policy: MediaPolicy) -> Image.Image:
    if len(data) > policy.max_bytes:
        raise _too_many_bytes(name, len(data), policy)
    if not data:
        raise ImageDecodeError(f"{name} is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as e:
        head = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for mark, kind in NOT_PICTURES.items():
            if head.startswith(mark) or (head[:5] == b"<?xml" and mark in head):
                raise ImageUnsupported(f"{name} is {kind}, not a picture; give PNG or JPEG") from e
        raise ImageDecodeError(
            f"{name} cannot be decoded: its first bytes {data[:8]!r} are of no known picture "
            f"format ({', '.join(_formats())})"
        ) from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = f"{policy.max_pixels:,}"
        raise ImageInputTooLong(f"{name} has too many pixels, the limit is {limit}: {e}") from e
    except Exception as e:  # decoders of hostile data raise anything
        raise ImageDecodeError(f"{name} cannot be decoded: {e}") from e
    return _loaded(image, name, policy)


def _loaded(image: Image.Image, name: str, policy: MediaPolicy) -> Image.Image:
    """Decode the pixels, after a look at the header's size."""
    pixels = image.width * image.height
    if pixels > policy.max_pixels:
        raise ImageInputTooLong(
            f"{name} is {image.width}×{image.height} = {pixels:,} pixels, "
            f"the limit is {policy.max_pixels:,}"
        )
    if not pixels:
        raise ImageDecodeError(f"{name} is {image.width}×{image.height}: it has no pixels")
    try:
        image.load()
    except Exception as e:
        raise ImageDecodeError(f"{name} is damaged or cut short: {e}") from e
    return image


def _too_many_bytes(name: str, size: int, policy: MediaPolicy) -> ImageInputTooLong:
    return ImageInputTooLong(f"{name} has {size:,} bytes, the limit is {policy.max_bytes:,}")


# ------------------------------------------------------------------------------------ local sources


def _read_file_object(source: Any, name: str, policy: MediaPolicy) -> bytes:
    try:
        if hasattr(source, "seek") and source.seekable():
            source.seek(0)
        data = source.read(policy.max_bytes + 1)
    except (OSError, ValueError) as e:
        raise ImageDownloadFailed(f"{name} cannot be read: {e}") from e
    if not isinstance(data, bytes):
        raise ImageUnsupported(f"{name} gives {type(data).__name__}; open it with mode 'rb'")
    return data


def _read_data_uri(uri: str, name: str, policy: MediaPolicy) -> bytes:
    """RFC 2397: data:[type][;base64],data"""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageDecodeError(f"{name} has no comma: write data:image/png;base64,…")
    if len(body) > 4 * policy.max_bytes:
        raise _too_many_bytes(name, len(body), policy)
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as e:
        raise ImageDecodeError(f"{name} is not valid base64: {e}") from e


def _file_url_path(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageUnsupported(f"{_short(url)} names another host: write file:///path")
    return urllib.request.url2pathname(parts.path)


def _read_path(path: str | bytes, name: str, policy: MediaPolicy) -> bytes:
    if not policy.allow_local:
        raise ImageDownloadFailed(
            f"{name}: local files are not allowed here; give a URL or data: URI"
        )
    try:
        resolved = Path(os.fsdecode(path)).resolve()
        if policy.allow_local is not True:
            folder = Path(policy.allow_local).resolve()
            if not resolved.is_relative_to(folder):
                raise ImageDownloadFailed(f"{name} lies outside the allowed folder of local images")
        found = resolved.stat()
        if not stat.S_ISREG(found.st_mode):  # a folder; a pipe or device that never ends
            raise ImageDownloadFailed(f"{name} is not a file")
        if found.st_size > policy.max_bytes:
            raise _too_many_bytes(name, found.st_size, policy)
        with open(resolved, "rb") as f:
            return f.read(policy.max_bytes + 1)
    except FileNotFoundError as e:
        raise ImageDownloadFailed(f"{name}: this file does not exist; give {ACCEPTED}") from e
    except (OSError, ValueError, RuntimeError) as e:  # too long, a NUL inside, a loop of links
        reason = getattr(e, "strerror", None) or e
        raise ImageDownloadFailed(
            f"{name} cannot be read as a file ({reason}); give {ACCEPTED}"
        ) from e


# ------------------------------------------------------------------------------------------- HTTP


def _download(url: str, policy: MediaPolicy) -> bytes:
    name = _short(url)
    deadline = time.monotonic() + policy.timeout
    headers = _merged(HEADERS, policy.headers)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(url, headers, deadline, policy)
            if isinstance(answer, bytes):
                return answer
            old, new = urllib.parse.urlsplit(url), urllib.parse.urlsplit(answer)
            if (old.scheme, old.netloc) != (new.scheme, new.netloc):
                headers = {k: v for k, v in headers.items() if k.lower() not in SECRET_HEADERS}
            url = answer
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as e:  # SSLError is an OSError
        if time.monotonic() >= deadline or isinstance(e, TimeoutError):
            raise ImageDownloadFailed(f"{name}: no answer within {policy.timeout:g} s") from e
        raise ImageDownloadFailed(f"{name} cannot be downloaded: {e or type(e).__name__}") from e
    raise ImageDownloadFailed(f"{name}: more than {MAX_REDIRECTS} redirects")


def _get(url: str, headers: dict[str, str], deadline: float, policy: MediaPolicy) -> bytes | str:
    """The body, or the address of a redirect."""
    name = _short(url)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageDownloadFailed(f"{name}: only http:// and https:// addresses are followed")
    if parts.username is not None:
        raise ImageDownloadFailed("a user name in an image's URL is not supported: use headers")
    host = parts.hostname.rstrip(".")
    if not host.isascii():
        host = host.encode("idna").decode()
    listed = _is_listed(host, policy.allowed_domains)
    if not listed and policy.allowed_domains is not None:
        raise ImageDownloadFailed(f"{name}: host {host} is not among the allowed domains")
    # "%" stays: what is quoted already is not quoted again
    target = urllib.parse.quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
    target += (
        "?" + urllib.parse.quote(parts.query, safe="/%:=&~+!$,;'@()*?[]") if parts.query else ""
    )

    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = host, port
    if proxy := urllib.parse.urlsplit(policy.proxy) if policy.proxy else None:
        _check_before_proxy(host, port, listed, policy)
        address = str(proxy.hostname), proxy.port or 80
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            *address, context=_tls()
        )
        if proxy:
            connection.set_tunnel(host, port, _proxy_login(proxy))
    else:
        connection = http.client.HTTPConnection(*address)
        if proxy:
            target = f"http://{f'[{host}]' if ':' in host else host}:{port}{target}"
            headers = headers | _proxy_login(proxy)

    killers: list[socket.socket] = []

    def kill() -> None:
        # a server that sends a byte a second never trips a socket's timeout
        for killer in killers:
            with contextlib.suppress(OSError):
                killer.shutdown(socket.SHUT_RDWR)

    def connect(address: tuple[str, int], *_: Any) -> socket.socket:
        check = (lambda ip: None) if proxy else (lambda ip: _refusal(ip, listed, policy))
        sock = _connect(address, deadline, check)
        killers.append(sock.dup())
        if time.monotonic() >= deadline:  # the timer may have gone off before the append
            sock.close()
            raise TimeoutError
        return sock

    # http.client's own seam (also used for tunnels): TLS still verifies the name, not the address
    connection._create_connection = connect  # type: ignore[attr-defined]
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), kill)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status in REDIRECTS and (location := response.getheader("Location")):
                # http.client reads headers as Latin-1, servers write UTF-8
                location = location.encode("latin-1", "replace").decode("utf-8", "replace")
                return urllib.parse.urljoin(url, location)
            if response.status != 200:
                raise ImageDownloadFailed(
                    f"{name}: the server answered {response.status} {response.reason}"
                )
            return _body(response, name, deadline, policy)
    finally:
        timer.cancel()
        connection.close()
        for killer in killers:
            killer.close()


def _body(
    response: http.client.HTTPResponse, name: str, deadline: float, policy: MediaPolicy
) -> bytes:
    expected = response.length  # from Content-Length
    if expected is not None and expected > policy.max_bytes:
        raise _too_many_bytes(name, expected, policy)
    body = bytearray()
    while chunk := response.read(CHUNK):
        body += chunk
        if len(body) > policy.max_bytes:
            raise ImageInputTooLong(f"{name} has more than {policy.max_bytes:,} bytes, the limit")
    if time.monotonic() >= deadline:
        raise TimeoutError
    if expected is not None and len(body) < expected:
        raise ImageDownloadFailed(
            f"{name}: the connection ended after {len(body):,} of {expected:,} bytes"
        )
    return bytes(body)


def _check_before_proxy(host: str, port: int, listed: bool, policy: MediaPolicy) -> None:
    """Refuse what can be known here; a name that only the proxy resolves is left to it."""
    with contextlib.suppress(socket.gaierror):
        for ip, _, _ in _resolve(host, port):
            if reason := _refusal(ip, listed, policy):
                raise ImageDownloadFailed(f"host {host} is refused: {reason}")


def _proxy_login(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def _resolve(host: str, port: int) -> list[tuple[Address, int, Any]]:
    """(address, family, sockaddr) of each address that the host has."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(ipaddress.ip_address(info[4][0]), info[0], info[4]) for info in infos]


def _connect(
    address: tuple[str, int], deadline: float, check: Callable[[Address], str | None]
) -> socket.socket:
    """Open a connection to one of the host's addresses that passes the check."""
    host, port = address
    try:
        found = _resolve(host, port)
    except (socket.gaierror, UnicodeError) as e:
        raise ImageDownloadFailed(f"host {host} is unknown: {e}") from e
    refused, failed = "", OSError(f"host {host} has no address")
    for ip, family, sockaddr in found:
        if reason := check(ip):
            refused = reason
            continue
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            sock.settimeout(remaining)
            sock.connect(sockaddr)
            return sock
        except OSError as e:
            sock.close()
            failed = e
    if refused:
        raise ImageDownloadFailed(f"host {host} is refused: {refused}")
    raise failed


def _refusal(ip: Address, listed: bool, policy: MediaPolicy) -> str | None:
    """Why this address may not be connected to; None if it may."""
    inner = _embedded(ip)
    for address in (ip, inner):
        if address in METADATA:
            return f"{ip} is a cloud's metadata address"
    if policy.allow_private:
        return None
    if listed and any(
        inner in ipaddress.ip_network(cidr, strict=False) for cidr in policy.allowed_cidrs
    ):
        return None
    outside = (
        inner not in UNICAST if inner.version == 6 else inner.is_multicast or inner.is_reserved
    )
    if outside or not inner.is_global:
        return f"{ip} is not an address of the public internet"
    return None


def _embedded(ip: Address) -> Address:
    """The IPv4 address inside an IPv6 one (mapped, NAT64, 6to4, Teredo), else the same."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)


def _is_listed(host: str, domains: tuple[str, ...] | None) -> bool:
    """Is the host one of the allowed domains, or below a "*." one?"""
    host = host.lower()
    for domain in domains or ():
        domain = domain.lower().rstrip(".")
        if host == domain or (domain.startswith("*.") and host.endswith(domain[1:])):
            return True
    return False


def _merged(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Both, the second winning whatever the case of its names."""
    names = {name.lower() for name in second}
    return {k: v for k, v in first.items() if k.lower() not in names} | dict(second)


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:  # macOS and bare containers may have none
        try:
            import certifi

            context.load_verify_locations(certifi.where())
        except ImportError:
            pass
    return context
