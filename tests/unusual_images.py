"""Writes images that cameras, tools and networks make and that readers disagree about: unusual_images.py FOLDER.

Every file is made from the same few pixels, so that a wrong turn, color or row shows.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cpp_images import chunk
from PIL import Image

HEIGHT, WIDTH = 21, 34
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 14: 2, 16: 8}
"""Bytes of a value by TIFF's number of its type."""
Entry = tuple[int, int, int, bytes]


def pixels(channels: int = 3) -> np.ndarray:
    """A slope with some chance in it: no row or column is the mirror of another."""
    slope = np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 3)[:, :, None] * np.arange(1, channels + 1) // 2
    chance = np.random.default_rng(channels).integers(0, 40, (HEIGHT, WIDTH, channels))
    return ((slope + chance) % 256).astype(np.uint8)


def jpeg(mode: str = "RGB", channels: int = 3, **options: Any) -> bytes:
    stream = io.BytesIO()
    array = pixels(channels)
    Image.fromarray(array[:, :, 0] if channels == 1 else array, mode).save(
        stream, "JPEG", **{"quality": 90, "subsampling": 0} | options
    )
    return stream.getvalue()


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments after its first one."""
    at = 4 + struct.unpack(">H", data[4:6])[0]
    added = b"".join(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments)
    return data[:at] + added + data[at:]


def tiff(*entries: Entry, order: str = "<", head: bytes | None = None, count: int | None = None) -> bytes:
    """EXIF data of one directory; a value of more than 4 bytes lies behind it."""
    start = head or (b"II\x2a\0" if order == "<" else b"MM\0\x2a")
    told = len(entries) if count is None else count
    place, outside, lines = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, number, value in entries:
        if len(value) > 4:
            lines += struct.pack(order + "HHLL", tag, kind, number, place + len(outside))
            outside += value
        else:
            lines += struct.pack(order + "HHL", tag, kind, number) + value.ljust(4, b"\0")
    return start + struct.pack(order + "LH", 8, told) + lines + bytes(4) + outside


def turn(kind: int, value: bytes, order: str = "<", number: int | None = None, **more: Any) -> bytes:
    """EXIF data with the orientation as a value of a type."""
    return tiff((0x0112, kind, len(value) // TYPES[kind] if number is None else number, value), order=order, **more)


def short(value: int, order: str = "<") -> bytes:
    return turn(3, struct.pack(order + "H", value), order)


def exif_jpegs() -> Iterator[tuple[str, bytes]]:
    """JPEGs whose EXIF or XMP has the orientation, in every form that was seen, and in some that should not be."""
    for order, name in (("<", "little"), (">", "big")):
        for value in range(1, 9):
            yield f"exif-{name}-{value}", with_exif(short(value, order))
        forms = {
            "long": (4, struct.pack(order + "L", 6)),
            "byte": (1, b"\x06"),
            "signed-byte": (6, b"\x06"),
            "signed-short": (8, struct.pack(order + "h", 6)),
            "signed-long": (9, struct.pack(order + "l", 6)),
            "fraction": (5, struct.pack(order + "LL", 12, 2)),
            "signed-fraction": (10, struct.pack(order + "ll", -6, -1)),
            "no-fraction": (5, struct.pack(order + "LL", 6, 0)),
            "part-fraction": (5, struct.pack(order + "LL", 13, 2)),
            "float": (11, struct.pack(order + "f", 6)),
            "odd-float": (11, struct.pack(order + "f", 6.5)),
            "double": (12, struct.pack(order + "d", 6)),
            "text": (2, b"6\0"),
            "bytes": (7, b"\x06"),
            "directory": (13, struct.pack(order + "L", 6)),
            "64-bits": (16, struct.pack(order + "Q", 6)),
            "unknown-type": (14, struct.pack(order + "H", 6)),
            "two": (3, struct.pack(order + "HH", 6, 3)),
            "three": (3, struct.pack(order + "HHH", 8, 3, 1)),
        }
        for form, (kind, value) in forms.items():
            yield f"exif-{name}-{form}", with_exif(turn(kind, value, order))
    six, three = (0x0112, 3, 1, b"\x06\0"), (0x0112, 3, 1, b"\x03\0")
    other = (0x010F, 2, 3, b"me\0")
    outside = (0x010E, 2, 2**30, b"beyond")  # says that it is larger than the file
    far = (0x010E, 2, 6, struct.pack("<L", 2**20))  # its value would lie beyond the end
    far_bytes = tiff(other, six).replace(struct.pack("<HHL", 0x010F, 2, 3), struct.pack("<HHL", 0x010F, 2, 6))
    for name, data in {
        "zero": short(0), "nine": short(9), "large": short(65535),
        "none": turn(3, b"\x06\0", number=0),
        "twice": tiff(six, three), "twice-first-empty": tiff((0x0112, 3, 0, b""), three),
        "after-another": tiff(other, six), "after-too-large": tiff(outside, six), "after-one-beyond": far_bytes,
        "far": tiff(far, six),
        "missing-entries": tiff(six, count=9), "cut-entry": tiff(other, six)[:28], "cut-count": tiff(six)[:9],
        "elsewhere": b"II\x2a\0" + struct.pack("<L", 500) + tiff(six)[8:],
        "no-tiff": b"hello, world", "short": b"II\x2a", "empty": b"", "twice-prefixed": EXIF + short(6),
        "swapped-head": turn(3, b"\x06\0", head=b"II\0\x2a"),
        "swapped-big-head": turn(3, b"\0\x06", ">", head=b"MM\x2a\0"),
        "big-tiff-head": turn(3, b"\0\x06", ">", head=b"MM\0\x2b"),
        "little-big-tiff": turn(3, b"\x06\0", head=b"II\x2b\0"),
    }.items():  # fmt: skip
        yield f"exif-{name}", with_exif(data)
        if name in ("no-tiff", "short", "little-big-tiff"):  # Pillow looks at it at another time then
            yield f"exif-{name}-resolution", with_exif(data, dpi=(72, 72))
    split = EXIF + short(6)
    yield "exif-split", with_segments(jpeg(), (0xE1, split[:20]), (0xE1, EXIF + split[20:]))
    yield "exif-two-whole", with_segments(jpeg(), (0xE1, split), (0xE1, EXIF + short(3)))
    yield "exif-first-empty", with_segments(jpeg(), (0xE1, EXIF), (0xE1, split))
    attribute, element = b'<x tiff:Orientation="6"/>', b"<tiff:Orientation>8</tiff:Orientation>"
    yield "xmp-attribute", with_segments(jpeg(), (0xE1, XMP + attribute))
    yield "xmp-element", with_segments(jpeg(), (0xE1, XMP + element))
    yield "xmp-two", with_segments(jpeg(), (0xE1, XMP + attribute), (0xE1, XMP + element))
    yield "xmp-zero", with_segments(jpeg(), (0xE1, XMP + attribute.replace(b"6", b"0")))
    yield "xmp-second", with_segments(jpeg(), (0xE1, XMP + b'tiff:Orientation="x" ' + element))
    yield "xmp-quote", with_segments(jpeg(), (0xE1, XMP + attribute.replace(b'"', b"'")))
    yield "xmp-and-exif", with_segments(jpeg(), (0xE1, XMP + attribute), (0xE1, EXIF + short(3)))
    yield "xmp-and-exif-zero", with_segments(jpeg(), (0xE1, XMP + attribute), (0xE1, EXIF + short(0)))
    yield "xmp-and-exif-without", with_segments(jpeg(), (0xE1, EXIF + tiff(other)), (0xE1, XMP + attribute))
    yield "xmp-and-exif-broken", with_segments(jpeg(), (0xE1, EXIF + b"hello, world"), (0xE1, XMP + attribute))


def with_exif(data: bytes, **options: Any) -> bytes:
    return with_segments(jpeg(**options), (0xE1, EXIF + data))


def without(data: bytes, marker: int) -> bytes:
    """A JPEG without its segment of a marker."""
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]


def jpegs() -> Iterator[tuple[str, bytes]]:
    """JPEGs of other colors, samplings and scans."""
    inks = jpeg("CMYK", 4)
    adobe = inks.index(b"Adobe")
    yield "cmyk", inks
    yield "cmyk-unmarked", without(inks, 0xEE)
    yield "cmyk-no-black", jpeg_of(np.dstack([pixels(), np.zeros((HEIGHT, WIDTH), np.uint8)]), "CMYK")
    yield "cmyk-all-black", jpeg_of(np.full((HEIGHT, WIDTH, 4), 255, np.uint8), "CMYK")
    yield "ycck", inks[: adobe + 11] + b"\x02" + inks[adobe + 12 :]
    yield "cmyk-unknown-transform", inks[: adobe + 11] + b"\x07" + inks[adobe + 12 :]
    yield "cmyk-progressive", jpeg("CMYK", 4, progressive=True)
    yield "cmyk-turned", with_segments(inks, (0xE1, EXIF + short(6)))
    yield "cmyk-unmarked-turned", with_segments(without(inks, 0xEE), (0xE1, EXIF + short(5)))
    marked = lambda transform: (0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))  # noqa: E731
    bare = without(jpeg(), 0xE0)
    for transform in (0, 1, 9):
        yield f"adobe-{transform}", bare[:2] + with_segments(b"\xff\xd8\xff\xe0\0\2", marked(transform))[6:] + bare[2:]
    yield "no-jfif", bare
    yield "gray", jpeg("L", 1)
    yield "gray-progressive", jpeg("L", 1, progressive=True)
    for sampling in (0, 1, 2):
        yield f"progressive-{sampling}", jpeg(progressive=True, subsampling=sampling)
        yield f"sampled-{sampling}", jpeg(subsampling=sampling, quality=30)
    yield "restarts", jpeg(restart_marker_blocks=1)
    yield "restarts-progressive", jpeg(restart_marker_rows=1, progressive=True)
    yield "worst-quality", jpeg(quality=1, subsampling=2)
    yield "many-scans", repeat_last_scan(jpeg(progressive=True), 80)
    yield "comment", with_segments(jpeg(), (0xFE, b"\xff\xda\xff\xd9"))
    yield "thumbnail", with_segments(jpeg(), (0xE1, EXIF + short(6) + jpeg(progressive=True)))
    yield "filled", jpeg().replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1)
    yield "junk", jpeg().replace(b"\xff\xdb", b"junk\xff\xdb", 1)
    yield "two-files", jpeg() + jpeg(progressive=True)
    whole, progressive = jpeg(), jpeg(progressive=True, subsampling=2)
    for name, data in (("jpeg", whole), ("progressive", progressive)):
        for part in (1, 2, 3):
            yield f"cut-{name}-{part}", data[: len(data) * part // 4]
        yield f"cut-{name}-end", data[:-2]
        yield f"cut-{name}-last", data[:-1]
        yield f"ended-{name}", data[: len(data) * 2 // 3] + b"\xff\xd9"
    yield "trailing", whole + b"something else"
    yield "twelve-bits", whole.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1)
    yield "two-layers", whole.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x0e\x08", 1)
    yield "no-rows", bytes(whole).replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 0, WIDTH), 1)
    yield "no-scan", whole[: whole.index(b"\xff\xda")]


def repeat_last_scan(data: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def jpeg_of(array: np.ndarray, mode: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, "JPEG", quality=90)
    return stream.getvalue()


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
KINDS = [(depth, 0) for depth in (1, 2, 4, 8, 16)] + [(depth, 3) for depth in (1, 2, 4, 8)]
KINDS += [(depth, color) for color in (2, 4, 6) for depth in (8, 16)]


def rows_of(samples: np.ndarray, depth: int, filters: int | None = 0) -> bytes:
    """The rows of a PNG; `filters` None: each row by the next of the five."""
    out, step = b"", max(1, samples.shape[2] * depth // 8)
    above = None
    for number, row in enumerate(samples):
        if depth < 8:
            bits = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - depth :]
            line = np.packbits(bits.reshape(-1)).astype(int)
        else:
            line = np.frombuffer(row.astype(">u2" if depth == 16 else "u1").tobytes(), np.uint8).astype(int)
        kind = number % 5 if filters is None else filters
        upper = np.zeros_like(line) if above is None else above
        left, corner = (np.concatenate([np.zeros(step, int), values])[: len(line)] for values in (line, upper))
        base = left + upper - corner
        near = [abs(base - left), abs(base - upper), abs(base - corner)]
        paeth = np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], upper, corner))
        guess = [np.zeros_like(line), left, upper, (left + upper) // 2, paeth][kind]
        out += bytes([kind]) + ((line - guess) % 256).astype(np.uint8).tobytes()
        above = line
    return out


def png(depth: int = 8, color: int = 2, before: bytes = b"", after: bytes = b"", **changes: Any) -> bytes:
    """A PNG of a kind. Changes: interlaced, filters, size, data (packed), chunks (of pixels), end."""
    height, width = changes.get("size", (HEIGHT, WIDTH))
    chance = np.random.default_rng(depth * 10 + color)
    samples = chance.integers(0, 2**depth, (height, width, CHANNELS[color]))
    parts = [samples]
    if changes.get("interlaced"):
        parts = [samples[row::down, column::right] for row, column, down, right in PASSES]
    rows = b"".join(rows_of(part, depth, changes.get("filters", 0)) for part in parts if part.size)
    data = changes.get("data", lambda rows: zlib.compress(rows))(rows)
    if color == 3 and b"PLTE" not in before and not changes.get("no_palette"):
        before += chunk(b"PLTE", bytes(np.random.default_rng(1).integers(0, 256, 3 * min(256, 2**depth), np.uint8)))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, bool(changes.get("interlaced")))
    count = changes.get("chunks", 1)
    size = len(data) // count + 1
    idat = b"".join(chunk(b"IDAT", data[at : at + size]) for at in range(0, len(data), size))
    return PNG_MAGIC + chunk(b"IHDR", header) + before + idat + after + changes.get("end", chunk(b"IEND", b""))


def profile(data: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a text."""
    digits = data.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return f"\nexif\n{len(data):8}\n{lines}\n".encode()


