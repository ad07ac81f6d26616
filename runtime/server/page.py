"""The playground page, and what a browser may do in it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

PAGE = Path(__file__).with_name("playground.html")


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The file and its headers: only its own scripts run, and they reach this server only."""
    content = PAGE.read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(content, b"script"),
        "style-src": _hashes(content, b"style"),
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return content, {
        "Content-Security-Policy": "; ".join(f"{k} {v}" for k, v in policy.items()),
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hashes(content: bytes, tag: bytes) -> str:
    """Of all that stands between such tags, as a Content-Security-Policy has them."""
    blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def page() -> HTMLResponse:
    content, headers = _page()
    return HTMLResponse(content, headers=headers)
