"""Pictures made to break a decoder: each is decoded right, or one clear error, soon and in bounded memory."""

import contextlib
import io
import json
import random
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtp_llm.errors import ImageDecodeError, ImageError, ImageInputTooLong, ImageUnsupported
from rtp_llm.export.bundle import VisionSpec
from rtp_llm.runtime import media
from rtp_llm.runtime.media import WEB_FORMATS, MediaPolicy, fetch
from rtp_llm.runtime.preprocess import preprocess

SERVER = MediaPolicy(
    allow_local=False, allow_private=False, formats=WEB_FORMATS, max_pixels=50_000_000, max_bytes=20 << 20
)
RED, BLUE = (255, 0, 0), (0, 0, 255)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def encoded(colour=RED, size=(32, 24), fmt="PNG", mode="RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, fmt, **options)
    return out.getvalue()


def animated(fmt: str) -> bytes:
    later = [Image.new("RGB", (32, 24), BLUE), Image.new("RGB", (32, 24), (0, 255, 0))]
    return encoded(fmt=fmt, save_all=True, append_images=later, **({} if fmt == "MPO" else {"duration": 50}))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks: bytes, depth=8, kind=2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return PNG_MAGIC + head + b"".join(chunks) + chunk(b"IEND", b"")


def pixels(width, height) -> bytes:
    """IDAT of black RGB rows, a thousandth of what they become."""
    packer = zlib.compressobj(9)
    rows = b"\0" * (width * 3 + 1)
    return chunk(b"IDAT", b"".join(packer.compress(rows) for _ in range(height)) + packer.flush())


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of 40 bytes, is written again and again."""
    data = encoded(size=(2000, 2000), fmt="JPEG", progressive=True, mode="L")
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def with_exif(exif: bytes) -> bytes:
    return encoded(fmt="JPEG", exif=b"Exif\0\0" + exif, quality=95)


def gif(width, height, x=0, y=0, w=1, h=1) -> bytes:
    """A screen of one size, and on it a frame of another."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\xff\0\0" * 2
    return head + b"," + struct.pack("<HHHHB", x, y, w, h, 0) + b"\x02\x02\x44\x01\x00;"


def webp_canvas(side: int) -> bytes:
    canvas = struct.pack("<I", side - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas * 2
    frame = encoded(fmt="WEBP")[12:]
    anmf = b"\0" * 6 + struct.pack("<I", 31)[:3] + struct.pack("<I", 23)[:3] + b"\0" * 4 + frame
    body += b"ANIM" + struct.pack("<I", 6) + b"\0" * 6 + b"ANMF" + struct.pack("<I", len(anmf)) + anmf
    return b"RIFF" + struct.pack("<I", len(body)) + body


def ico(inner: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


HUGE = png(12_000, 12_000, chunk(b"IDAT", zlib.compress(b"\0" * 100)))
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (1 << 20)))
ROW = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))

