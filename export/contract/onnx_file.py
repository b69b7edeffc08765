"""An ONNX file that is read with its weights, also where files are links: the cache of a hub, DVC, git-annex, Bazel."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.contract.errors import ExportError


def check_path(path: Path) -> None:
    """Refuses a path that ONNX Runtime and TensorRT cannot open.

    Raises:
        ExportError: its bytes are not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ExportError(
            f"{path.absolute()}: ONNX Runtime and TensorRT open no path that is not UTF-8; rename it"
        ) from None


def load_onnx(path: Path, values: bool = False) -> tuple[ir.Model, Path]:
    """Reads an ONNX file whose weights will be read, too.

    Links are followed as ONNX Runtime 1.32 follows them when it is given a path: weights that are a link must lie
    beside the file that the path itself leads to. onnx-ir, and ONNX Runtime when it is given bytes, follow none.

    Args:
        path: the file.
        values: whether the weights will be read here, and not by a runtime alone; onnx-ir 1.1 reads no hard links.

    Returns:
        The model, and the folder from which its weights are located.

    Raises:
        ExportError: the weights are a link that leads elsewhere, which ONNX Runtime refuses, or have hard links.
    """
    model = ir.load(path)
    external = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    if values:
        for file in {Path(tensor.path) for _, tensor in external}:
            if file.is_file() and file.stat().st_nlink > 1:
                raise ExportError(
                    f"{file}: has {file.stat().st_nlink} hard links, which onnx-ir refuses to read; "
                    f"make a copy and put it in its place"
                )
    if not any(Path(tensor.path).is_symlink() for _, tensor in external):
        return model, path.parent
    real = path.resolve()
    for value, tensor in external:
        target = Path(tensor.path).resolve()
        if not target.is_relative_to(real.parent):
            raise ExportError(
                f"{tensor.path}: is a link to {target}, which does not lie beside {real}, so ONNX Runtime refuses it; "
                f"copy the weights to {path.parent}, or make {path} a link to the file beside them"
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
