"""Any source of a picture that the API accepts → a decoded PIL image, safely.

Pictures come from strangers: their size is read from the header before a pixel is decoded, only the
first frame is decoded, and a process decodes no more at once than DECODING pixels. Downloads are in
download.py.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import ipaddress
import os
import re
import stat
import threading
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

from PIL import Image, UnidentifiedImageError

from ..errors import (
    ImageDecodeError,
    ImageDownloadFailed,
    ImageError,
    ImageInputTooLong,
    ImageUnsupported,
    Overloaded,
    UserError,
)
from .download import DOWNLOADS, SECRET, Download, one_line, shortened, shown

T = TypeVar("T")

ACCEPTED = "a URL, a data: URI, a path, bytes, a file object or a PIL image"
# what the OpenAI API takes: decoders in C, hardened by browsers, that know the size before they start.
# Of the others ICO decodes while it opens, TIFF's tiles may be larger than the picture, and BMP, PPM,
# TGA and QOI run in Python for minutes.
WEB_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF")
# decoders for pictures only: Pillow's others include one that starts Ghostscript
FORMATS = (
    *WEB_FORMATS,
    *("BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "TGA", "QOI"),
)
NOT_PICTURES = {
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF document",
    b"\x1f\x8b": "compressed by gzip",
}
PARALLEL = 4  # downloads of one request
# Pillow takes 4 bytes for a pixel, a conversion of alpha four such pictures: at most about 1 GB
DECODING = 64_000_000  # pixels
# of a progressive JPEG each scan of 40 bytes costs a pass over all pixels; real files have about 10
MAX_SCANS = 100
MAX_SEGMENTS = 10_000
MAX_ESCAPES = 1_000_000  # "%41" in a data: URI: each costs some 40 bytes while it is read

DOMAIN = re.compile(r"(\*\.)?[a-z0-9_.:-]+", re.IGNORECASE)


@dataclass(frozen=True)
class MediaPolicy:
    """What may be fetched. The defaults suit callers in the same process; a server, whose callers are
    strangers, sets allow_local, allow_private and formats, and lower limits.

    Link-local addresses and metadata addresses of clouds are refused under every policy.
    """

    # paths and file:// URLs: all, none, or those below a folder (after following links)
    allow_local: bool | str | os.PathLike[str] = True
    # hosts of URLs: "example.com" is that host only, "*.example.com" all below it; None: any host
    allowed_domains: tuple[str, ...] | None = None
    # False: hosts have addresses of the public internet only, and ports 80, 443 or from 1024 on;
    # refusals do not say why. (Hosts of allowed_domains may use any port.)
    allow_private: bool = True
    # "10.1.0.0/16": networks where hosts of allowed_domains may be, besides the public internet
    allowed_cidrs: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS  # Pillow's names of those that are decoded
    max_bytes: int = 64 << 20  # of one image as sent; a download stops there
    max_pixels: int = 100_000_000  # width × height of one image (Pillow itself stops at 179 million)
    timeout: float = 30.0  # seconds for one download: look-ups of names, redirects and all
    # sent with every download; those with secrets not after a redirect to another origin
    headers: Mapping[str, str] = field(default_factory=dict)
    # http://[user:password@]host:port, which gets every download and must check the addresses of
    # names that cannot be looked up here; variables like HTTPS_PROXY are never read
    proxy: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.allowed_domains, str):
            raise UserError(f"allowed_domains is a tuple of hosts, not {self.allowed_domains!r}")
        for domain in self.allowed_domains or ():
            if not DOMAIN.fullmatch(domain):
                raise UserError(
                    f"allowed_domains: {domain!r} is no host: write it like example.com or "
                    f"*.example.com, other alphabets as xn--…"
                )
        for cidr in self.allowed_cidrs:
            try:
                ipaddress.ip_network(cidr, strict=False)
            except ValueError as e:
                raise UserError(f"allowed_cidrs: {e}; write it like 10.1.0.0/16") from e
        for name in self.formats:
            if name not in FORMATS:
                raise UserError(f"formats: {name!r} is unknown: known are {', '.join(FORMATS)}")
        for name in ("max_bytes", "max_pixels", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)!r}: it must be above 0")
        for name in self.headers:
            if SECRET.search(name) and not self.allow_private and self.allowed_domains is None:
                raise UserError(
                    f"headers: {name} would be sent to any host that a stranger names: "
                    f"set allowed_domains"
                )
        if self.proxy:
            try:
                parts = urllib.parse.urlsplit(self.proxy)
                good = parts.scheme == "http" and parts.hostname and parts.port != 0
            except ValueError:
                good = False
            if not good:  # its password is not for messages
                raise UserError("proxy is not a URL of HTTP: write it like http://host:3128")


@dataclass(frozen=True)
class LoadedImage:
    image: Image.Image  # decoded, in its own mode
    from_pil: bool  # the caller gave a PIL object
    name: str = "the image"  # for messages


def fetch(source: Any, policy: MediaPolicy) -> LoadedImage:
    """One image of any accepted kind, decoded (first frame), not yet converted.

    Raises ImageDownloadFailed (dead or refused URL or path), ImageInputTooLong (bytes, pixels),
    ImageDecodeError (damaged data), ImageUnsupported (kind of source, scheme or file), Overloaded
    (too many downloads are running in this process).
    """
    return fetch_all([source], policy, _same)[0]


def _same(image: LoadedImage) -> LoadedImage:
    return image


@overload
def fetch_all(sources: Iterable[Any], policy: MediaPolicy) -> list[LoadedImage]: ...


@overload
def fetch_all(
    sources: Iterable[Any], policy: MediaPolicy, use: Callable[[LoadedImage], T]
) -> list[T]: ...


def fetch_all(
    sources: Iterable[Any], policy: MediaPolicy, use: Callable[[LoadedImage], Any] = _same
) -> list[Any]:
    """`use(image)` of each, in order; URLs are downloaded at the same time, equal ones once.

    `use` makes something small of an image, and fetches nothing itself: while it runs, the image's
    pixels count as being decoded, so that many requests do not fill the memory. Raises what `fetch`
    raises; of several images, the message says which.
    """
    sources = list(sources)
    waiting = deque(dict.fromkeys(filter(is_url, sources)))
    running: dict[str, Download] = {}
    done: dict[str, Any] = {}
    results = []
    try:
        for number, source in enumerate(sources, 1):
            while waiting and len(running) < PARALLEL:
                if not (download := Download.start(waiting[0], policy, wait=0)):
                    break
                running[waiting.popleft()] = download
            try:
                if not is_url(source):
                    results.append(_used(source, None, policy, use))
                    continue
                if source not in done:
                    if source not in running:  # then it is the next one, and none of ours runs
                        running[source] = _awaited(waiting.popleft(), policy)
                    with contextlib.closing(running.pop(source)) as download:
                        data = download.result()
                    done[source] = _used(source, data, policy, use)
                results.append(done[source])
            except ImageError as e:
                if len(sources) == 1:
                    raise
                raise type(e)(f"image {number} of {len(sources)}: {e}") from e
        return results
    finally:
        for download in running.values():
            download.close()


def read(source: Any, policy: MediaPolicy) -> bytes:
    """The bytes of a picture that need no network: a path, file:// URL, data: URI, bytes or a file object.

    Raises ImageDownloadFailed, ImageInputTooLong, ImageDecodeError, ImageUnsupported.
    """
    data = _read(source, name := _short(source), policy)
    if len(data) > policy.max_bytes:
        raise _too_many_bytes(name, len(data), policy)
    return data


def is_url(source: Any) -> bool:
    return isinstance(source, str) and bool(re.match("https?://", source, re.IGNORECASE))


def _awaited(url: str, policy: MediaPolicy) -> Download:
    if download := Download.start(url, policy, wait=policy.timeout):
        return download
    raise Overloaded(f"{shown(url)}: {DOWNLOADS} downloads are running already; try again later")


def _used(source: Any, data: bytes | None, policy: MediaPolicy, use: Callable[[LoadedImage], T]) -> T:
    """`use` of a source, whose bytes are `data` if they are here already."""
    name, from_pil = _short(source), isinstance(source, Image.Image)
    if from_pil:
        image = source
    else:
        image = _opened(_read(source, name, policy) if data is None else data, name, policy)
    with _decoding(_pixels(image, name, policy)):
        try:
            image.load()
        except Exception as e:
            raise ImageDecodeError(f"{name} is damaged or cut short: {one_line(e)}") from e
        return use(LoadedImage(image, from_pil, name))


def _read(source: Any, name: str, policy: MediaPolicy) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        return _read_file_object(source, name, policy)
    if isinstance(source, os.PathLike):
        return _read_path(os.fspath(source), name, policy)
    if not isinstance(source, str):
        raise ImageUnsupported(f"an image must be {ACCEPTED}, not {type(source).__name__}")
    if source[:5].lower() == "data:":
        return _read_data_uri(source, name, policy)
    if match := re.match(r"([a-z][a-z0-9+.-]+)://", source, re.IGNORECASE):
        if match[1].lower() == "file":
            return _read_path(_file_url_path(source, name), name, policy)
        scheme = shortened(match[1])
        raise ImageUnsupported(f"{name}: scheme {scheme!r} is not supported; give {ACCEPTED}")
    return _read_path(source, name, policy)


def _short(source: Any) -> str:
    """A name for messages: one line, never a whole data URI."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image ({source.mode}, {source.width}×{source.height})"
    if hasattr(source, "read"):
        return f"file object {getattr(source, 'name', type(source).__name__)}"
    if not isinstance(source, (str, os.PathLike)):
        return type(source).__name__
    text = str(source)
    if text[:5].lower() == "data:":
        return one_line(f"{text[:45].partition(',')[0]},… ({len(text)} characters)")
    return shown(text) if "://" in text else repr(shortened(text))


