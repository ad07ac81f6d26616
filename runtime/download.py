"""Download what strangers name: http and https only, within limits, from addresses that were checked.

The standard library's http.client does the HTTP: a connection goes to the very address that was
checked, so that a name cannot resolve to something else in between (DNS rebinding).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..errors import ImageDownloadFailed, ImageError, ImageInputTooLong, Overloaded

if TYPE_CHECKING:
    from .media import MediaPolicy

HEADERS = {"User-Agent": "rtp-llm", "Accept": "image/*,*/*;q=0.8"}
SECRET = re.compile("auth|cookie|token|key|secret|sign", re.IGNORECASE)  # in names of headers
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
DOWNLOADS = 32  # at once in this process, those that nobody has taken yet included
CHUNK = 1 << 16
HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")  # decimal and hex addresses too

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# where clouds hand out credentials: all link-local addresses, and some in private and public space
METADATA: list[Network] = [
    ipaddress.ip_network(network)
    for network in (
        *("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::254"),
        *("100.100.100.200", "192.0.0.192", "168.63.129.16"),
    )
]
# Python calls these global: protocol assignments, 6to4 relays, documentation
NOT_PUBLIC: list[Network] = [
    ipaddress.ip_network(network) for network in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")
]
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA gives out for the public internet

_slots = threading.Semaphore(DOWNLOADS)


class Download:
    """One download, in a thread of its own: nothing interrupts a look-up of a name, but its caller
    can walk away from it at the deadline. `start` it, take its `result`, and always `close` it.
    """

    @classmethod
    def start(cls, url: str, policy: MediaPolicy, wait: float) -> Download | None:
        """None when DOWNLOADS others are running still after `wait` seconds."""
        if not _slots.acquire(timeout=wait):
            return None
        try:
            return cls(url, policy)
        except RuntimeError as e:  # the system gives no more threads
            _slots.release()
            raise Overloaded(f"{shown(url)} cannot be downloaded now: {e}") from e

    def __init__(self, url: str, policy: MediaPolicy):
        self._name, self._timeout = shown(url), policy.timeout
        self._deadline = time.monotonic() + policy.timeout
        self._future: Future[bytes] = Future()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._closed = False
        self._users = 2  # the thread and the caller; the slot is free when both have gone
        args = (url, policy, self._future)
        threading.Thread(target=self._run, args=args, name="media", daemon=True).start()

    def result(self) -> bytes:
        """The body; raises ImageDownloadFailed or ImageInputTooLong."""
        try:
            return self._future.result(max(0.0, self._deadline - time.monotonic()))
        except TimeoutError as e:
            message = f"{self._name}: no answer within {self._timeout:g} s"
            raise ImageDownloadFailed(message) from e

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        del self._future  # its error's traceback leads back here
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                _slots.release()

    def _watch(self, sock: socket.socket) -> None:
        """Let `close` cut it: a server that sends a byte a second never trips a socket's timeout."""
        with self._lock:
            if self._closed:
                sock.close()
                raise TimeoutError
            self._sockets.append(sock.dup())  # TLS takes the socket over

    def _run(self, url: str, policy: MediaPolicy, future: Future[bytes]) -> None:
        try:
            future.set_result(_follow(url, self._deadline, self._watch, policy))
        except BaseException as e:
            future.set_exception(e)
        finally:
            with self._lock:
                for sock in self._sockets:
                    sock.close()
                self._sockets.clear()
            self._leave()
            del future  # as above


def shown(url: str) -> str:
    """A URL for messages: one line, without its login and its query, which may hold secrets."""
    text, *rest = re.split("(?=[?#])", url, maxsplit=1)
    text = re.sub("(?<=://)[^/]*@", "…@", text, count=1)
    return repr(shortened(text) + (f"{rest[0][0]}…" if rest else ""))


def shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:60] + "…" + text[-39:]


def one_line(reason: object) -> str:
    """What a stranger's server or data made an error say, safe for a message and a log."""
    text = "".join(c if c.isprintable() else " " for c in str(reason)[:1000])
    return " ".join(text.split())[:200] or type(reason).__name__


# ------------------------------------------------------------------------------------------- HTTP


def _follow(
    url: str, deadline: float, watch: Callable[[socket.socket], None], policy: MediaPolicy
) -> bytes:
    """The body at the end of the redirects."""
    name = shown(url)
    headers = _merged(HEADERS, policy.headers)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(url, headers, deadline, watch, policy)
            if isinstance(answer, bytes):
                return answer
            old, new = urllib.parse.urlsplit(url), urllib.parse.urlsplit(answer)
            if (old.scheme, old.netloc) != (new.scheme, new.netloc):
                headers = {k: v for k, v in headers.items() if not SECRET.search(k)}
            url = answer
    except ImageError:
        raise
    except (OSError, http.client.HTTPException) as e:  # SSLError is an OSError
        if time.monotonic() >= deadline or isinstance(e, TimeoutError):
            raise ImageDownloadFailed(f"{name}: no answer within {policy.timeout:g} s") from e
        raise ImageDownloadFailed(f"{name} cannot be downloaded: {one_line(e)}") from e
    except ValueError as e:  # its message may hold the login
        raise ImageDownloadFailed(f"{name} cannot be downloaded: it is not a valid URL") from e
    raise ImageDownloadFailed(f"{name}: more than {MAX_REDIRECTS} redirects")


