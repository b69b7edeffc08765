"""Images deeper than 8 bits, and TIFFs of many bands: what is taken of them is said, and scaled when it is asked."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from exporting import checkpoint_of, config_of, neck_export_cli, trace_quickly
from PIL import Image

from export.contract.signature import encoder_signature
from export.verification.verify import reference_pixels
from neck.config import EncoderConfig
from neck.images import ImageError, ImageFolder, ValueRange, load_images, read_image

REFLECTANCE = np.linspace(0, 4000, 24 * 40).round().astype(np.uint16).reshape(24, 40)
"""As satellites give it: 10000 is all of the light, most of the land is below 4000."""

SAYS = "sat.png: the image is 16-bit gray with values 0 to 4000. "


def save(folder: Path, values: npt.NDArray[np.generic], name: str = "sat.png") -> Path:
    path = folder / name
    Image.fromarray(values).save(path)
    return path


def write_tiff(path: Path, bands: int, bits: int, kind: int) -> Path:
    """A TIFF of 2 x 2 pixels with so many bands, by hand: Pillow writes no such file."""
    data = bytes(2 * 2 * bands * bits // 8)
    many = struct.pack(f"<{bands}H", *[bits] * bands), struct.pack(f"<{bands}H", *[kind] * bands)
    after = 8 + len(data)
    # a value of up to four bytes stands in the place of its offset
    where = [after, after + len(many[0])] if bands > 2 else [int.from_bytes(values, "little") for values in many]
    entries = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, bands, where[0]),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
    ]
    entries += [(277, 3, 1, bands), (278, 3, 1, 2), (279, 4, 1, len(data)), (339, 3, bands, where[1])]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<L", after + sum(map(len, many))) + data + b"".join(many) + table)
    return path


def test_what_became_of_16_bits_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    pixels = read_image(save(tmp_path, REFLECTANCE), say=said.append)
    assert pixels.max() == 15
    (line,) = said
    assert SAYS in line and "8-bit values from 0 to 15." in line and "--image-range" in line
    said.clear()
    read_image(save(tmp_path, (REFLECTANCE >> 4).astype(np.uint8), "plain.png"), say=said.append)
    assert said == []  # the control


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_range_scales(suffix: str, tmp_path: Path) -> None:
    said: list[str] = []
    path = save(tmp_path, REFLECTANCE, f"sat.{suffix}")
    pixels = read_image(path, ValueRange(0, 4000), said.append)
    assert np.array_equal(pixels, np.rint(REFLECTANCE / 4000 * 255).astype(np.uint8)[:, :, None].repeat(3, axis=2))
    assert said == [
        f"sat.{suffix}: the image is 16-bit gray with values 0 to 4000; pixel values from 0 to 4000 are scaled to the "
        "range 0 to 255"
    ]
    clipped = read_image(path, ValueRange(1000, 2000))[:, :, 0]
    assert (clipped[REFLECTANCE <= 1000] == 0).all() and (clipped[REFLECTANCE >= 2000] == 255).all()
    assert not np.array_equal(clipped, pixels[:, :, 0])


def test_8_bits_are_taken_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path, np.full((4, 4, 3), 200, np.uint8), "a.png")
    assert (read_image(path, ValueRange(0, 4000)) == 200).all()


def test_floats_need_a_range(tmp_path: Path) -> None:
    values = np.linspace(0, 0.4, 16, dtype=np.float32).reshape(4, 4)
    values[0, 0] = np.nan
    path = save(tmp_path, values, "float.tif")
    with pytest.raises(ImageError, match=r"tif: the image is 32-bit float gray with values 0\.02\d*.*--image-range"):
        read_image(path)
    pixels = read_image(path, ValueRange(0, 0.4))
    assert pixels[0, 0, 0] == 0 and pixels[-1, -1, 0] == 255


def test_color_of_16_bits_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = Path(__file__).parent / "data" / "images" / "rgb16.png"
    most = int(read_image(path, say=said.append).max())
    (line,) = said
    assert (
        line.startswith("rgb16.png: the image has 16-bit color")
        and str(most * 257) in line
        and f"{most} of 255" in line
    )
    with pytest.raises(ImageError, match="16-bit color, and Pillow decodes"):
        read_image(path, ValueRange(0, 4000))


@pytest.mark.parametrize(
    ("bands", "bits", "kind", "says"),
    [
        (5, 8, 1, "5 bands of 8-bit unsigned integers"),
        (5, 16, 1, "5 bands of 16-bit unsigned integers"),
        (12, 16, 2, "12 bands of 16-bit signed integers"),
        (3, 32, 3, "3 bands of 32-bit floats"),
        (2, 64, 3, "2 bands of 64-bit floats"),
    ],
)
def test_many_bands_are_named(bands: int, bits: int, kind: int, says: str, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "many.tif", bands, bits, kind)
    with pytest.raises(ImageError, match=rf"many\.tif: the image is a TIFF file with {says}") as caught:
        read_image(path)
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_compression_that_pillow_lacks_is_named(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", 3, 8, 1)
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<HHLL", 259, 3, 1, 1), struct.pack("<HHLL", 259, 3, 1, 34712))
    )
    with pytest.raises(ImageError, match="with method 34712, which Pillow"):
        read_image(path)


def test_pillow_adds_no_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It logs `More samples per pixel than can be decoded`, and Python's last resort prints what nobody handles."""
    heard, root = logging.getLogger("PIL").handlers, logging.getLogger()
    assert any(isinstance(handler, logging.NullHandler) for handler in heard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(root, "handlers", [])  # pytest's own
        with pytest.raises(ImageError):
            read_image(write_tiff(tmp_path / "x.tif", 13, 16, 1))
    assert capsys.readouterr().err == ""


def test_one_band_by_hand_is_read(tmp_path: Path) -> None:
    """The control: the same writer."""
    assert read_image(write_tiff(tmp_path / "one.tif", 1, 8, 1)).shape == (2, 2, 3)


def test_a_damaged_tiff_is_damaged(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "cut.tif", 5, 16, 1)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"unsupported format|cannot be decoded"):
        read_image(path)
    path.write_bytes(b"II*\0" + b"\xff" * 4)  # its table would lie behind its end
    with pytest.raises(ImageError, match=r"unsupported format|cannot be decoded"):
        read_image(path)