# ------------------------------------------------------------------------------ bytes to a picture


class _Turns:
    """A share of `total` for each in turn; one that wants more than all waits until it is alone."""

    def __init__(self, total: int):
        self._total = self._free = total
        self._turn, self._freed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def __call__(self, share: int) -> Iterator[None]:
        share = min(share, self._total)
        with self._turn, self._freed:  # the next one does not overtake
            self._freed.wait_for(lambda: self._free >= share)
            self._free -= share
        try:
            yield
        finally:
            with self._freed:
                self._free += share
                self._freed.notify()


_decoding = _Turns(DECODING)


@functools.cache
def _known(formats: tuple[str, ...]) -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def _opened(data: bytes, name: str, policy: MediaPolicy) -> Image.Image:
    """The header is read, the pixels are not yet decoded."""
    if len(data) > policy.max_bytes:
        raise _too_many_bytes(name, len(data), policy)
    if not data:
        raise ImageDecodeError(f"{name} is empty")
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data, name)
    formats = _known(policy.formats)
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as e:
        head = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for mark, kind in NOT_PICTURES.items():
            if head.startswith(mark) or (head[:5] == b"<?xml" and mark in head):
                raise ImageUnsupported(f"{name} is {kind}, not a picture; give PNG or JPEG") from e
        # where files are opened for strangers, nothing of one that is no picture is told
        begins = f"begins with {data[:8]!r} and " if policy.allow_local is True else ""
        raise ImageDecodeError(
            f"{name} cannot be decoded: it {begins}is of no known picture format ({', '.join(formats)})"
        ) from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ImageInputTooLong(
            f"{name} has too many pixels, the limit is {policy.max_pixels:,}: {one_line(e)}"
        ) from e
    except Exception as e:  # decoders of hostile data raise anything
        raise ImageDecodeError(f"{name} cannot be decoded: {one_line(e)}") from e


