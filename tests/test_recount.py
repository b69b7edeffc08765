"""Every number of a manifest, counted again from the file itself: thirty exports of all kinds."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exporting import quick_trace
from onnx import numpy_helper
from test_oracle import BASES, FIGURES, Case, draw, is_feature, tolerance_of, wanted

import export.pipeline
from export.contract.errors import ExportError
from export.contract.manifest import FORMAT, manifest_path, read_manifest
from export.contract.options import ExportOptions
from export.pipeline import RejectedError, export_onnx
from export.quantization.choose_ranges import unpack_move
from export.quantization.rates import PUBLISHED
from export.verification.rounding_simulation import is_low_precision, simulate
from export.verification.verify import reference_pixels, run_model
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig
from neck.images import normalize

SEED, EXPORTS, SHARES = 26, 30, 3

CODES = {"fp8": 448.0, "int8": 127.0}

NOT_IN_THE_FILE = {
    r"encoder\.pretrain_image_size": "the embedding is tiled to the grid when the file is written",
    r"encoder\.rope_theta": "a head of 4 channels turns with one frequency, which is 1; checked where it has more",
    r"encoder\.scale_factors\[\d\]": "of levels that are not exported",
    r"signature\.level_sizes\[\d\]\[\d\]": "of levels that are not exported",
    r"quantization\.budget": "an option",
    r"quantization\.image_count": "of the calibration",
    r"quantization\.(products|results|attentions)\..*\.(largest|clipped|error|share)": "of the calibration; checked "
    "to agree",
    r"quantization\.curve\[\d+\]\.(expected_error|error)": "of trials",
    r"quantization\.curve\[\d+\]\.(share|expected_ms)": "of sets that the file does not have",
}
"""Numbers that no file tells; every other must be counted."""


def numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value by its place."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from numbers(value, f"{path}[{index}]")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield path, values


class File:
    """An ONNX file read by the onnx package alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path)
        self.nodes = list(self.model.graph.node)
        self.constants = {one.name: numpy_helper.to_array(one) for one in self.model.graph.initializer}

    def module(self, node: onnx.NodeProto) -> str:
        return {entry.key: entry.value for entry in node.metadata_props}.get("neck.module", "")

    def of(self, kind: str, module: str = "") -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type == kind and self.module(node).startswith(module)]

    def weight(self, node: onnx.NodeProto) -> np.ndarray:
        """The weight of a product, by its name or as codes behind DequantizeLinear."""
        if node.input[1] in self.constants:
            return self.constants[node.input[1]]
        (read,) = [one for one in self.nodes if one.output[0] == node.input[1]]
        return self.constants[read.input[0]]

    def product(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.of("MatMul") if self.module(node) == name)


def shape(value: onnx.ValueInfoProto) -> list[int]:
    """The sides that are numbers; a dynamic batch is a name."""
    return [side.dim_value for side in value.type.tensor_type.shape.dim if not side.dim_param]


