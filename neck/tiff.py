"""What a TIFF holds that Pillow does not read: satellite and laboratory files have many bands and deep pixels."""

from __future__ import annotations

from typing import BinaryIO

from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2

WIDTH, BITS, COMPRESSION, SAMPLES, FORMAT = 256, 258, 259, 277, 339
KINDS = {1: "unsigned integers", 2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}


def describe_tiff(stream: BinaryIO) -> str | None:
    """Bands and type of the first image, such as `5 bands of 16-bit unsigned integers`; None where it is no TIFF."""
    stream.seek(0)
    header = stream.read(16)
    if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        tags = ImageFileDirectory_v2(header if header[2:4] in (b"+\0", b"\0+") else header[:8])
        stream.seek(tags.next)
        tags.load(stream)
        bands, bits = int(tags.get(SAMPLES, 1)), sorted(set(tags.get(BITS, (1,))))
        kinds = {KINDS.get(kind, "values of unknown type") for kind in tags.get(FORMAT, (1,))}
        packed = tags.get(COMPRESSION, 1)
        if WIDTH not in tags:
            return None
    except Exception:  # a damaged TIFF: Pillow raises SyntaxError, struct.error, TypeError ...
        return None
    how = "" if packed in COMPRESSION_INFO else f", compressed with method {packed}, which Pillow cannot decode"
    return f"{bands} band{'s' * (bands != 1)} of {' and '.join(map(str, bits))}-bit {' and '.join(sorted(kinds))}{how}"
