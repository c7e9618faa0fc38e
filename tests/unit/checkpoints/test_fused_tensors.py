"""Tensors that one layout of a checkpoint stacks and another stores separately."""

import pytest
import torch

from library.base.errors import UserError
from library.checkpoints.fused_tensors import join_tensors
from library.checkpoints.weights import Quantised, Weights

PARTS = {"qkv": ("q", "k"), "out": ("o",), "last": ("norm",), "absent": ("x", "y")}


def weights_of(names: str) -> Weights:
    tensors = {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(ord(name[0]))) for name in names.split()}
    return Weights(
        "file",
        {name: (4, 3) for name in tensors},
        lambda name: tensors[name],
        {name: Quantised(name, None, dict) for name in tensors},
        padded_to=dict.fromkeys(tensors, 16),
    )


def test_parts_are_stacked_and_halves_swapped() -> None:
    weights = weights_of("q k o norm z")
    joined = join_tensors(weights, PARTS, "last")
    assert joined.shapes == {"qkv": (8, 3), "out": (4, 3), "last": (4, 3), "z": (4, 3)}
    assert torch.equal(joined.read("qkv"), torch.cat([weights.read("q"), weights.read("k")]))
    assert torch.equal(joined.read("last"), weights.read("norm")[[2, 3, 0, 1]])
    assert torch.equal(joined.read("out"), weights.read("o")) and torch.equal(joined.read("z"), weights.read("z"))


def test_tensors_that_are_only_renamed_keep_their_stored_form() -> None:
    joined = join_tensors(weights_of("q k o norm z"), PARTS, "last")
    assert {name: quantised.kind for name, quantised in joined.quantised.items()} == {"out": "o", "z": "z"}
    assert joined.padded_to == {"out": 16, "z": 16}


def test_a_missing_part_of_a_tensor_is_named() -> None:
    with pytest.raises(UserError, match="file is incomplete: k is missing"):
        join_tensors(weights_of("q o"), PARTS)
