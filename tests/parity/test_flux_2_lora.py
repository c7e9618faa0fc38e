"""Saved FLUX.2 adapters in diffusers' own loader and transformer, and files of other trainers in ours, on the same
weights."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.flux_2.adapter_names import NAMES
from networks import dylora, lokr, lora, lora_fa, lora_flux_2
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.foreign_names import in_a_model
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_flux_2_model import inputs, oracle, oracle_output
from tests.tiny.flux_2 import tiny_flux_2
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize

DOORS = {"lora_flux_2": lora_flux_2, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}
EVERYWHERE = {"in_dims": "[2,2,2,2,2,2,2]"}


def values() -> list[Tensor]:
    return [value.detach() for value in inputs(3, 5)]


def model() -> Any:
    return tiny_flux_2(7, is_dev=True)


def trained_file(door: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; gives the prediction without and with it."""
    ours = model()
    return save_trained(door, path, arguments, ours, lambda: ours(*values()))


def prediction_with(path: Path, door: Any = lora_flux_2) -> Tensor:
    """Ours with an adapter file merged."""
    ours = model()
    network, weights = door.create_network_from_weights(1.0, str(path), None, [], ours, for_inference=True)
    network.merge_to([], ours, weights, torch.float32, "cpu")
    return ours(*values())  # type: ignore[no-any-return]


def diffusers_prediction(path: Path, caplog: pytest.LogCaptureFixture) -> Tensor:
    """diffusers' with a file as it is; it logs what it does not use."""
    from diffusers import Flux2Pipeline

    theirs = oracle(model())
    with caplog.at_level(logging.WARNING, "diffusers"):
        Flux2Pipeline.load_lora_into_transformer(Flux2Pipeline.lora_state_dict(str(path)), theirs)
    assert "unexpected" not in caplog.text and "Unsupported" not in caplog.text
    return oracle_output(theirs, *values())


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("lora_flux_2", {}),
        ("lora_flux_2", EVERYWHERE),
        ("lora", {"split_qkv": "True"}),
        ("lora_fa", {"split_qkv": "True", **EVERYWHERE}),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_file_as_it_is(
    door: str, arguments: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ours.safetensors"
    base, expected = trained_file(DOORS[door], path, arguments)
    assert (expected - base).abs().max() > 0.01
    tensors = load_file(path)
    assert all(
        key.startswith("diffusion_model.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors
    )
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in tensors
    torch.testing.assert_close(diffusers_prediction(path, caplog), expected, **FLOAT32_DEEP)
    torch.testing.assert_close(prediction_with(path), expected, **FLOAT32_DEEP)


def test_a_saved_file_loads_into_the_same_network_at_the_same_rank(tmp_path: Path) -> None:
    path, again = tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
    trained_file(lora_flux_2, path, {})
    network = lora_flux_2.create_network(1.0, 4, 2, None, [], model())
    network.load_weights(str(path))
    network.save_weights(str(again), None, {})
    found, expected = load_file(again), load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_the_strength_is_multiplied_in_before_values_are_rounded(tmp_path: Path) -> None:
    """alpha / rank is 2 / 3, which no format has exactly."""
    network = lora_flux_2.create_network(1.0, 3, 2, None, [], model())
    randomize(network, 3)
    network.save_weights(str(tmp_path / "half.safetensors"), torch.bfloat16, {})
    found = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    up = network.adapters["lora_unet_single_blocks_0_linear2"].change.stored_tensors()["lora_up.weight"]
    expected = (up.double() * (2 / 3)).bfloat16()
    assert torch.equal(found["diffusion_model.single_blocks.0.linear2.lora_B.weight"], expected)


@pytest.mark.parametrize(
    ("door", "arguments"), [(lokr, {"factor": "2"}), (lora_flux_2, {"dora_wd": "True"})], ids=["lokr", "dora"]
)
def test_other_kinds_have_the_names_of_kohya(door: Any, arguments: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    _, expected = trained_file(door, path, arguments)
    assert any(key.startswith("lora_unet_double_blocks_0_img_attn_qkv.") for key in load_file(path))
    torch.testing.assert_close(prediction_with(path, door), expected, **FLOAT32_DEEP)


# Files of other trainers: with the original, fused layers, or with those of diffusers, each with factors of its own


def factors(layers: nn.Module, blocks: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of rank 2 by path, of every Linear layer in the blocks."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for path, module in layers.named_modules():
        if isinstance(module, nn.Linear) and path.startswith(blocks):
            down = torch.randn(2, module.in_features, generator=generator) / module.in_features**0.5
            found[path] = (down, 0.3 * torch.randn(module.out_features, 2, generator=generator))
    return found


def kohya_keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"lora_unet_{path.replace('.', '_')}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


def dotted_keys(prefix: str) -> Callable[[str, Tensor, Tensor], dict[str, Tensor]]:
    def keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        return {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}

    return keys


def onetrainer_keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {key.replace("lora_unet_", "lora_transformer_"): t for key, t in kohya_keys(path, down, up).items()}


def onetrainer_dotted_keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"transformer.{path}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


Keys = Callable[[str, Tensor, Tensor], dict[str, Tensor]]
OTHERS: Mapping[str, tuple[bool, Keys]] = {  # whether the paths are diffusers', and the keys
    "musubi-tuner": (False, kohya_keys),
    "ai-toolkit": (False, dotted_keys("diffusion_model")),
    "SimpleTuner": (True, dotted_keys("transformer")),
    "diffusers' paths in ComfyUI's place": (True, dotted_keys("diffusion_model")),
    "OneTrainer, kohya": (True, onetrainer_keys),
    "OneTrainer": (True, onetrainer_dotted_keys),
}


def foreign_file(path: Path, trainer: str) -> Tensor:
    """Write what a trainer writes; gives what its model predicts with it."""
    is_diffusers, keys = OTHERS[trainer]
    if is_diffusers:
        theirs = oracle(model())
        found = factors(theirs, ("transformer_blocks.", "single_transformer_blocks."))
    else:
        theirs = model()
        found = factors(theirs, ("double_blocks.", "single_blocks."))
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in found.items():
        tensors |= keys(module, down, up)
        theirs.get_submodule(module).weight.add_(up @ down)
    save_file(tensors, path)
    return oracle_output(theirs, *values()) if is_diffusers else theirs(*values())


@pytest.mark.parametrize("trainer", OTHERS)
def test_files_of_other_trainers_are_merged_trained_and_converted(trainer: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    expected = foreign_file(path, trainer)
    assert (expected - model()(*values())).abs().max() > 0.01
    torch.testing.assert_close(prediction_with(path), expected, **FLOAT32_DEEP)
    ours = model()
    network, _ = lora_flux_2.create_network_from_weights(1.0, str(path), None, [], ours)
    network.load_weights(str(path))
    network.apply_to([], ours, False, True)
    network.eval()
    torch.testing.assert_close(ours(*values()), expected, **FLOAT32_DEEP)
    network.save_weights(str(tmp_path / "trained.safetensors"), None, {})
    torch.testing.assert_close(prediction_with(tmp_path / "trained.safetensors"), expected, **FLOAT32_DEEP)
    for naming in ("kohya", "generic", "diffusers"):
        renamed = rename(in_a_model(read_adapter_file(path), [NAMES]), NAMES, naming).file
        save_file(adapter_tensors(renamed), tmp_path / "converted.safetensors")
        torch.testing.assert_close(prediction_with(tmp_path / "converted.safetensors"), expected, **FLOAT32_DEEP)
