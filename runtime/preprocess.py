"""The image recipes: a picture of any size and mode → the uint8 pixels that the vision graph eats.

Pixels equal the references' before their /255 and normalisation, which happen in the graph.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image, ImageOps

from ..errors import BundleError, ImageDecodeError, ImageInputTooLong, ImageUnsupported
from ..export.bundle import VisionSpec
from .download import one_line
from .media import LoadedImage

BICUBIC = Image.Resampling.BICUBIC
MAX_SIDE = 32_767  # pixels: the padded canvas of a longer strip costs minutes, or gigabytes
MAX_RESIZED = 100_000_000  # pixels: a 1×20000 picture with its shortest side at 336 is 2.3 billion
BAND = 256  # rows


def preprocess(image: LoadedImage | Image.Image, spec: VisionSpec) -> np.ndarray:
    """uint8 [size, size, 3] of one picture; a bare PIL image counts as given by the caller.

    Raises ImageUnsupported for a pixel mode without a conversion to RGB, ImageInputTooLong for a
    shape too extreme for the recipe, ImageDecodeError for damaged EXIF, BundleError for an unknown
    recipe.
    """
    if isinstance(image, Image.Image):
        image = LoadedImage(image, from_pil=True)
    width, height = image.image.size
    if max(width, height) > MAX_SIDE:
        raise ImageInputTooLong(
            f"{image.name} is {width}×{height}: the limit is {MAX_SIDE:,} pixels on a side"
        )
    rgb = to_rgb(image, spec.loading)
    size, resize = spec.size, spec.resize or spec.size
    if spec.recipe == "square":
        rgb = rgb.resize((size, size), BICUBIC)
    elif spec.recipe == "crop":
        rgb = _centre(_shortest_side(rgb, resize, image.name), size)
    elif spec.recipe == "pad":
        rgb = _centre(_padded(rgb, resize, spec.fill), size)
    else:
        raise BundleError(f"image recipe {spec.recipe!r} is unknown: known are square, crop, pad")
    return np.array(rgb)


def image_key(pixels: np.ndarray, spec: VisionSpec, salt: bytes = b"") -> bytes:
    """32 bytes that depend on the final pixels (or rows) and the recipe only, not on how the picture came.

    Callers of different salts (at most 64 bytes) get different keys, and so share nothing.
    """
    head = f"{spec.recipe} {pixels.shape} ".encode()
    return hashlib.blake2b(head + pixels.tobytes(), digest_size=32, key=salt).digest()


def to_rgb(loaded: LoadedImage, loading: str) -> Image.Image:
    """The spec's loading policy: which EXIF, which alpha (VisionSpec's docstring)."""
    if loading not in ("pillow", "transformers"):
        raise BundleError(f"image loading {loading!r} is unknown: known are pillow, transformers")
    image = loaded.image
    try:
        if loading == "pillow":
            return image.convert("RGB")
        if not loaded.from_pil:  # transformers.image_utils.load_image
            image = ImageOps.exif_transpose(image).convert("RGB")
        # transformers.image_transforms.convert_to_rgb; a palette's transparent colour outlives the
        # conversion above as info["transparency"], an alpha channel does not
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ValueError as e:
        raise ImageUnsupported(f"{loaded.name}: mode {image.mode} cannot become RGB: {e}") from e
    except Exception as e:  # hostile EXIF raises anything
        raise ImageDecodeError(f"{loaded.name} cannot be read: {one_line(e)}") from e


def _shortest_side(image: Image.Image, side: int, name: str) -> Image.Image:
    """CLIP's processor: the shortest side becomes `side`, the other is truncated."""
    short, long = sorted(image.size)
    other = int(side * long / short)
    if side * other > MAX_RESIZED:
        raise ImageInputTooLong(
            f"{name} is {image.width}×{image.height}: at {side} pixels on its shortest side it "
            f"would have {side * other:,} pixels, the limit is {MAX_RESIZED:,}; crop it first"
        )
    return image.resize((side, other) if image.width <= image.height else (other, side), BICUBIC)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Centre crop as CLIP's processor: floored offsets, black outside the picture."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _padded(image: Image.Image, size: int, fill: list[int]) -> Image.Image:
    """`expand2square` of LLaVA's mm_utils, then resized to size × size.

    The canvas of a 20000×500 panorama would take 1.2 GB, so it is resized in bands: Pillow resizes
    rows first and columns then, so the result is the same to the bit.
    """
    side, colour = max(image.size), (fill[0], fill[1], fill[2])
    left, top = (side - image.width) // 2, (side - image.height) // 2
    rows = Image.new("RGB", (size, side), colour)
    for y in range(0, image.height, BAND):
        height = min(BAND, image.height - y)
        band = Image.new("RGB", (side, height), colour)
        band.paste(image.crop((0, y, image.width, y + height)), (left, 0))
        rows.paste(band.resize((size, height), BICUBIC), (0, top + y))
    return rows.resize((size, size), BICUBIC)
