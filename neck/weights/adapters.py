"""LoRA adapters: read from a PEFT folder, or out of a checkpoint that holds them unmerged."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neck.weightfile import CheckpointError, read_state

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
"""PEFT's name of a factor: with the adapter's name inside a model, without it in a folder."""

WRAPPED = re.compile(r"\.(?:base_layer|original_module)\.")
"""What PEFT puts into the names of the weights that it leaves as they were."""

USED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
"""Entries of adapter_config.json that the merge follows."""

SOUND_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Starts of training that leave the base weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others change them."""

# fmt: off
IRRELEVANT = frozenset(
    # fan_in_fan_out is for GPT-2's Conv1D alone: PEFT itself turns it off on the linear layers of this encoder.
    # bias and modules_to_save show as tensors, which are all looked at
    (
        "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config", "loftq_config",
        "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
        "target_modules", "task_type", "trainable_token_indices",
    )
)
# fmt: on
"""Entries that change training or loading, not the merged weights of this encoder (PEFT 0.21)."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How strongly each module's change is added: alpha / rank, or alpha / sqrt(rank)."""

    alpha: float
    rank: int | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    root: bool = False

    def of(self, module: str, rank: int) -> float:
        """The factor of a module whose tensors have this rank; raises ValueError where the config says another."""
        said = _by_pattern(self.rank_pattern, module, self.rank)
        if said is not None and said != rank:
            raise ValueError(f"the adapter's tensors have rank {rank}, but its configuration says rank {said}")
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, is the name or the end of it after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(?:.*\.)?(?:{key})$", module)), default)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The factors of an adapter.

    Args:
        where: the folder or file, for messages.
        factors: module as the adapter names it -> (A, B).
        others: its tensors that are no factors.
        scaling: None where nothing tells it.
    """

    where: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    others: tuple[str, ...]
    scaling: Scaling | None


def adapter_files(folder: Path) -> list[Path]:
    """The two files of a PEFT folder.

    Raises:
        CheckpointError: one is not there.
    """
    config = folder / CONFIG_NAME
    weights = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if not config.is_file() or weights is None:
        lacks = CONFIG_NAME if not config.is_file() else " or ".join(WEIGHTS_NAMES)
        raise CheckpointError(
            f"{folder}: the folder contains no {lacks}, so it is not a PEFT adapter; pass the folder that PEFT saved"
        )
    return [config, weights]


def read_adapter(folder: Path) -> Adapter:
    """Reads a folder that PEFT's save_pretrained wrote.

    Raises:
        CheckpointError: it is none, or of a kind other than LoRA.
    """
    config, weights = adapter_files(folder)
    scaling = _read_scaling(config)
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in read_state(weights).tensors.items()}
    factors, others = _pair(folder, tensors)
    return Adapter(folder, factors, others, scaling)


def check_base(path: Path) -> None:
    """Refuses a PEFT folder in the place of a checkpoint.

    Raises:
        CheckpointError: saying where it belongs.
    """
    if path.is_dir() and (path / CONFIG_NAME).is_file() and any((path / name).is_file() for name in WEIGHTS_NAMES):
        raise CheckpointError(
            f"{path}: this is a PEFT adapter and not a checkpoint; pass the base model with --checkpoint and "
            "this folder with --adapter"
        )


def find_adapter(
    path: Path, tensors: dict[str, Tensor], folder: Path | None, alpha: float | None
) -> tuple[dict[str, Tensor], Adapter | None]:
    """A checkpoint's plain tensors, and the adapter that is to be merged: a folder's or its own.

    Args:
        path: the checkpoint.
        tensors: all of its tensors.
        folder: the adapter that PEFT saved, if any.
        alpha: lora_alpha of an adapter inside the checkpoint.

    Raises:
        CheckpointError: one of the files cannot be read, or what is asked does not go together.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise CheckpointError(f"{path}: --adapter-alpha is {alpha}; it must be a number above 0")
    tensors, inside = split_adapter(path, tensors, alpha)
    if alpha is not None and (inside is None or not inside.factors):
        raise CheckpointError(f"{path}: the checkpoint contains no unmerged adapter; leave out --adapter-alpha")
    if folder is None:
        return tensors, inside
    if inside is not None and inside.factors:
        raise CheckpointError(
            f"{path}: the checkpoint already contains an unmerged adapter, so --adapter cannot add another; "
            "merge that adapter first, or leave out --adapter"
        )
    return tensors, read_adapter(folder)


