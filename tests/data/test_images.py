"""Images into arrays, and the line of text that says how."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxq.data.images import ImageSpec, list_images, load_image, load_images
from onnxq.errors import DataError, SpecError


@pytest.fixture
def picture(tmp_path):
    """Red grows to the right, green downwards, blue is 10; 8 wide, 6 high."""
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :, 0] = 10 * np.arange(8)
    pixels[:, :, 1] = 20 * np.arange(6)[:, None]
    pixels[:, :, 2] = 10
    path = tmp_path / "p.png"
    Image.fromarray(pixels).save(path)
    return path, pixels.astype(np.float32)


def test_the_crop_is_central_and_the_normalisation_exact(picture):
    path, pixels = picture
    got = load_image(path, ImageSpec.parse("resize=0,crop=4,mean=127,std=128,layout=nchw"))
    want = (pixels[1:5, 2:6] - 127) / 128
    np.testing.assert_array_equal(got, want.transpose(2, 0, 1))
    assert got.dtype == np.float32
    assert got.flags.c_contiguous


def test_channels_colours_and_scale(picture):
    path, pixels = picture
    spec = ImageSpec.parse(
        "resize=0,crop=0,scale=1/255,mean=0.1:0.2:0.3,std=0.5:1:2,layout=nhwc,color=bgr"
    )
    want = (pixels[:, :, ::-1] / np.float32(255) - [0.1, 0.2, 0.3]) / [0.5, 1, 2]
    np.testing.assert_allclose(load_image(path, spec), want, rtol=1e-6, atol=1e-7)


def test_resize_brings_the_shorter_side_to_the_size_as_pillow_does(picture):
    path, _ = picture
    got = load_image(path, ImageSpec.parse("resize=12,crop=0,mean=0,std=1,layout=nhwc"))
    want = np.asarray(Image.open(path).resize((16, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got, want)


def test_grey_images_get_three_channels(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (4, 4), 77).save(path)
    got = load_image(path, ImageSpec.parse("resize=0,crop=0,mean=0,std=1"))
    assert got.shape == (3, 4, 4)
    assert (got == 77).all()


def test_a_spec_prints_as_text_that_parses_to_itself():
    spec = ImageSpec.parse("resize=232,mean=1:2:3,std=4,color=bgr")
    assert ImageSpec.parse(str(spec)) == spec
    assert spec.crop == 224


@pytest.mark.parametrize(
    "text",
    ["size=3", "resize=big", "resize", "std=0", "mean=1:2", "layout=nchw8", "scale=1/0",
     "resize=-1", "crop=1,crop=2"],
)  # fmt: skip
def test_a_spec_that_makes_no_sense_is_refused(text):
    with pytest.raises(SpecError) as caught:
        ImageSpec.parse(text)
    assert caught.value.code == "SPEC-IMAGE"
    assert caught.value.hint


def test_files_that_are_no_images_or_too_small_are_refused(picture, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for path, spec in ((text, ImageSpec()), (picture[0], ImageSpec(resize=0, crop=7))):
        with pytest.raises(DataError) as caught:
            load_image(path, spec)
        assert caught.value.code == "DATA-IMAGE"


def test_images_of_different_sizes_need_a_crop(picture, tmp_path):
    Image.new("RGB", (9, 6)).save(tmp_path / "q.png")
    paths = list_images(tmp_path)
    assert [path.name for path in paths] == ["p.png", "q.png"]
    with pytest.raises(DataError, match="crop"):
        load_images(paths, ImageSpec(resize=0, crop=0))
    assert load_images(paths, ImageSpec(resize=0, crop=6)).shape == (2, 3, 6, 6)


def test_a_folder_without_images_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError) as caught:
            list_images(folder)
        assert caught.value.code == "DATA-EMPTY"
