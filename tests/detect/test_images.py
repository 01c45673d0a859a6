"""Every kind of image becomes uint8 RGB; what cannot is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from deformable_detr.detect import ImageError, prepare_image, read_image
from deformable_detr.detect.images import shrink


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path, name):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / name)
    assert read_image(tmp_path / name).tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_sixteen_bit_arrays_are_scaled_and_not_clipped():
    array = np.full((1, 1, 3), (0, 32896, 65535), dtype=np.uint16)
    assert read_image(array).tolist() == [[[0, 128, 255]]]


def test_a_photograph_stands_upright_as_its_exif_says(tmp_path, pixels):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned clockwise by a right angle
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels, k=-1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_images_of_other_modes_have_three_channels(mode):
    rgb = read_image(Image.new("RGB", (5, 4), "white").convert(mode))
    assert rgb.shape == (4, 5, 3) and rgb.dtype == np.uint8
    assert (rgb >= 254).all()


def test_what_is_transparent_is_white_whatever_colour_hides_there(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_arrays_are_rgb_unless_said_otherwise(pixels):
    assert np.array_equal(read_image(pixels), pixels)
    assert np.array_equal(read_image(pixels[:, :, ::-1], input_format="BGR"), pixels)
    opaque = np.dstack([pixels[:, :, ::-1], np.full(pixels.shape[:2], 255, np.uint8)])
    assert np.array_equal(read_image(opaque, input_format="BGR"), pixels)
    assert np.array_equal(read_image(pixels[:, :, 0]), read_image(pixels[:, :, :1]))


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((4, 4, 3)), "uint8 in .* got float64"),
        (np.zeros((3, 4, 5), np.uint8), r"got \(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (7, "got int"),
        (Image.new("F", (2, 2), 2), "floating-point .* from 2.0 to 2.0"),
        (Image.new("I", (2, 2), 70_000), "from 70000 to 70000"),
    ],
)
def test_what_is_no_image_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_image(source)


def test_an_unknown_channel_order_is_refused(pixels):
    with pytest.raises(ValueError, match="'GBR'"):
        read_image(pixels, input_format="GBR")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "not an image"),
        (lambda data: b"hello", "not an image"),
        (None, "no such file"),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage, message, suffix):
    path = tmp_path / f"broken.{suffix}"
    if damage:
        Image.effect_noise((60, 40), 80).save(path)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError, match=f"broken.{suffix}: .*{message}"):
        read_image(path)


def test_large_images_are_read_without_a_warning_up_to_twice_the_limit_of_pillow(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (60, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert read_image(tmp_path / "large.png").shape == (40, 60, 3)
    assert not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with pytest.raises(ImageError, match="large.png.*exceeds limit of 2398 pixels"):
        read_image(tmp_path / "large.png")


def test_a_file_name_that_is_not_utf8_can_be_read_and_printed(tmp_path, pixels):
    path = str(tmp_path) + "/\udcff.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path), pixels)
    with pytest.raises(ImageError) as caught:
        read_image(path + ".png")
    assert r"\xff" in str(caught.value)
    assert str(caught.value).encode()


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_an_address_that_cannot_be_read_is_named_without_its_password(scheme, caplog, capfd):
    with pytest.raises(ImageError, match=f"cannot read image {scheme}://127.0.0.1:1/a.jpg: .*refused"):
        read_image(f"{scheme}://me:secret@127.0.0.1:1/a.jpg")
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_prepared_image_is_what_evaluation_gives_the_model(tiny_model, pixels, order):
    tiny_model.model.input_format = order
    prepared = prepare_image(tiny_model, pixels)
    assert (prepared["height"], prepared["width"]) == (40, 60)
    assert prepared["image"].shape == (3, 64, 96) and prepared["image"].dtype == torch.uint8
    assert prepared["image"][:, 0, 0].tolist() == [int(v) for v in pixels[0, 0, :: 1 if order == "RGB" else -1]]


def test_only_what_is_too_large_is_reduced(pixels):
    assert shrink(pixels, 60) is pixels
    assert shrink(pixels, 30).shape == (20, 30, 3)