@pytest.mark.parametrize("text", ["", "0", "0:0", "5:1", "a:b", "0:inf", "nan:1", "0:1:2"])
def test_no_range(text: str) -> None:
    with pytest.raises(ImageError, match="range of pixel values; write it as LOW:HIGH"):
        ValueRange.parse(text)


def test_the_reference_reads_by_the_range(tmp_path: Path) -> None:
    save(tmp_path, REFLECTANCE)
    signature = encoder_signature(EncoderConfig.from_file(config_of("meta-dual")))
    scaled = reference_pixels(signature, ImageFolder(tmp_path, ValueRange(0, 4000)), 1)
    assert scaled.max() == 255 and reference_pixels(signature, tmp_path, 1).max() == 15
    assert np.array_equal(scaled, load_images([tmp_path / "sat.png"], signature.image_size, ValueRange(0, 4000)))


def test_the_verdict_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)
    images = tmp_path / "images"
    images.mkdir()
    save(images, REFLECTANCE)
    given = ["onnx", "--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual")]
    given += ["--images", images, "--output", tmp_path / "x.onnx"]
    ran = neck_export_cli(*given)
    assert ran.code == 0 and SAYS in ran.out
    ran = neck_export_cli("verify", tmp_path / "x.onnx", "--images", images, "--image-range", "0:4000")
    assert ran.code == 0 and "0 to 4000" in ran.out
    assert "0 to 4000" in neck_export_cli("inspect", tmp_path / "x.onnx").out
    assert neck_export_cli("verify", tmp_path / "x.onnx", "--image-range", "0:4000").code == 2
    ran = neck_export_cli("verify", tmp_path / "x.onnx", "--images", images, "--image-range", "high")
    assert ran.code == 2 and "--image-range" in ran.err