def split_adapter(
    path: Path, tensors: dict[str, Tensor], alpha: float | None
) -> tuple[dict[str, Tensor], Adapter | None]:
    """Takes the unmerged adapter out of a checkpoint, whose base weights get their plain names back.

    Args:
        path: the checkpoint; an adapter_config.json beside it tells the scaling.
        tensors: all of its tensors.
        alpha: lora_alpha of every module, where it is not told there.

    Returns:
        The other tensors, and the adapter: None where there is none, without factors where they were taken out.
    """
    if not any(WRAPPED.search(key) or FACTOR.match(key) for key in tensors):
        return tensors, None
    inner = {key: tensor for key, tensor in tensors.items() if FACTOR.match(key)}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key not in inner:
            name = WRAPPED.sub(".", key)
            if name in plain or (name != key and name in tensors):
                raise CheckpointError(
                    f"{path}: {key} and {name} are two names of the same tensor; save the checkpoint with only "
                    "one of them"
                )
            plain[name] = tensor
    factors, others = _pair(path, {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in inner.items()})
    beside = path.parent / CONFIG_NAME if path.is_file() else path / CONFIG_NAME
    scaling = Scaling(alpha) if alpha is not None else None
    if inner and beside.is_file():
        if scaling:
            raise CheckpointError(
                f"{beside}: this file already contains the adapter's lora_alpha; leave out --adapter-alpha, "
                "or remove the file"
            )
        scaling = _read_scaling(beside)
    return plain, Adapter(path, factors, others, scaling)


def _pair(where: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    found: dict[str, dict[str, Tensor]] = {}
    names, others = set(), []
    for key, tensor in tensors.items():
        match = FACTOR.match(key)
        if match is None:
            others.append(key)
            continue
        names.add(match["adapter"] or "default")
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if len(names) > 1:
        raise CheckpointError(
            f"{where}: the file contains several adapters ({', '.join(sorted(names))}); save the file again with only "
            "the adapter that is to be merged"
        )
    for module, factors in found.items():
        if len(factors) < 2:
            lacks = "B" if "A" in factors else "A"
            raise CheckpointError(
                f"{where}: the tensor lora_{lacks}.weight of the adapted module {module} is missing; save the "
                "adapter again"
            )
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}, tuple(others)


def _read_scaling(file: Path) -> Scaling:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the file cannot be read as JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{file}: peft_type is {kind!r}, but neck-export can only merge LORA; merge the adapter with "
            "PEFT's merge_and_unload and export the result"
        )
    other = [f"{key} {config[key]!r:.40}" for key in config if key not in (*USED, *IRRELEVANT) and config[key]]
    if config.get("init_lora_weights") not in SOUND_INITS:
        other.append(f"init_lora_weights {config['init_lora_weights']!r}")
    if other:
        what = "DoRA, " if config.get("use_dora") else ""
        raise CheckpointError(
            f"{file}: neck-export can merge only plain LoRA, but the adapter also uses {what}{', '.join(other[:8])}; "
            "merge the adapter with PEFT's merge_and_unload and export the result"
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    numbers: list[tuple[str, Any]] = [("r", rank), ("lora_alpha", alpha)]
    for name, pattern in patterns.items():
        numbers += pattern.items() if isinstance(pattern, dict) else [(name, pattern)]
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{file}: {name} is {value!r}, but it must be a number above 0; correct the value in this file"
            )
    ranks, alphas = patterns.values()
    for key in (*ranks, *alphas):
        try:
            re.compile(key)
        except re.error as error:
            name = "rank_pattern" if key in ranks else "alpha_pattern"
            raise CheckpointError(
                f"{file}: {name} contains the key {key!r}, which is not a valid regular expression ({error}); correct "
                "the key in this file"
            ) from None
    return Scaling(float(alpha), rank, ranks, alphas, bool(config.get("use_rslora")))