def _check_jpeg(data: bytes, name: str) -> None:
    """Refuse files that are made to take minutes, by the parts up to the end of the picture."""
    scans = segments = position = 0
    # 00 and FF are no markers; TEM, RST0 … RST7 and SOI are nothing but markers
    while match := re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]").search(data, position):
        position, marker = match.end(), match[0][1]
        if marker == 0xD9:  # what follows is not decoded
            break
        scans, segments = scans + (marker == 0xDA), segments + 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise ImageDecodeError(
                f"{name} cannot be decoded: more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments"
            )
        if marker >= 0xC0:  # the others have no length, and end the decoding
            position += int.from_bytes(data[position : position + 2])


def _pixels(image: Image.Image, name: str, policy: MediaPolicy) -> int:
    pixels = image.width * image.height
    if pixels > policy.max_pixels:
        raise ImageInputTooLong(
            f"{name} is {image.width}×{image.height} = {pixels:,} pixels, "
            f"the limit is {policy.max_pixels:,}"
        )
    if not pixels:
        raise ImageDecodeError(f"{name} is {image.width}×{image.height}: it has no pixels")
    return pixels


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
    """RFC 2397: data:[type][;base64],data. The type is ignored, as it is elsewhere."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageDecodeError(f"{name} has no comma: write data:image/png;base64,…")
    if len(body) > 4 * policy.max_bytes:
        raise _too_many_bytes(name, len(body), policy)
    if body.count("%") > MAX_ESCAPES:
        raise ImageInputTooLong(f"{name} has more than {MAX_ESCAPES:,} escapes: write it in base64")
    data = urllib.parse.unquote_to_bytes(body.encode(errors="replace"))
    if not head.lower().rstrip().endswith(";base64"):
        return data
    # the alphabet of URLs as well, for there is no doubt what is meant
    data = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v").rstrip(b"=")
    if len(data) * 3 // 4 > policy.max_bytes:
        raise _too_many_bytes(name, len(data) * 3 // 4, policy)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as e:
        raise ImageDecodeError(f"{name} is not valid base64: {e}") from e


def _file_url_path(url: str, name: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as e:
        raise ImageUnsupported(f"{name} is not a URL: write file:///path") from e
    if parts.netloc not in ("", "localhost"):
        raise ImageUnsupported(f"{name} names another host: write file:///path")
    return urllib.request.url2pathname(parts.path)


def _read_path(path: str | bytes, name: str, policy: MediaPolicy) -> bytes:
    if not policy.allow_local:
        raise ImageDownloadFailed(
            f"{name}: local files are not allowed here; give a URL or data: URI"
        )
    try:
        handle = _open_file(os.fsdecode(path), name, policy.allow_local)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):  # a folder; a pipe or device that never ends
                raise ImageDownloadFailed(f"{name} is not a file")
            if found.st_size > policy.max_bytes:
                raise _too_many_bytes(name, found.st_size, policy)
            with open(handle, "rb", closefd=False) as f:
                return f.read(policy.max_bytes + 1)
        finally:
            os.close(handle)
    except FileNotFoundError as e:
        raise ImageDownloadFailed(f"{name}: this file does not exist; give {ACCEPTED}") from e
    except (OSError, ValueError) as e:  # too long, a NUL inside, a loop of links
        reason = getattr(e, "strerror", None) or one_line(e)
        raise ImageDownloadFailed(
            f"{name} cannot be read as a file ({reason}); give {ACCEPTED}"
        ) from e


def _open_file(path: str, name: str, allowed: bool | str | os.PathLike[str]) -> int:
    """A descriptor; nothing outside the allowed folder is opened, and no pipe is waited for."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if isinstance(allowed, bool):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may do something
            raise ImageDownloadFailed(f"{name} is not a file")
        return os.open(path, flags)
    folder = Path(allowed).resolve()
    try:
        names = Path(path).resolve().relative_to(folder).parts
    except (OSError, ValueError, RuntimeError) as e:  # the same, be there a file or not
        raise ImageDownloadFailed(
            f"{name} lies outside the allowed folder of local images"
        ) from e
    # from folder to folder, following nothing: what was resolved may have become a link since
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in names:
        try:
            inner = os.open(part, flags | os.O_NOFOLLOW, dir_fd=handle)
        finally:
            os.close(handle)
        handle = inner
    return handle
