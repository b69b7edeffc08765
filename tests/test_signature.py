"""The file's contract: names, shapes, types and order of inputs and outputs, and what is refused."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_config

from export.contract.signature import (
    BatchRange,
    Signature,
    SignatureError,
    TensorSpec,
    choose_levels,
    choose_necks,
    encoder_signature,
)
from neck.config import EncoderConfig

DUAL = EncoderConfig(necks=("sam3", "sam2"))
TRI = EncoderConfig(necks=("sam3", "interactive", "propagation"), scale_factors=(4.0, 2.0, 1.0))


def test_the_published_encoder() -> None:
    signature = encoder_signature(EncoderConfig())
    assert signature.image == TensorSpec("image", "float32", (1, 3, 1008, 1008))
    sides = (288, 144, 72, 36)
    assert signature.outputs == tuple(
        TensorSpec(f"sam3_{kind}_{level}", "float32", (1, 256, side, side))
        for kind in ("feat", "pos")
        for level, side in enumerate(sides)
    )


def test_two_necks_come_neck_by_neck() -> None:
    names = [spec.name for spec in encoder_signature(DUAL, necks="both").outputs]
    assert names == [
        f"{neck}_{kind}_{level}" for neck in ("sam3", "sam2") for kind in ("feat", "pos") for level in range(4)
    ]
    assert len(names) == 16


def test_three_necks_have_three_levels() -> None:
    names = [spec.name for spec in encoder_signature(TRI, necks="all").outputs]
    assert len(names) == 18
    assert names[:7] == [
        "sam3_feat_0",
        "sam3_feat_1",
        "sam3_feat_2",
        "sam3_pos_0",
        "sam3_pos_1",
        "sam3_pos_2",
        "interactive_feat_0",
    ]


def test_an_oblong_size_and_odd_grid() -> None:
    signature = encoder_signature(EncoderConfig(image_size=(70, 98)))
    assert [spec.shape[2:] for spec in signature.of_kind("feat")] == [(20, 28), (10, 14), (5, 7), (2, 3)]


@pytest.mark.parametrize("positions", ["file", "none"])
def test_positions_out_of_the_graph(positions: str) -> None:
    signature = encoder_signature(DUAL, necks="all", positions=positions)  # type: ignore[arg-type]
    assert [spec.name for spec in signature.outputs] == [
        f"{neck}_feat_{level}" for neck in ("sam3", "sam2") for level in range(4)
    ]
    assert [spec.name for spec in signature.of_kind("pos")][:2] == ["sam3_pos_0", "sam3_pos_1"]


def test_uint8_input_is_channels_last() -> None:
    signature = encoder_signature(tiny_config(image_size=(56, 112)), input_kind="uint8", batch=BatchRange(2, 2, 2))
    assert signature.image == TensorSpec("image", "uint8", (2, 56, 112, 3))


def test_dynamic_batch_has_a_name() -> None:
    signature = encoder_signature(tiny_config(), batch=BatchRange(1, 4, 8))
    assert {spec.shape[0] for spec in (signature.image, *signature.outputs)} == {"batch"}


def test_output_type() -> None:
    signature = encoder_signature(tiny_config(), dtype="float16")
    assert signature.image.dtype == "float32"
    assert {spec.dtype for spec in signature.outputs} == {"float16"}


@pytest.mark.parametrize(
    "signature",
    [
        encoder_signature(EncoderConfig()),
        encoder_signature(DUAL, necks="sam2", levels="1,3", positions="none", input_kind="uint8", dtype="bfloat16"),
        encoder_signature(TRI, necks="all", batch=BatchRange(1, 4, 8)),
    ],
)
def test_json_gives_the_same_signature_again(signature: Signature) -> None:
    values = json.loads(json.dumps(signature.to_dict()))
    assert Signature.from_dict(values) == signature
    assert [tuple(spec["shape"]) for spec in values["outputs"]] == [spec.shape for spec in signature.outputs]
    assert values["inputs"][0]["name"] == "image"
    assert Signature.from_dict({**values, "d_model": 3}) != signature  # the control


@pytest.mark.parametrize(
    ("text", "batch", "dynamic"),
    [
        ("1", BatchRange(1, 1, 1), False),
        ("16", BatchRange(16, 16, 16), False),
        ("1:4:8", BatchRange(1, 4, 8), True),
        ("2:2:2", BatchRange(2, 2, 2), False),
    ],
)
def test_batch(text: str, batch: BatchRange, dynamic: bool) -> None:
    assert BatchRange.parse(text) == batch
    assert batch.dynamic is dynamic
    assert BatchRange.parse(str(batch)) == batch
    assert batch.dim == ("batch" if dynamic else batch.optimum)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "four", "1:2", "1:2:3:4", "1::8", "8:4:1", "1:9:8", "0:1:2", "1:4:8 "]
)
def test_bad_batch_is_refused(text: str) -> None:
    with pytest.raises(SignatureError, match="1:4:8"):
        BatchRange.parse(text)


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [
        ("sam3", DUAL.necks, ("sam3",)),
        ("sam2", DUAL.necks, ("sam2",)),
        ("both", DUAL.necks, ("sam3", "sam2")),
        ("sam2,sam3", DUAL.necks, ("sam3", "sam2")),
        ("sam3, sam3", DUAL.necks, ("sam3",)),
        ("all", ("sam3",), ("sam3",)),
        ("all", TRI.necks, TRI.necks),
        ("propagation,sam3", TRI.necks, ("sam3", "propagation")),
    ],
)
def test_necks(asked: str, available: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert choose_necks(asked, available) == chosen


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "sam4",
            "there is no neck 'sam4'.* one or more of sam3, sam2, interactive, propagation, .* words `both`, `all` and",
        ),
        ("", "there is no neck ''"),
        ("sam3,", "there is no neck ''"),
        ("both", "neck sam2 was requested, but the checkpoint contains only sam3"),
        ("interactive", "neck interactive was requested, but the checkpoint contains only sam3"),
    ],
)
def test_bad_necks_are_refused(asked: str, said: str) -> None:
    with pytest.raises(SignatureError, match=said):
        choose_necks(asked, ("sam3",))


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("all", (0, 1, 2, 3)), ("0,1,2,3", (0, 1, 2, 3)), ("3,1,1", (1, 3)), ("2", (2,)), ("0, 2", (0, 2))],
)
def test_levels(asked: str, chosen: tuple[int, ...]) -> None:
    assert choose_levels(asked, 4) == chosen


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("4", "level 4 does not exist, because the encoder has levels 0 to 3"),
        ("0,7", "level 7"),
        ("", "write the level numbers separated by commas"),
        ("-1", "write the level numbers separated by commas"),
        ("0,,1", "write the level numbers separated by commas"),
        ("finest", "write the level numbers separated by commas"),
    ],
)
def test_bad_levels_are_refused(asked: str, said: str) -> None:
    with pytest.raises(SignatureError, match=said):
        choose_levels(asked, 4)


def test_levels_keep_their_index() -> None:
    signature = encoder_signature(tiny_config(), levels="1,3")
    assert [spec.name for spec in signature.of_kind("feat")] == ["sam3_feat_1", "sam3_feat_3"]
    assert [spec.shape[2] for spec in signature.of_kind("feat")] == [16, 4]
