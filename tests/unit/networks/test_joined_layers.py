"""A layer of diffusers that is several in the original: SwiGLU's `ff.net.0.proj`, which stacks `up` and `gate`."""

import re

import pytest
import torch
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.adapter_names import BaseNames
from library.models.layer_keys import LayerKeys, Stack, name_layer
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, parse_adapter
from networks.core.files.foreign_names import to_own_names
from networks.core.files.renaming import rename
from tests.contracts.full_size import weights_of_shapes
from tests.tolerances import FLOAT32_SAME_MATH

WHOLE, PARTS = "ff.net.0.proj", ("ff.up", "ff.gate")
BLOCK = {"mlp.up_proj": (PARTS[0],), "mlp.gate_proj": (PARTS[1],), "mlp.down_proj": ("ff.net.2",)}
KEYS = LayerKeys({}, (Stack("blocks", "transformer_blocks", BLOCK),), joined=((WHOLE, PARTS),))
NAMES = BaseNames(
    "gated",
    tuple(name_layer(path, KEYS.sources(path)) for path in KEYS.linear_paths({"blocks": 2})),
    joined=KEYS.joined,
)
UP, GATE, DOWN = (f"lora_unet_blocks_1_mlp_{name}_proj" for name in ("up", "gate", "down"))
JOINED = "transformer.transformer_blocks.1.ff.net.0.proj"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_of(module: str, seed: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": draw(rank, 6, seed=seed),
        f"{module}.lora_up.weight": draw(8, rank, seed=seed + 1),
        f"{module}.alpha": torch.tensor(1.0),
    }


def file_of(tensors: dict[str, Tensor]) -> AdapterFile:
    return parse_adapter(tensors, {}, "mine.safetensors")


def change_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
    return tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))) / len(down) * up @ down


def test_a_checkpoint_in_diffusers_layout_is_split() -> None:
    shapes = {f"transformer_blocks.0.{name}.weight": shape for name, shape in ((WHOLE, (16, 6)), ("ff.net.2", (6, 8)))}
    weights = KEYS.from_diffusers(weights_of_shapes(shapes))
    assert dict(weights.shapes) == {
        "blocks.0.mlp.up_proj.weight": (8, 6),
        "blocks.0.mlp.gate_proj.weight": (8, 6),
        "blocks.0.mlp.down_proj.weight": (6, 8),
    }


@pytest.mark.parametrize("missing", [None, UP, GATE])
def test_a_file_in_diffusers_names_has_the_joined_layer_with_the_same_effect(missing: str | None) -> None:
    parts = [name for name in (UP, GATE) if name != missing]
    ours = {key: tensor for n, name in enumerate((*parts, DOWN)) for key, tensor in lora_of(name, 10 * n).items()}
    theirs = adapter_tensors(rename(file_of(ours), NAMES, "diffusers").file)
    assert {key.partition(".lora_")[0] for key in theirs} == {JOINED, "transformer.transformer_blocks.1.ff.net.2"}
    change = theirs[f"{JOINED}.lora_B.weight"] @ theirs[f"{JOINED}.lora_A.weight"]
    zero = torch.zeros(8, 6)
    wanted = [change_of(ours, name) if name in parts else zero for name in (UP, GATE)]
    torch.testing.assert_close(change, torch.cat(wanted), **FLOAT32_SAME_MATH)


def test_a_file_with_the_joined_layer_is_read_as_its_parts() -> None:
    theirs = {f"{JOINED}.lora_A.weight": draw(3, 6, seed=1), f"{JOINED}.lora_B.weight": draw(16, 3, seed=2)}
    ours = adapter_tensors(to_own_names(file_of(theirs), NAMES))
    change = theirs[f"{JOINED}.lora_B.weight"] @ theirs[f"{JOINED}.lora_A.weight"]
    for name, rows in ((UP, change[:8]), (GATE, change[8:])):
        torch.testing.assert_close(change_of(ours, name), rows, **FLOAT32_SAME_MATH)


def dora_of(module: str, seed: int) -> dict[str, Tensor]:
    return {**lora_of(module, seed), f"{module}.dora_scale": draw(8, 1, seed=seed + 2)}


def test_magnitudes_of_both_parts_are_joined_too() -> None:
    ours = {**dora_of(UP, 1), **dora_of(GATE, 20)}
    theirs = adapter_tensors(rename(file_of(ours), NAMES, "diffusers").file)
    (magnitudes,) = (tensor for key, tensor in theirs.items() if "magnitude" in key)
    assert torch.equal(magnitudes.flatten(), torch.cat([ours[f"{name}.dora_scale"] for name in (UP, GATE)]).flatten())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            dora_of(UP, 1),
            rf"diffusers has {UP} and others as one layer, {re.escape(JOINED)}, and DoRA of parts cannot be",
        ),
        ({f"{UP}.lokr_w1": draw(2, 2, seed=1), f"{UP}.lokr_w2": draw(4, 3, seed=2)}, "has no place"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused_by_name(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.safetensors: .*{reason}"):
        rename(file_of(tensors), NAMES, "diffusers")