def of_architecture(file: File) -> dict[str, float]:
    """The encoder's numbers, told by shapes, constants and attributes."""
    (image,) = file.model.graph.input
    sides = shape(image)[-3:]
    height, width = sides[:2] if sides[2] == 3 else sides[1:]
    (patch,) = [file.constants[node.input[1]] for node in file.of("Conv", "trunk.patch_embed")]
    found: dict[str, float] = {"encoder.image_size[0]": height, "encoder.image_size[1]": width}
    found["encoder.patch_size"], found["encoder.embed_dim"] = patch.shape[-1], patch.shape[0]
    blocks = [re.match(r"trunk\.blocks\.(\d+)", file.module(node)) for node in file.nodes]
    depth = 1 + max(int(match[1]) for match in blocks if match)
    found["encoder.depth"] = depth
    found["encoder.mlp_ratio"] = file.weight(file.product("trunk.blocks.0.mlp.fc1")).shape[1] / patch.shape[0]
    norms = [{one.name: one.f for one in node.attribute}.get("epsilon", 1e-5) for node in file.of("LayerNormalization")]
    assert len(norms) == 1 + 2 * depth and len(set(norms)) == 1
    found["encoder.layer_norm_eps"] = norms[0]
    grid, tokens = (height // patch.shape[-1], width // patch.shape[-1]), {}
    for index in range(depth):
        cuts = [file.constants.get(node.input[1]) for node in file.of("Reshape", f"trunk.blocks.{index}.attn")]
        (cut,) = {tuple(one) for one in cuts if one is not None and len(one) == 5 and one[2] == 3}
        tokens[index] = cut[0] if cut[1] < 0 else cut[1]  # rewritten: (tokens, -1, 3, heads, head_dim)
        found["encoder.num_heads"] = cut[3]
    everywhere = [index for index, count in tokens.items() if count == math.prod(grid)]
    found |= {f"encoder.global_blocks[{place}]": index for place, index in enumerate(everywhere)}
    (window,) = {math.isqrt(count) for index, count in tokens.items() if index not in everywhere}
    found["encoder.window_size"] = window
    return found


def of_contract(file: File, manifest: Mapping[str, Any], found: dict[str, float]) -> dict[str, float]:
    """The signature's numbers, told by the graph's inputs and outputs."""
    height, width = found["encoder.image_size[0]"], found["encoder.image_size[1]"]
    contract: dict[str, float] = {"signature.image_size[0]": height, "signature.image_size[1]": width}
    grid = [int(side / found["encoder.patch_size"]) for side in (height, width)]
    graph = file.model.graph
    for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
        for place, value in enumerate(values):
            dims = value.type.tensor_type.shape.dim
            sides = {axis: side.dim_value for axis, side in enumerate(dims) if not side.dim_param}
            contract |= {f"signature.{kind}[{place}].shape[{axis}]": side for axis, side in sides.items()}
    levels = sorted({int(value.name.rsplit("_", 1)[1]) for value in graph.output})
    contract |= {f"signature.levels[{place}]": level for place, level in enumerate(levels)}
    for value in graph.output:
        level, size = int(value.name.rsplit("_", 1)[1]), shape(value)[-2:]
        contract |= {f"signature.level_sizes[{level}][{axis}]": size[axis] for axis in range(2)}
        scale = manifest["encoder"]["scale_factors"][level]
        assert [int(side * scale) for side in grid] == size
        contract[f"encoder.scale_factors[{level}]"] = scale
    mixed = {len(file.constants[node.input[2]]) for node in file.of("Conv") if "conv_3x3" in file.module(node)}
    heads = [value.name for value in graph.output if "high_res" in value.name]
    contract["signature.d_model"] = contract["encoder.d_model"] = max(mixed) if heads else shape(graph.output[0])[-3]
    return contract


def of_graph(file: File, manifest: Mapping[str, Any]) -> dict[str, float]:
    operators = collections.Counter(node.op_type for node in file.nodes)
    (opset,) = [one.version for one in file.model.opset_import if one.domain == ""]
    found: dict[str, float] = {"format": FORMAT, "opset": opset, "graph.nodes": len(file.nodes)}
    found |= {f"graph.operators.{name}": count for name, count in operators.items()}
    for place, entry in enumerate(manifest["files"]):
        there = file.path.with_name(entry["name"])
        found[f"files[{place}].bytes"] = there.stat().st_size
        assert entry["sha256"] == hashlib.sha256(there.read_bytes()).hexdigest()
    names = sorted(path.name for path in file.path.parent.iterdir() if path.name.startswith(f"{file.path.stem}."))
    assert [entry["name"] for entry in manifest["files"]] == [
        name for name in names if name != f"{file.path.stem}.json"
    ]
    return found


def of_verdict(file: File, manifest: Mapping[str, Any], case: Case) -> dict[str, float]:
    """The figures, from a run of the file against the oracle of test_oracle."""
    found: dict[str, float] = {}
    verification = manifest["verification"]
    for place, entry in enumerate(verification["files"]):
        stat = file.path.with_name(entry["name"]).stat()
        found[f"verification.files[{place}].bytes"] = stat.st_size
        found[f"verification.files[{place}].modified_us"] = stat.st_mtime_ns // 1000
    config = EncoderConfig.from_dict(manifest["encoder"])
    signature = export.pipeline.manifest_signature(file.path, manifest)
    pixels = reference_pixels(signature, None, 2 if signature.batch.dynamic else 1)
    image = pixels if signature.input == "uint8" else normalize(pixels).numpy()
    model = ir.load(file.path)
    if is_low_precision(model):
        simulate(model)
    outputs = dict(zip([one.name for one in signature.outputs], run_model(model, file.path.parent, image), strict=True))
    if (beside := file.path.with_name(f"{file.path.stem}.positions.safetensors")).exists():
        from safetensors.torch import load_file

        stored = {name: tensor.float().numpy() for name, tensor in load_file(beside).items()}
        outputs |= {name: np.broadcast_to(array, (len(image), *array.shape[1:])) for name, array in stored.items()}
    assert {row["name"] for row in verification["outputs"]} == set(outputs)
    for place, row in enumerate(verification["outputs"]):
        exact, given = wanted(case.name)[row["name"]], outputs[row["name"]].astype(np.float64)
        error, at = given - exact, f"verification.outputs[{place}]"
        found[f"{at}.relative_l2"] = float(np.linalg.norm(error) / np.linalg.norm(exact))
        found[f"{at}.cosine"] = float((given * exact).sum() / np.linalg.norm(given) / np.linalg.norm(exact))
        found[f"{at}.max_abs"], found[f"{at}.mean_abs"] = float(np.abs(error).max()), float(np.abs(error).mean())
        found[f"{at}.non_finite"] = int((~np.isfinite(given)).sum())
        relative, cosine, largest = tolerance_of(case, row["name"])
        found |= {f"{at}.tolerance.relative_l2": relative, f"{at}.tolerance.cosine": cosine}
        found |= {} if largest is None else {f"{at}.tolerance.max_abs": largest}
    assert config.grid == signature.level_sizes[config.scale_factors.index(1.0)]
    return found


def of_products(file: File, manifest: Mapping[str, Any]) -> dict[str, float]:
    """The quantized products: their number, scales and moves in the graph, and the operations of each set."""
    facts = manifest.get("quantization")
    if not facts:
        return {}
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    every = [f"trunk.blocks.{index}.{leaf}" for index in range(manifest["encoder"]["depth"]) for leaf in leaves]
    found: dict[str, float] = {"quantization.of": len([name for name in every if file.product(name)])}
    found["quantization.of_attentions"] = manifest["encoder"]["depth"]
    makers = {output: node for node in file.nodes for output in node.output}
    quantized = []
    for name in every:
        reads = [makers.get(value) for value in file.product(name).input]
        if all(one is not None and one.op_type == "DequantizeLinear" for one in reads):
            quantized.append(name)
            scale = float(file.constants[reads[0].input[1]])  # type: ignore[union-attr]
            one = facts["products"][name]
            found[f"quantization.products.{name}.scale"] = scale
            end = scale * CODES[facts["kind"]]
            assert (one["clipped"] == 0) == (end >= one["largest"] * (1 - 1e-6)) or one["method"] != "largest"
            assert 0 <= one["clipped"] < 1 and (one["move"] is None) == (one["share"] == 0)
            if one["move"] is not None:
                check_move(file, manifest, name, unpack_move(one["move"]).numpy())
    for node in file.nodes:
        if made := re.fullmatch(r"(.*)/quantize_(query|key|value)", node.name):
            found[f"quantization.attentions.{made[1]}.attention.{made[2]}.scale"] = float(file.constants[node.input[1]])
    of_results = [node for node in file.nodes if node.name.endswith("/quantize_result")]
    for node in of_results:
        name = node.name.removesuffix("/quantize_result")
        found[f"quantization.results.{name}.scale"] = float(file.constants[node.input[1]])
    assert sorted(facts.get("results") or ()) == sorted(one.name.removesuffix("/quantize_result") for one in of_results)
    assert list(facts["products"]) == quantized or sorted(facts["products"]) == sorted(quantized)
    operations = {name: float(np.prod(file.weight(file.product(name)).shape)) for name in every}
    counts = [row["products"] for row in facts["curve"]]
    assert not counts or (counts[0] == 0 and len(quantized) in counts)
    for place, row in enumerate(facts["curve"]):
        if row["products"] in (0, counts[-1], len(quantized)):
            chosen = sum(operations[name] for name in quantized) if row["products"] else 0.0
            tokens = math.prod(manifest["signature"]["level_sizes"][manifest["encoder"]["scale_factors"].index(1.0)])
            if counts[-1] == len(quantized):  # all of those that may be: their operations are the whole
                whole = sum(operations[name] for name in quantized)
                rates = [PUBLISHED[facts["kind"]], PUBLISHED["fp16"]]
                found[f"quantization.curve[{place}].share"] = chosen / whole
                seconds = 2 * tokens * (chosen / rates[0] + (whole - chosen) / rates[1])
                found[f"quantization.curve[{place}].expected_ms"] = 1e3 * seconds
        found[f"quantization.curve[{place}].products"] = row["products"]
    return found


def check_move(file: File, manifest: Mapping[str, Any], name: str, move: np.ndarray) -> None:
    """Whether the LayerNorm before a product is divided by the factors that the manifest has."""
    norm = {"qkv": "norm1", "fc1": "norm2"}[name.rsplit(".", 1)[1]]
    block = ".".join(name.split(".")[:3])
    (node,) = [one for one in file.of("LayerNormalization") if file.module(one) == f"{block}.{norm}"]
    encoder = random_encoder(EncoderConfig.from_dict(manifest["encoder"]), manifest["weights"]["seed"])
    plain = encoder.get_parameter(f"{block}.{norm}.weight").numpy()
    assert np.array_equal(file.constants[node.input[1]] * move, plain)


def of_weights(file: File, manifest: Mapping[str, Any]) -> dict[str, float]:
    """The seed, by the numbers that it gives."""
    seed = manifest["weights"]["seed"]
    for candidate in (seed, seed + 1):  # the second is the control
        encoder = random_encoder(EncoderConfig.from_dict(manifest["encoder"]), candidate)
        same = np.array_equal(
            file.constants["trunk.ln_pre.weight"], encoder.get_parameter("trunk.ln_pre.weight").numpy()
        )
        assert same == (candidate == seed)
    return {"weights.seed": seed}


def theta_in(file: File, manifest: Mapping[str, Any]) -> bool:
    """Whether the rotary tables turn with the second frequency that theta gives."""
    encoder = manifest["encoder"]
    depth = encoder["embed_dim"] // encoder["num_heads"]
    angle = encoder["rope_theta"] ** (-4 / depth)
    tables = [array for name, array in file.constants.items() if "window_cos" in name]
    return depth == 4 or any(np.isclose(array.astype(np.float64), math.cos(angle), atol=1e-3).any() for array in tables)


def recount(file: File, manifest: Mapping[str, Any], case: Case) -> dict[str, float]:
    found = of_architecture(file)
    found |= of_contract(file, manifest, found)
    found |= of_graph(file, manifest) | of_verdict(file, manifest, case)
    return found | of_products(file, manifest) | of_weights(file, manifest)


def agree(place: str, told: float, counted: float) -> bool:
    if isinstance(told, int) and isinstance(counted, int):
        return told == counted
    if place.startswith("verification.outputs") and "tolerance" not in place:
        slack = FIGURES[0] * (1 - counted) if place.endswith("cosine") else FIGURES[0] * abs(counted)
        return abs(told - counted) <= slack + 2e-5
    if place == "encoder.mlp_ratio":
        return True  # judged by the hidden channels that it gives, below
    return math.isclose(told, counted, rel_tol=1e-6)


def wrong_numbers(file: File, manifest: Mapping[str, Any], case: Case) -> list[str]:
    """Places of a manifest whose number is not the file's, or that nothing counts."""
    found, wrong = recount(file, manifest, case), []
    for place, told in numbers(dict(manifest)):
        if place in found:
            wrong += [] if agree(place, told, found[place]) else [f"{place} is {told}, counted {found[place]}"]
        elif not any(re.fullmatch(pattern, place) for pattern in NOT_IN_THE_FILE):
            wrong.append(f"{place} is {told}, and is not counted")
    encoder = manifest["encoder"]
    hidden = round(found["encoder.mlp_ratio"] * encoder["embed_dim"])
    wrong += [] if int(encoder["embed_dim"] * encoder["mlp_ratio"]) == hidden else ["encoder.mlp_ratio"]
    missing = {place for place in found if place.startswith("graph.")} - set(dict(numbers(dict(manifest))))
    return wrong + sorted(missing) + ([] if theta_in(file, manifest) else ["encoder.rope_theta"])


def exports(folder: Path, share: int) -> Iterator[tuple[File, dict[str, Any], Case]]:
    """A share of the exports: of every third combination in a row, the first that are neither refused nor rejected."""
    chance, made = random.Random(SEED), 0
    for case in (draw(number, chance) for number in range(10 * EXPORTS)):
        if case.number % SHARES != share:
            continue
        path = folder / f"{case.number}.onnx"
        with contextlib.suppress(RejectedError, ExportError):
            export_onnx(ExportOptions(**case.options | {"output": path}))
            yield File(path), read_manifest(manifest_path(path), "onnx"), case
            made += 1
        if made == EXPORTS // SHARES:
            return


@pytest.fixture(scope="module")
def first_share(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[File, dict[str, Any], Case]]:
    """The exports that both tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "trace", quick_trace)
        return list(exports(tmp_path_factory.mktemp("recount"), 0))


@pytest.mark.parametrize("share", [0, *(pytest.param(share, marks=pytest.mark.slow) for share in range(1, SHARES))])
def test_every_number_of_a_manifest_is_that_of_the_file(
    share: int,
    first_share: list[tuple[File, dict[str, Any], Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export.pipeline, "trace", quick_trace)
    count = 0
    for file, manifest, case in exports(tmp_path, share) if share else first_share:
        assert not wrong_numbers(file, manifest, case), case
        count += 1
    assert count == EXPORTS // SHARES


def test_a_number_that_is_not_the_files_is_seen(first_share: list[tuple[File, dict[str, Any], Case]]) -> None:
    """The control: each number of a manifest that the file tells, changed by itself, is found."""
    file, manifest, case = next(one for one in first_share if one[1].get("quantization"))
    assert not wrong_numbers(file, manifest, case)
    text = json.dumps(manifest)
    changed = {
        "opset": lambda content: content.update(opset=content["opset"] + 1),
        "graph.operators.Add": lambda content: content["graph"]["operators"].update(Add=1),
        "files[0].bytes": lambda content: content["files"][0].update(bytes=1),
        "quantization.of": lambda content: content["quantization"].update(of=7),
        "verification.outputs[0].relative_l2": lambda content: content["verification"]["outputs"][0].update(
            relative_l2=0.5
        ),
        "something": lambda content: content.update(something=1.0),
    }
    for place, change in changed.items():
        other = json.loads(text)
        change(other)
        assert any(line.startswith(place) for line in wrong_numbers(file, other, case)), place
    assert is_feature("sam3_feat_0") and set(BASES)