def pngs() -> Iterator[tuple[str, bytes]]:
    """PNGs of every kind of pixels, with odd palettes, checksums, ends and places of the orientation."""
    for depth, color in KINDS:
        yield f"png-{color}-{depth}", png(depth, color, filters=None)
        yield f"png-{color}-{depth}-interlaced", png(depth, color, interlaced=True, filters=None)
    for size in ((1, 1), (1, 5), (5, 1), (3, 2)):
        yield f"png-interlaced-{size[0]}-{size[1]}", png(size=size, interlaced=True)
    yield "png-palette-short", png(8, 3, chunk(b"PLTE", bytes(range(30))))
    yield "png-palette-part", png(8, 3, chunk(b"PLTE", bytes(range(31))))
    yield "png-palette-none", png(8, 3, no_palette=True)
    yield "png-palette-clear", png(8, 3, chunk(b"PLTE", bytes(range(200)) * 3) + chunk(b"tRNS", bytes(range(150))))
    yield "png-palette-one-clear", png(4, 3, chunk(b"PLTE", bytes(range(48))) + chunk(b"tRNS", b"\xff\xff\0\xff"))
    yield "png-gray-clear", png(8, 0, chunk(b"tRNS", struct.pack(">H", 7)))
    yield "png-clear", png(8, 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    yield "png-gamma", png(before=chunk(b"gAMA", struct.pack(">I", 20000)) + chunk(b"sRGB", b"\0"))
    yield "png-many-chunks", png(chunks=40)
    yield "png-empty-chunk", png(before=chunk(b"IDAT", b""))
    yield "png-bad-filter", png(data=lambda rows: zlib.compress(b"\x07" + rows[1:]))
    yield "png-fewer-rows", png(data=lambda rows: zlib.compress(rows[: len(rows) // 2]))
    yield "png-fewer-rows-palette", png(8, 3, data=lambda rows: zlib.compress(rows[: len(rows) // 2]))
    yield "png-more-rows", png(data=lambda rows: zlib.compress(rows + rows))
    yield "png-no-zlib", png(data=lambda rows: b"hello, world")
    yield "png-stored", png(data=lambda rows: zlib.compress(rows, 0))
    yield "png-unknown-chunk", png(before=chunk(b"abCd", b"x"), after=chunk(b"ABCD", b"x"))
    whole = png()
    for part in (1, 2, 3):
        yield f"cut-png-{part}", whole[: len(whole) * part // 4]
    for missing, name in ((12, "end"), (14, "checksum"), (4, "last-checksum"), (30, "pixels")):
        yield f"cut-png-{name}", whole[:-missing]
    yield "png-bad-checksum", whole[:-13] + b"x" + whole[-12:]
    yield "png-bad-header-checksum", whole[:29] + b"xxxx" + whole[33:]
    bad = chunk(b"tEXt", b"a\0b")[:-1] + b"x"
    yield "png-bad-text-checksum", png(before=bad)
    yield "png-bad-late-checksum", png(after=bad)
    yield "png-cut-late-text", png(after=chunk(b"tEXt", b"a\0" + b"b" * 90)[:-50], end=b"")
    yield (
        "png-depth-3",
        whole[:24]
        + b"\x03"
        + whole[25:29]
        + struct.pack(">I", zlib.crc32(whole[12:24] + b"\x03" + whole[25:29]))
        + whole[33:],
    )
    for value in (3, 6, 8):
        yield f"png-exif-{value}", png(before=chunk(b"eXIf", short(value, ">")))
    yield "png-exif-prefixed", png(before=chunk(b"eXIf", EXIF + short(6)))
    yield "png-exif-late", png(after=chunk(b"eXIf", short(6)))
    yield "png-exif-16", png(16, 0, chunk(b"eXIf", short(6)))
    yield "png-exif-interlaced", png(8, 2, chunk(b"eXIf", short(7)), interlaced=True)
    yield "png-exif-broken", png(before=chunk(b"eXIf", b"hello, world"))
    yield "png-exif-two", png(before=chunk(b"eXIf", short(6)) + chunk(b"eXIf", short(3)))
    key = b"Raw profile type exif\0"
    yield "png-profile", png(before=chunk(b"tEXt", key + profile(EXIF + short(6))))
    yield "png-profile-packed", png(before=chunk(b"zTXt", key + b"\0" + zlib.compress(profile(EXIF + short(6)))))
    yield "png-profile-bare", png(before=chunk(b"tEXt", key + profile(short(8, ">"))))
    yield "png-profile-late", png(after=chunk(b"tEXt", key + profile(short(8))))
    yield "png-profile-no-digits", png(before=chunk(b"tEXt", key + b"\nexif\n 4\nhello\n"))
    yield "png-profile-and-exif", png(before=chunk(b"tEXt", key + profile(short(8))) + chunk(b"eXIf", short(3)))
    yield "png-profile-not-packed", png(before=chunk(b"zTXt", key + b"\0hello"))
    yield "png-exif-text", png(before=chunk(b"tEXt", b"exif\0" + short(6)))
    packet = b'<x tiff:Orientation="6"/>'
    key = b"XML:com.adobe.xmp\0"
    yield "png-xmp", png(before=chunk(b"iTXt", key + b"\0\0\0\0" + packet))
    yield "png-xmp-packed", png(before=chunk(b"iTXt", key + b"\1\0\0\0" + zlib.compress(packet)))
    yield "png-xmp-text", png(before=chunk(b"tEXt", key + packet))
    yield "png-xmp-latin", png(before=chunk(b"iTXt", key + b"\0\0\0\0" + packet + b"\xff"))
    yield "png-xmp-and-exif", png(before=chunk(b"iTXt", key + b"\0\0\0\0" + packet) + chunk(b"eXIf", short(3)))
    yield "png-xmp-and-exif-broken", png(before=chunk(b"iTXt", key + b"\0\0\0\0" + packet) + chunk(b"eXIf", b"hello"))


def write_all(folder: Path) -> list[Path]:
    """Writes every image; the names say what each is."""
    found = [(f"{name}.jpg", data) for make in (exif_jpegs, jpegs) for name, data in make()]
    found += [(f"{name}.png", data) for name, data in pngs()]
    found += [("empty.png", b""), ("text.png", b"hello"), ("gif.png", b"GIF89a" + bytes(40)), ("magic.png", PNG_MAGIC)]
    paths = []
    for name, data in found:
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths


if __name__ == "__main__":
    print(len(write_all(Path(sys.argv[1]))), "images")
