"""The pixels equal the references', for every recipe, format and shape."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtp_llm.errors import BundleError, ImageInputTooLong
from rtp_llm.export.bundle import VisionSpec
from rtp_llm.runtime import preprocess as module
from rtp_llm.runtime.media import LoadedImage, MediaPolicy, fetch
from rtp_llm.runtime.preprocess import image_key, preprocess

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
FILL = [122, 116, 104]
SPECS = {
    "qwenvl_A": VisionSpec("square", 56, 256, 128),
    "qwenvl_C": VisionSpec("square", 96, 256, 128),
    "llava_orig_A": VisionSpec("pad", 56, 16, 64, resize=56, fill=FILL),
    "llava_hf_A": VisionSpec("crop", 56, 16, 64, "transformers", 56),
}
sides = st.integers(1, 90)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="shared/goldens is not beside the repository")
@pytest.mark.parametrize("name", SPECS)
def test_pixels_equal_the_reference(name):
    arrays, spec, images = np.load(GOLDENS / name / "cases.npz"), SPECS[name], 0
    for key in arrays.files:
        file, _, kind = key.removeprefix("image:").rpartition(".")
        if not key.startswith("image:") or not kind.startswith("pixel_values"):
            continue
        values = (arrays[key] * STD + MEAN) * 255
        expected = np.rint(values).astype(np.uint8).transpose(1, 2, 0)
        assert np.abs(values - np.rint(values)).max() < 1e-3
        path = GOLDENS / name / "images" / file
        # llava_hf recorded PIL objects, and paths where those give other pixels
        given_as_pil = name == "llava_hf_A" and kind == "pixel_values"
        if given_as_pil:
            found = preprocess(Image.open(path), spec)
        else:
            found = preprocess(fetch(path, MediaPolicy()), spec)
        np.testing.assert_array_equal(found, expected, key)
        if given_as_pil and key + "_via_path" not in arrays.files:
            found = preprocess(fetch(path, MediaPolicy()), spec)
            np.testing.assert_array_equal(found, expected, key + " by path")
        images += 1
    print(f"{name}: {images} images, all pixels equal")
    assert images >= 2


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([1, 7, 256]))
def test_padding_in_bands_equals_the_whole_canvas(width, height, band):
    image, side = noise(width, height), max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(FILL))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BAND", band)
        found = preprocess(image, VisionSpec("pad", 28, 4, 8, resize=28, fill=FILL))
    expected = canvas.resize((28, 28), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([20, 28, 33]))
def test_crop_equals_transformers_processor(width, height, resize):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": resize},
        crop_size={"height": 28, "width": 28},
        do_rescale=False,
        do_normalize=False,
    )
    image = noise(width, height)
    found = preprocess(image, VisionSpec("crop", 28, 4, 8, "transformers", resize))
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I", "F"]
MODES += ["HSV", "LAB", "RGBa"]


@pytest.mark.parametrize("loading", ["pillow", "transformers"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode, loading):
    image = Image.new(mode, (9, 5))
    for from_pil in (True, False):
        spec = VisionSpec("square", 4, 1, 8, loading)
        found = preprocess(LoadedImage(image, from_pil), spec)
        assert found.shape == (4, 4, 3) and found.dtype == np.uint8
    assert image.mode == mode and image.size == (9, 5)


def test_alpha_follows_the_loading_policy():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    dropped, white = [10, 20, 30], [255, 255, 255]
    for loading, from_pil, expected in (
        ("pillow", True, dropped),
        ("pillow", False, dropped),
        ("transformers", True, white),
        ("transformers", False, dropped),
    ):
        pixels = preprocess(LoadedImage(image, from_pil), VisionSpec("square", 4, 1, 8, loading))
        assert pixels[0, 0].tolist() == expected, (loading, from_pil)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 90), (90, 1), (3000, 2), (2, 3000)])
@pytest.mark.parametrize("recipe", ["square", "crop", "pad"])
def test_extreme_shapes_give_pixels(recipe, width, height):
    spec = VisionSpec(recipe, 28, 4, 8, resize=28, fill=FILL)
    assert preprocess(noise(width, height), spec).shape == (28, 28, 3)


def test_a_strip_is_refused_before_it_takes_gigabytes():
    with pytest.raises(ImageInputTooLong, match=r"20000×1: at 336 pixels.*crop it first"):
        preprocess(Image.new("L", (20_000, 1)), VisionSpec("crop", 336, 576, 8, resize=336))
    for recipe in ("square", "crop", "pad"):
        with pytest.raises(ImageInputTooLong, match="1×40000: the limit is 32,767 pixels"):
            preprocess(Image.new("L", (1, 40_000)), VisionSpec(recipe, 336, 576, 8))


def test_the_key_is_that_of_the_picture_not_of_its_way(tmp_path):
    spec = SPECS["llava_orig_A"]
    image = noise(60, 40)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    sources = [tmp_path / "a.png", tmp_path / "b.bmp", (tmp_path / "a.png").read_bytes(), image]
    keys = {image_key(preprocess(fetch(s, MediaPolicy()), spec), spec) for s in sources}
    assert len(keys) == 1
    pixels = preprocess(image, spec)
    pixels[0, 0, 0] ^= 1
    assert image_key(pixels, spec) not in keys


def test_an_unknown_recipe_is_an_error_of_the_bundle():
    with pytest.raises(BundleError, match="'tiles' is unknown"):
        preprocess(noise(4, 4), VisionSpec("tiles", 28, 4, 8))
    with pytest.raises(BundleError, match="'opencv' is unknown"):
        preprocess(noise(4, 4), VisionSpec("square", 28, 4, 8, "opencv"))


def test_callers_of_different_salts_share_no_picture() -> None:
    pixels, spec = np.zeros((4, 4, 3), np.uint8), VisionSpec("square", 4, 1, 1)
    keys = {image_key(pixels, spec, salt) for salt in (b"", b"a", b"b" * 64)}
    assert len(keys) == 3 and image_key(pixels.copy(), spec, b"a") in keys