GOOD = {  # what is odd about it, and still the picture is red
    "trailing zip": encoded() + b"PK\x03\x04" + b"\0" * 1000,
    "gif and javascript": encoded(fmt="GIF") + b"*/=1;alert(document.domain)//",
    "script in a comment": encoded(fmt="PNG")[:33]
    + chunk(b"tEXt", b"x\0<script>alert(1)</script>")
    + encoded(fmt="PNG")[33:],
    "16 bits": png(1, 1, chunk(b"IDAT", zlib.compress(b"\0\xff\xff\0\0\0\0")), depth=16),
    "CMYK": encoded(fmt="JPEG", mode="CMYK", quality=95),
    "many scans": encoded(fmt="JPEG", progressive=True, quality=95) + b"\0\0" + b"\xff\xda\0\2" * 1000,
    "apng": animated("PNG"),
    "animated webp": animated("WEBP"),
    "animated gif": animated("GIF"),
    "mpo": animated("MPO"),
    "a gif whose second frame is damaged": animated("GIF")[:-30],
    "an apng whose second frame is missing": animated("PNG")[: animated("PNG").index(b"fdAT") - 4],
    "a webp of a larger canvas": webp_canvas(33),
    "damaged exif": with_exif(b"II*\0\xff\xff\xff\xff"),
    "no orientation": with_exif(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"),
    "exif of endless tags": with_exif(
        b"II*\0\x08\0\0\0\xff\xff" + b"\x0f\x01\x02\0\xff\xff\xff\x7f\0\0\0\0" * 40
    ),
    "random exif": with_exif(b"II*\0\x08\0\0\0" + random.Random(0).randbytes(400)),
}
BAD = {
    "huge": (HUGE, ImageInputTooLong),
    "larger than Pillow takes": (png(60_000, 60_000), ImageInputTooLong),
    "real bomb": (png(8000, 7000, pixels(8000, 7000)), ImageInputTooLong),
    "no width": (png(0, 5, ROW), ImageDecodeError),
    "no screen and no frame": (gif(0, 0, w=0, h=0), ImageDecodeError),
    "negative": (png(0xFFFFFFFF, 1, ROW), ImageError),
    "a frame beyond the screen": (gif(1, 1, 60_000, 60_000, 5000, 5000), ImageInputTooLong),
    "a large webp canvas": (webp_canvas(13_000), ImageInputTooLong),
    "text bomb": (png(1, 1, ROW, *[TEXT_BOMB] * 80), ImageDecodeError),
    "scan bomb": (many_scans(20_000), ImageDecodeError),
    "segments": (b"\xff\xd8" + b"\xff\xef\0\2" * 1_000_000 + encoded(fmt="JPEG")[2:], ImageDecodeError),
    "ico with a bomb": (ico(HUGE), ImageDecodeError),
    "bmp": (encoded(fmt="BMP"), ImageDecodeError),
    "tiff": (encoded(fmt="TIFF"), ImageDecodeError),
    "jpeg 2000": (encoded(fmt="JPEG2000"), ImageDecodeError),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", ImageDecodeError),
    "svg": (b"<svg xmlns='x'><image href='file:///etc/passwd'/></svg>", ImageUnsupported),
    "html": (b"<!DOCTYPE html><img src=x>", ImageUnsupported),
    "zip": (b"PK\x03\x04" + encoded(), ImageDecodeError),
    "only a magic": (PNG_MAGIC, ImageDecodeError),
    "bad checksum": (encoded()[:29] + b"\0\0\0\0" + encoded()[33:], ImageDecodeError),
}


def middle(data: bytes) -> tuple[int, ...]:
    """The colour in the middle of what the model would see."""
    shown = preprocess(fetch(data, SERVER), VisionSpec("square", 8, 1, 8, "transformers"))
    return tuple(int(c) for c in shown[4, 2])


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_pictures_show_their_first_frame(name):
    assert np.abs(np.subtract(middle(GOOD[name]), RED)).max() <= 3


def test_a_palette_with_indices_beyond_its_end_is_decoded():
    palette, rows = chunk(b"PLTE", bytes(RED)), chunk(b"IDAT", zlib.compress(b"\0\0\xfa"))
    assert fetch(png(2, 1, palette, rows, kind=3), SERVER).image.convert("RGB").getpixel((0, 0)) == RED


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_one_line_soon(name):
    data, error = BAD[name]
    start = time.monotonic()
    with pytest.raises(error) as caught:
        fetch(data, SERVER)
    assert time.monotonic() - start < 2
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("fmt", WEB_FORMATS)
def test_pictures_cut_anywhere_are_an_image_error(fmt):
    data = encoded(fmt=fmt)
    for end in range(len(data) * 3 // 4):
        with pytest.raises(ImageError):
            fetch(data[:end], SERVER)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.sampled_from([encoded(fmt=f) for f in WEB_FORMATS] + [animated(f) for f in ("PNG", "WEBP", "GIF")]),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), max_size=6),
    st.sampled_from(["pillow", "transformers"]),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_decoded_or_an_image_error(data, changes, loading):
    damaged = bytearray(data)
    for position, new in changes:
        position %= len(damaged)
        damaged[position : position + len(new)] = new
    with contextlib.suppress(ImageError):
        preprocess(fetch(damaged, SERVER), VisionSpec("square", 8, 1, 8, loading))


def test_the_limit_of_scans_is_far_above_real_files():
    assert fetch(many_scans(20), SERVER).image.size == (2000, 2000)
    # parts of the metadata and what follows the picture are not counted
    noise = random.Random(1).randbytes(200).replace(b"\xff\xd9", b"") + b"\xff\xda" * 200
    data = encoded(fmt="JPEG", exif=b"Exif\0\0" + noise)
    media._check_jpeg(data + b"\0\0" + b"\xff\xda\0\2" * 200, "x")


MEASURE = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
from rtp_llm.errors import ImageError
from rtp_llm.runtime.media import WEB_FORMATS, MediaPolicy, fetch
policy = MediaPolicy(formats=WEB_FORMATS, max_pixels=50_000_000, max_bytes=20 << 20)
fetch(sys.argv[1], policy)  # imports the decoders
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before, used = peak(), {}
for path in sys.argv[1:]:
    start = time.monotonic()
    try:
        fetch(path, policy)
    except ImageError:
        pass
    used[path] = peak() - before, time.monotonic() - start
print(json.dumps(used))
"""


def test_hostile_pictures_take_little_memory(tmp_path):
    paths = []
    for i, data in enumerate([encoded(), *GOOD.values(), *(data for data, _ in BAD.values())]):
        paths.append(str(tmp_path / str(i)))
        (tmp_path / str(i)).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, timeout=120, check=True
    )
    used = json.loads(done.stdout)
    assert max(mb for mb, _ in used.values()) < 150, used  # MB above the imports
