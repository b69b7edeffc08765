"""An ONNX file: found whole, parsed once, and read also where files are links (the cache of a hub, DVC, Bazel)."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir as ir

from export.contract.errors import ExportError
from export.contract.export_command import export_again
from export.contract.manifest import lfs_pointer


def check_path(path: Path) -> None:
    """Refuses a path that ONNX Runtime and TensorRT cannot open.

    Raises:
        ExportError: its bytes are not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ExportError(
            f"{path.absolute()}: ONNX Runtime and TensorRT can only open paths that are valid UTF-8; rename "
            "the file or folder"
        ) from None


class OnnxFile:
    """An ONNX file that is parsed at most once, when its model is needed.

    Args:
        path: the file; its weights may lie in other files beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, file: Path | OnnxFile) -> OnnxFile:
        """The file at a path, or the file itself."""
        return file if isinstance(file, cls) else cls(Path(file))  # type: ignore[arg-type]

    @functools.cached_property
    def model(self) -> ir.Model:
        """The graph, to be read and not to be changed (see `load`); its weights stay in the files beside it.

        Raises:
            ExportError: no such file, not ONNX, or its weights are missing, cut off or outside its folder.
        """
        path = self.path
        if not path.is_file():
            raise ExportError(
                f"{path}: there is no file with this name; check the path, or write the file with `neck-export onnx`"
            )
        if pointer := lfs_pointer(path):
            raise ExportError(pointer)
        again = f"export the ONNX file again with {export_again(path)}"
        try:
            model = ir.load(path)
        except Exception as error:  # protobuf and onnx-ir raise many kinds
            raise ExportError(
                f"{path}: the ONNX file is incomplete or damaged ({type(error).__name__}); {again}"
            ) from None
        if not len(model.graph) or not model.graph.outputs:
            raise ExportError(f"{path}: the ONNX file is incomplete or damaged (its graph has no outputs); {again}")
        ends: dict[Path, int] = {}
        for tensor in _external(model).values():
            if Path(tensor.location).is_absolute() or ".." in Path(tensor.location).parts:
                raise ExportError(
                    f"{path}: the ONNX file refers to weights at {str(tensor.location)!r}, which is outside "
                    f"the folder of the ONNX file; {again}"
                )
            file = Path(tensor.path)
            ends[file] = max(ends.get(file, 0), (tensor.offset or 0) + (tensor.length or 0))
        for file, end in ends.items():
            if not file.is_file():
                raise ExportError(
                    f"{path}: the ONNX file needs the weights file {file}, which is missing; copy the missing file to "
                    f"{file.parent}, or {again}"
                )
            if file.stat().st_size < end:
                cut = (
                    f"{file}: the weights file has {file.stat().st_size:,} bytes, but the ONNX file needs {end:,} "
                    f"bytes; copy the weights file again, or {again}"
                )
                raise ExportError(lfs_pointer(file) or cut)
        return model

    def check(self) -> OnnxFile:
        """Finds the file whole; raises what `model` raises."""
        _ = self.model
        return self

    def load(self, values: bool = False) -> tuple[ir.Model, Path]:
        """A copy of the model that may be changed, and the folder of its external weights.

        Links are followed as ONNX Runtime 1.32 follows them when it is given a path: weights that are a link must lie
        beside the file that the path itself leads to. onnx-ir, and ONNX Runtime when it is given bytes, follow none.

        Args:
            values: whether the weights will be read here, and not by a runtime alone; onnx-ir 1.1 reads no hard links.

        Raises:
            ExportError: the weights are a link that leads elsewhere, which ONNX Runtime refuses, or have hard links.
        """
        model, path = self.model.clone(), self.path
        external = _external(model)
        if values:
            for file in {Path(tensor.path) for tensor in external.values()}:
                if file.stat().st_nlink > 1:
                    raise ExportError(
                        f"{file}: the weights file has {file.stat().st_nlink} hard links, and onnx-ir refuses to read "
                        f"files with more than one hard link; replace {file.name} with a copy"
                    )
        if not any(Path(tensor.path).is_symlink() for tensor in external.values()):
            return model, path.parent
        real = path.resolve()
        for value, tensor in external.items():
            target = Path(tensor.path).resolve()
            if not target.is_relative_to(real.parent):
                raise ExportError(
                    f"{tensor.path}: this symbolic link points to the weights file {target}, but ONNX Runtime only "
                    f"reads weights from the folder of the ONNX file, which is {real.parent}. Replace the symbolic "
                    "link with a copy of the weights file"
                )
            value.const_value = ir.ExternalTensor(
                target.relative_to(real.parent),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=real.parent,
            )
        return model, real.parent


def _external(model: ir.Model) -> dict[ir.Value, ir.ExternalTensor]:
    """The weights that lie in files of their own."""
    values = {value: value.const_value for value in model.graph.initializers.values()}
    return {value: tensor for value, tensor in values.items() if isinstance(tensor, ir.ExternalTensor)}
