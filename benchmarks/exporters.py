"""Exports the encoder with three exporters, builds each file with the same TensorRT-RTX, and compares the plans.

    python -m benchmarks.exporters [--image-size 1008] [--json FILE]

All three export in FP16, with batch 1, one neck, features and positions, and random weights. Every export is a process
of its own; its CPU seconds and its peak memory are the operating system's figures for that process, imports included.
No file is verified and nothing is run: TensorRT-RTX builds without a GPU, and the kernels, the bytes that they move and
the type in which attention accumulates are read from the plan. How fast a plan is, only a GPU can show.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.export import measure
from benchmarks.measure.environment import processor
from benchmarks.plain_export import OneNeck
from engines.builder.build import build_plan
from engines.builder.flavor import Flavor, choose_flavor
from engines.builder.options import BuildOptions
from export.contract.manifest import to_json
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig

EXPORTERS = {
    "neck-export": "`neck-export onnx`",
    "torch": "`torch.onnx.export`",
    "transformers": "`transformers.exporters.OnnxExporter`",
}
"""Name on the command line -> name in the table."""

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "tensorrt-rtx-cu13")


def main() -> None:
    """Prints the table, or with --export writes the file of one exporter, which is how its process is started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--image-size", type=int, default=1008, help="Side of the square input image in pixels. [default: 1008]"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="Export an encoder with the architecture in this JSON file: encoder.json, or the manifest that "
        "`neck-export onnx` wrote beside an ONNX file. [default: the architecture of SAM 3]",
    )
    parser.add_argument(
        "--compute-capability",
        default="8.9",
        help="Build the plans for GPUs with this compute capability. [default: 8.9, that of an L4]",
    )
    parser.add_argument("--json", type=Path, help="Also write the measured values to this JSON file.")
    parser.add_argument("--export", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = EncoderConfig.from_file(given.config) if given.config else EncoderConfig()
    if given.export:
        write_file(given.export[0], Path(given.export[1]), config)
        return
    config = dataclasses.replace(config, image_size=(given.image_size, given.image_size))
    with tempfile.TemporaryDirectory() as folder:
        result = compare(config, given.compute_capability, Path(folder))
    print("\n".join(table(result)))
    if given.json:
        given.json.write_text(to_json(result), encoding="utf-8")


def compare(config: EncoderConfig, compute_capability: str, folder: Path) -> dict[str, Any]:
    """Exports and builds with every exporter.

    Args:
        config: the architecture, with the size of the input.
        compute_capability: the GPU that the plans are built for, such as 8.9.
        folder: temporary files go there; the full size needs 3 GB.
    """
    flavor = choose_flavor("rtx")
    described = folder / "encoder.json"
    described.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
    rows = {}
    for name in EXPORTERS:
        onnx = folder / "out" / "encoder.onnx"
        run = measure(command(name, described, onnx), folder)
        rows[name] = dataclasses.asdict(run) | plan_facts(onnx, compute_capability, flavor)
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.exporters",
        "machine": {"processor": processor()},
        "image_size": list(config.image_size),
        "depth": config.depth,
        "compute_capability": compute_capability,
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "rows": rows,
    }


def command(name: str, config: Path, output: Path) -> list[str]:
    """The process that exports with one exporter."""
    if name == "neck-export":
        options = ["--checkpoint", "random", "--config", str(config), "--precision", "fp16", "--no-verify"]
        return [sys.executable, "-m", "neck_export", "onnx", *options, "--output", str(output)]
    return [sys.executable, "-m", "benchmarks.exporters", "--config", str(config), "--export", name, str(output)]


def write_file(name: str, output: Path, config: EncoderConfig) -> None:
    """Exports in FP16 as the exporter's own documentation shows it."""
    image = torch.zeros(1, 3, *config.image_size, dtype=torch.float16)
    if name == "torch":
        module = OneNeck(random_encoder(config)).eval().half()
        with torch.no_grad():
            program = torch.onnx.export(module, (image,), dynamo=True, verbose=False)
        assert program is not None
        program.save(output, external_data=True)
        return
    from transformers import Sam3VisionModel
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = Sam3VisionModel(vision_config(config)).eval().half()
    exported = OnnxExporter().export(model, {"pixel_values": image}, config=OnnxConfig())
    OnnxExporter.save_program(exported.program, output)


def vision_config(config: EncoderConfig) -> Any:
    """The same architecture as a config of transformers."""
    from transformers import Sam3VisionConfig, Sam3ViTConfig

    backbone = Sam3ViTConfig(
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        layer_norm_eps=config.layer_norm_eps,
        window_size=config.window_size,
        global_attn_indexes=list(config.global_blocks),
        pretrain_image_size=config.pretrain_image_size,
    )
    sizes = [[int(config.grid[0] * scale), int(config.grid[1] * scale)] for scale in config.scale_factors]
    return Sam3VisionConfig(
        backbone_config=backbone,
        fpn_hidden_size=config.d_model,
        backbone_feature_sizes=sizes[:3],
        scale_factors=list(config.scale_factors),
    )


def plan_facts(onnx: Path, compute_capability: str, flavor: Flavor) -> dict[str, Any]:
    """Builds a plan of an unchanged file, and reads kernels and attentions from its layer list."""
    options = BuildOptions("fp16", compute_capabilities=(compute_capability,))
    layers = build_plan(onnx, onnx.with_suffix(".plan"), options, flavor=flavor).layers
    assert layers is not None
    return {
        "kernels": len(layers.kernels),
        "bytes_moved": layers.bytes_moved,
        "fused": len(layers.fused),
        "accumulation": layers.accumulation,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The comparison as Markdown."""
    height, width = result["image_size"]
    packages = result["packages"]
    lines = [
        f"Encoder with {result['depth']} blocks at {height} x {width}, FP16, batch 1, random weights; plans built by "
        f"TensorRT-RTX {packages['tensorrt-rtx-cu13']} for compute capability {result['compute_capability']}; "
        f"torch {packages['torch']}, transformers {packages['transformers']}; {result['machine']['processor']}, "
        f"{result['date']}, `{result['command']}`:",
        "",
        "| exporter | kernels in the plan | GPU memory read and written per image (GB) | fused attention layers | "
        "accumulation type of fused attention | CPU time of the export (s) |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, row in result["rows"].items():
        told = row["accumulation"] or ["not reported"]
        types = " and ".join(dict.fromkeys(one.upper() for one in told)) if row["accumulation"] else told[0]
        lines.append(
            f"| {EXPORTERS[name]} | {row['kernels']} | {row['bytes_moved'] / 1e9:.3g} | {row['fused']} of "
            f"{result['depth']} | {types} | {row['cpu_s']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
