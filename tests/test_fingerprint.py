"""Every value of the weights counts in a fingerprint."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from neck.config import EncoderConfig
from neck.necks import new_encoder
from neck.weights.fingerprint import TYPES, differing, fingerprints, kind_of


@functools.cache
def full_size_shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published encoder with both necks: 432 tensors."""
    with torch.device("meta"):
        encoder = new_encoder(EncoderConfig(necks=("sam3", "sam2")))
    return [(name, tuple(tensor.shape)) for name, tensor in encoder.state_dict().items()]


def trained_rows(name: str, tensor: Tensor) -> Tensor:
    """What counts: a position embedding's first row is the class token's, which Hugging Face's models lack."""
    return tensor[:, 1:] if name == "trunk.pos_embed" else tensor


def test_two_hundred_changes_of_one_value_are_all_noticed() -> None:
    """The last bit of one value of a random tensor of full-size shape, 200 times; the same values again: nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = full_size_shapes()
    values = torch.randn(max(math.prod(shape) for _, shape in shapes), generator=generator)
    missed = []
    for index in torch.randint(len(shapes), (200,), generator=generator).tolist():
        name, shape = shapes[index]
        tensor = values[: math.prod(shape)].view(shape)
        before = fingerprints([(name, tensor)], ("float32",))
        rows = trained_rows(name, tensor)
        place = tuple(int(torch.randint(side, (), generator=generator)) for side in rows.shape)
        rows.view(torch.int32)[place] ^= 1
        if not differing(before, fingerprints([(name, tensor)], ("float32",))):
            missed.append((name, place))
        rows.view(torch.int32)[place] ^= 1
        assert not differing(before, fingerprints([(name, tensor.clone())], ("float32",)))
    assert missed == []


def test_in_each_type_a_change_that_survives_its_rounding_is_noticed() -> None:
    """BF16 keeps 8 bits: a change of the last bit of 24 is none there, one of the 8th is one everywhere."""
    name = "trunk.blocks.3.attn.qkv.weight"
    weight = torch.linspace(1, 2, 48).view(12, 4)
    whole = fingerprints([(name, weight)])
    assert whole["trunk"].keys() == TYPES.keys() and len(set(whole["trunk"].values())) == 3
    for factor, changed in ((1 + 2**-23, ["float32"]), (1 + 2**-6, list(TYPES))):
        other = weight.clone()
        other[7, 2] *= factor
        found = fingerprints([(name, other)])
        assert [kind for kind in TYPES if found["trunk"][kind] != whole["trunk"][kind]] == changed
        assert differing(whole, found) == ["trunk"]
    half = fingerprints([(name, weight.half())], (kind_of(torch.float16),))
    assert not differing(whole, half) and differing(whole, fingerprints([(name, weight.half())], ("float32",)))


def test_order_names_and_shapes_count() -> None:
    first, second = ("trunk.a", torch.ones(2, 3)), ("trunk.b", torch.ones(3, 2))
    whole = fingerprints([first, second])
    others = [[second, first], [("trunk.a", torch.ones(3, 2)), second], [first, ("trunk.c", second[1])]]
    assert all(differing(whole, fingerprints(other)) == ["trunk"] for other in others)
    assert not differing(whole, fingerprints([first, second]))
    necks = fingerprints(
        [("convs.0.a", first[1]), ("sam2_convs.0.a", first[1]), ("sam2_head.conv_s0.weight", first[1])]
    )
    assert list(necks) == ["sam3", "sam2", "sam2_head"] and differing({}, necks) == list(necks)
