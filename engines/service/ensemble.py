"""The models around the engine: JPEG or PNG bytes in, and chosen outputs of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.service.model_config import add_tensors, new_config, schema
from engines.service.served_model import Source
from export.contract.signature import TensorSpec

IMAGE_FILE = "image_file"
"""The ensemble's input: the bytes of one JPEG or PNG file per element."""

PREPROCESS_MODEL = Path(__file__).parent / "preprocess" / "model.py"
"""The python-backend model, copied into the repository."""

DECODERS = 2
"""Instances of the preprocessing model: an image is decoded by one core."""

DECODER_MIB = 1100
"""Memory of one at most: 220 MiB with torch, and 855 MiB more for a progressive JPEG of 9400 x 9500 pixels, all colors
at full size, the largest that its limits allow (preprocess/model.py, `decode` and `resize`, Pillow 13, measured)."""


def preprocess_config(source: Source, name: str) -> Any:
    """The config of the model that decodes and resizes images.

    Its instances are on the CPU by name, or Triton would start one per GPU; that is the only instance_group here.
    """
    config = new_config(source, name)
    config.backend = "python"
    _add_image(config, source)
    add_tensors(config.output, [source.image], source.batch)
    config.instance_group.add(kind=schema().ModelInstanceGroup.KIND_CPU, count=DECODERS)
    return config


def images_config(source: Source, name: str, preprocess: str, engine: str, outputs: Sequence[TensorSpec]) -> Any:
    """The config of the ensemble from images to features."""
    config = new_config(source, name)
    config.platform = "ensemble"
    _add_image(config, source)
    add_tensors(config.output, outputs, source.batch)
    first = config.ensemble_scheduling.step.add(model_name=preprocess, model_version=-1)
    first.input_map[IMAGE_FILE] = IMAGE_FILE
    first.output_map[source.image.name] = source.image.name
    _add_engine(config, source, engine, outputs)
    return config


def chosen_config(source: Source, name: str, engine: str, outputs: Sequence[TensorSpec]) -> Any:
    """The config of an ensemble that answers with some of a plan's outputs.

    The tensorrt backend demands a config that lists every output of the plan (`expected configuration for output`,
    InitializeIOBindings, read in its source of July 2026; with auto-complete on, missing ones are filled in). It copies
    only what a request asks for, and an ensemble asks for what it maps.
    """
    config = new_config(source, name)
    config.platform = "ensemble"
    add_tensors(config.input, [source.image], source.batch)
    add_tensors(config.output, outputs, source.batch)
    _add_engine(config, source, engine, outputs)
    return config


def _add_image(config: Any, source: Source) -> None:
    images = 1 if source.batch.dynamic else source.batch.optimum
    config.input.add(name=IMAGE_FILE, data_type=schema().DataType.Value("TYPE_STRING"), dims=[images])


def _add_engine(config: Any, source: Source, engine: str, outputs: Sequence[TensorSpec]) -> None:
    step = config.ensemble_scheduling.step.add(model_name=engine, model_version=-1)
    step.input_map[source.image.name] = source.image.name
    for spec in outputs:
        step.output_map[spec.name] = spec.name