def _get(
    url: str,
    headers: dict[str, str],
    deadline: float,
    watch: Callable[[socket.socket], None],
    policy: MediaPolicy,
) -> bytes | str:
    """The body, or the address of a redirect."""
    name = shown(url)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImageDownloadFailed(f"{name}: only http:// and https:// addresses are followed")
    if parts.username is not None:
        raise ImageDownloadFailed("a user name in an image's URL is not supported: use headers")
    host = _host(parts.hostname, name)
    listed = is_listed(host, policy.allowed_domains)
    if not listed and policy.allowed_domains is not None:
        raise ImageDownloadFailed(f"{name}: host {host} is not among the allowed domains")
    default = 443 if parts.scheme == "https" else 80
    port = default if parts.port is None else parts.port
    trusted = policy.allow_private or listed
    if port == 0 or (port < 1024 and port not in (80, 443) and not trusted):
        raise ImageDownloadFailed(f"{name}: port {port} is refused; 80, 443, 1024 and up are not")
    # "%" stays: what is quoted already is not quoted again
    target = urllib.parse.quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="/%:=&~+!$,;'@()*?[]")

    address = host, port
    if proxy := urllib.parse.urlsplit(policy.proxy) if policy.proxy else None:
        # refuse what can be known here; a name that only the proxy resolves is left to it
        with contextlib.suppress(socket.gaierror, UnicodeError):
            _check(_resolve(host, port), host, listed, policy)
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

    def connect(address: tuple[str, int], *_: Any) -> socket.socket:
        try:
            found = _resolve(*address)
        except (socket.gaierror, UnicodeError) as e:
            if proxy:
                raise ImageDownloadFailed(f"{name}: the proxy's host is unknown") from e
            raise _refused(host, f"is unknown: {e}", policy) from e
        if not proxy:
            _check(found, host, listed, policy)
        sock = _connected(found, deadline)
        watch(sock)
        return sock

    # http.client's own seam (also used for tunnels): TLS still verifies the name, not the address
    connection._create_connection = connect  # type: ignore[attr-defined]
    with contextlib.closing(connection):
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as response:
            if response.status in REDIRECTS and (location := response.getheader("Location")):
                # http.client reads headers as Latin-1, servers write UTF-8
                location = location.encode("latin-1", "replace").decode("utf-8", "replace")
                return urllib.parse.urljoin(url, location)
            if response.status != 200:
                answer = one_line(f"{response.status} {response.reason}")
                raise ImageDownloadFailed(f"{name}: the server answered {answer}")
            return _body(response, name, deadline, policy)


def _body(
    response: http.client.HTTPResponse, name: str, deadline: float, policy: MediaPolicy
) -> bytes:
    """As sent: a Content-Encoding that nobody asked for is never unpacked."""
    expected = response.length  # from Content-Length
    if expected is not None and expected > policy.max_bytes:
        raise ImageInputTooLong(f"{name} has {expected:,} bytes, the limit is {policy.max_bytes:,}")
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


def _host(host: str, name: str) -> str:
    """A host of a URL as it is listed, checked and asked for: ASCII, lower case, no final dot."""
    if len(host) <= 253 and not host.isascii():
        host = host.encode("idna").decode().lower()  # full-width digits and dots become plain ones
    host = host.rstrip(".")
    if ":" in host and "%" not in host:
        return str(ipaddress.IPv6Address(host))
    if not HOST.fullmatch(host):
        raise ImageDownloadFailed(f"{name}: this is not the name of a host")
    return host


def _proxy_login(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


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


# -------------------------------------------------------------------------------------- addresses


def _resolve(host: str, port: int) -> list[tuple[Address, int, Any]]:
    """(address, family, sockaddr) of each address that the host has."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(ipaddress.ip_address(info[4][0]), info[0], info[4]) for info in infos]


def _check(
    found: list[tuple[Address, int, Any]], host: str, listed: bool, policy: MediaPolicy
) -> None:
    """Raise unless every address may be connected to: a name that mixes them is an attack."""
    for ip, _, _ in found:
        if reason := refusal(ip, listed, policy):
            raise _refused(host, f"is refused: {reason}", policy)


def _refused(host: str, reason: str, policy: MediaPolicy) -> ImageDownloadFailed:
    """One sentence for all reasons where strangers ask: the differences would map a private network."""
    if policy.allow_private:
        return ImageDownloadFailed(f"host {host} {reason}")
    error = ImageDownloadFailed(f"host {host} is refused: it is unknown or not on the public internet")
    error.__cause__ = OSError(f"host {host} {reason}")  # for the log
    return error


def _connected(found: list[tuple[Address, int, Any]], deadline: float) -> socket.socket:
    """A connection to the first address that answers."""
    failed = OSError("the host has no address")
    for _, family, sockaddr in found:
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
    raise failed


def refusal(ip: Address, listed: bool, policy: MediaPolicy) -> str | None:
    """Why this address may not be connected to; None if it may."""
    inner = _embedded(ip)
    if any(address in network for address in (ip, inner) for network in METADATA):
        return f"{ip} is link-local or a cloud's metadata address"
    if policy.allow_private:
        return None
    if listed and any(
        inner in ipaddress.ip_network(cidr, strict=False) for cidr in policy.allowed_cidrs
    ):
        return None
    if inner.version == 6:
        outside = inner not in UNICAST
    else:
        outside = inner.is_multicast or inner.is_reserved
    if outside or not inner.is_global or any(inner in network for network in NOT_PUBLIC):
        return f"{ip} is not an address of the public internet"
    return None


def _embedded(ip: Address) -> Address:
    """The IPv4 address inside an IPv6 one (mapped, NAT64, 6to4), else the same."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


def is_listed(host: str, domains: tuple[str, ...] | None) -> bool:
    """Is the host one of the allowed domains, or below a "*." one?"""
    for domain in domains or ():
        domain = domain.lower().rstrip(".")
        if host == domain or (domain.startswith("*.") and host.endswith(domain[1:])):
            return True
    return False
