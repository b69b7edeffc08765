"""Files of torch.save, of any era: the pickle inside as data, and its tensors as views of the mapped file."""

from __future__ import annotations

import dataclasses
import io
import lzma
import math
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from neck.weights.pickles import read_pickle
from neck.weights.records import DamagedPickleError, PickleError, StorageRecord, TensorRecord

MOST_PICKLE_BYTES = 32 << 20
"""Of the pickle, tensors not counted: the encoder's has 0.06 MB. A string may take four times its size in memory."""

MOST_UNPACKED = 20
"""Times its own size that a compressed file may unpack to; random float32 shrinks by 7 %, zeros a thousandfold."""

MOST_EXPANDED = 1 << 24
"""Elements that a tensor may have beyond what is stored (stride 0)."""

MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle in a file of torch.save from before PyTorch 1.6."""


ADVICE = (
    "if you trust the file, load it in Python and save only the weights: torch.save(model.state_dict(), 'weights.pt')"
)

UNREADABLE = (
    *(zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError),
    *(KeyError, TypeError, struct.error, zlib.error, lzma.LZMAError),
)
"""What the standard library raises for damaged, encrypted, unknown archives, and torch for tensors that cannot be."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not contain the requested encoder."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of one storage in a file."""

    start: int
    size: int


class TorchFile:
    """A file written by torch.save: the pickle is read at once, tensors on demand.

    Attributes:
        root: what the pickle holds, see read_pickle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_order = "little"
        self.spans: dict[str, Span] = {}
        self._archive: zipfile.ZipFile | None = None
        self._names: dict[str, str] = {}
        self._storages: dict[tuple[str, torch.dtype], torch.UntypedStorage] = {}
        self._mapped: torch.UntypedStorage | None = None
        try:
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
                file.seek(0)
                self.root = self._open_zip(file) if is_zip else self._open_old(file)
        except DamagedPickleError as error:
            raise self._damaged(error) from None
        except PickleError as error:
            raise CheckpointError(f"{path}: the file was refused, because {error}; {ADVICE}") from None
        except CheckpointError:
            raise
        except UNREADABLE as error:
            raise self._damaged(error) from None

    def tensor(self, record: TensorRecord) -> Tensor:
        """The tensor of a record: a view of the mapped file, copied only if the file stores it differently.

        Raises:
            CheckpointError: the file does not hold what the record claims.
        """
        try:
            return self._tensor(record)
        except CheckpointError:
            raise
        except UNREADABLE as error:
            raise self._damaged(error) from None

    def _tensor(self, record: TensorRecord) -> Tensor:
        view, item, elements = record.storage, record.dtype.itemsize, math.prod(record.size)
        if not elements:
            return torch.empty(record.size, dtype=record.dtype)
        storage = self._storage(view, record.dtype)
        first = view.first * view.dtype.itemsize // item + record.offset
        last = first + sum((side - 1) * step for side, step in zip(record.size, record.stride, strict=True))
        if (last + 1) * item > storage.nbytes():
            raise self._damaged(f"a tensor of {elements:,} elements exceeds its storage of {storage.nbytes():,} bytes")
        if elements > max(MOST_EXPANDED, storage.nbytes() // item):
            raise CheckpointError(
                f"{self.path}: the file was refused, because it contains a tensor that was made with expand(). The "
                f"tensor has {elements:,} elements, but the file stores only a part of the elements. Load the file in "
                "Python, call contiguous() on every tensor, and save the weights again with torch.save"
            )
        tensor = torch.empty(0, dtype=record.dtype).set_(storage, first, record.size, record.stride)
        tensor = tensor.conj() if "conj" in record.bits else tensor
        return -tensor if "neg" in record.bits else tensor

    def _storage(self, record: StorageRecord, dtype: torch.dtype) -> torch.UntypedStorage:
        """A whole storage; one that two types look at is held once, unless its bytes have to be swapped."""
        key = (record.key, record.dtype if self.bytes_order == sys.byteorder else dtype)
        if key not in self._storages:
            self._storages[key] = self._read_storage(record, dtype)
        return self._storages[key]

    def _read_storage(self, record: StorageRecord, dtype: torch.dtype) -> torch.UntypedStorage:
        size = (record.first + record.count) * record.dtype.itemsize
        if record.key in self._names and self._archive:
            if self._archive.getinfo(self._names[record.key]).file_size < size:
                raise self._damaged(f"the tensor storage {record.key} is too short")
            data = bytearray(self._archive.read(self._names[record.key]))
            storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
        elif record.key in self.spans:
            span = self.spans[record.key]
            if span.size < size:
                raise self._damaged(f"the tensor storage {record.key} is too short")
            storage = self._map()[span.start : span.start + span.size]
            if span.start % dtype.itemsize:  # torch.save aligns to 64 bytes, archivers that repack do not
                storage = storage.clone()
        else:
            raise self._damaged(f"the tensor storage {record.key} is missing")
        if self.bytes_order != sys.byteorder and dtype.itemsize > 1:
            storage = storage.clone()
            storage.byteswap(dtype)
        return storage

    def _map(self) -> torch.UntypedStorage:
        if self._mapped is None:
            size = self.path.stat().st_size
            self._mapped = cast("torch.UntypedStorage", torch.UntypedStorage.from_file(str(self.path), False, size))
        return self._mapped

    def _open_zip(self, file: BinaryIO) -> object:
        archive = zipfile.ZipFile(self.path)
        entries = archive.infolist()
        names = {entry.filename: entry for entry in entries}
        roots = [name[: -len("data.pkl")] for name in names if name.rpartition("/")[2] == "data.pkl"]
        if not roots:
            raise CheckpointError(
                f"{self.path}: this zip archive was not written by torch.save (it contains no data.pkl); pass "
                "a .pt or .safetensors file with the weights"
            )
        root = min(roots, key=len)
        if f"{root}constants.pkl" in names:
            raise CheckpointError(
                f"{self.path}: this is a TorchScript archive and not a checkpoint; load the archive with "
                "torch.jit.load, save the state_dict() of the module with torch.save, and pass the new file"
            )
        if names[f"{root}data.pkl"].file_size > MOST_PICKLE_BYTES:
            raise PickleError(
                f"the pickle in the file is larger than {MOST_PICKLE_BYTES >> 20} MB, the limit of neck-export"
            )
        if f"{root}byteorder" in names:
            self.bytes_order = archive.read(f"{root}byteorder")[:8].decode()
        stored = {name: entry for name, entry in names.items() if name.startswith(f"{root}data/")}
        # mapping needs records as they are; torch.save never compresses, archivers that repack do
        if all(entry.compress_type == zipfile.ZIP_STORED for entry in stored.values()):
            self.spans = {name[len(root) + 5 :]: _span(file, entry) for name, entry in stored.items()}
        else:
            if sum(entry.file_size for entry in stored.values()) > MOST_UNPACKED * self.path.stat().st_size:
                raise CheckpointError(
                    f"{self.path}: the file was refused, because its unpacked content is more than "
                    f"{MOST_UNPACKED} times as large as the file; unpack the file yourself and save the weights "
                    "uncompressed"
                )
            self._archive, self._names = archive, {name[len(root) + 5 :]: name for name in stored}
        return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")))

    def _open_old(self, file: BinaryIO) -> object:
        """Magic number, version and system as pickles; then the object, its storages' keys, and their bytes."""
        head = io.BytesIO(file.read(MOST_PICKLE_BYTES))
        if read_pickle(head) != MAGIC:
            raise PickleError("the file is a pickle that torch.save did not write")
        storages: dict[str, StorageRecord] = {}
        _version, _system, root, keys = (read_pickle(head, storages) for _ in range(4))
        if not isinstance(keys, list):
            raise DamagedPickleError("the pickle is damaged (the list of tensor storages is missing)")
        start = head.tell()
        for key in keys:
            file.seek(start)
            (count,) = struct.unpack("<q", file.read(8))
            size = count * storages[key].dtype.itemsize
            if count < 0 or start + 8 + size > self.path.stat().st_size:
                raise self._damaged(f"the tensor storage {key} extends beyond the end of the file")
            self.spans[key] = Span(start + 8, size)
            start += 8 + size
        return root

    def _damaged(self, reason: object) -> CheckpointError:
        size = self.path.stat().st_size
        words = (str(reason) or type(reason).__name__).splitlines()[0]
        return CheckpointError(
            f"{self.path}: the .pt file of {size:,} bytes is truncated or damaged ({words}); copy or download it again"
        )


def _span(file: BinaryIO, entry: zipfile.ZipInfo) -> Span:
    """Where an entry that is not compressed has its bytes: after a local header, whose length only itself tells."""
    file.seek(entry.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(30))
    return Span(entry.header_offset + 30 + name + extra, entry.file_size)
