"""Saved Krea 2 adapters in diffusers' own loader and transformer, and files of other trainers in ours, on the same
weights."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.krea2.adapter_names import NAMES
from networks import dylora, lokr, lora, lora_fa, lora_krea2
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.foreign_names import in_a_model
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_krea2_model import inputs, oracle, oracle_output
from tests.tiny.krea2 import tiny_krea2
from tests.tolerances import FLOAT32_DEEP

DOORS = {"lora_krea2": lora_krea2, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}


def values() -> list[Tensor]:
    return [value.detach() for value in inputs(4, 6)]


def model() -> Any:
    return tiny_krea2(7)


def trained_file(door: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; gives the prediction without and with it."""
    ours = model()
    return save_trained(door, path, arguments, ours, lambda: ours(*values()))


def prediction_with(path: Path, door: Any = lora_krea2) -> Tensor:
    """Ours with an adapter file merged."""
    ours = model()
    network, weights = door.create_network_from_weights(1.0, str(path), None, [], ours, for_inference=True)
    network.merge_to([], ours, weights, torch.float32, "cpu")
    return ours(*values())  # type: ignore[no-any-return]


def diffusers_prediction(path: Path, caplog: pytest.LogCaptureFixture) -> Tensor:
    """diffusers' with a file as it is; it logs what it does not use."""
    from diffusers import Krea2Pipeline

    theirs = oracle(model())
    with caplog.at_level(logging.WARNING, "diffusers"):
        Krea2Pipeline.load_lora_into_transformer(Krea2Pipeline.lora_state_dict(str(path)), theirs)
    assert "unexpected" not in caplog.text and "No LoRA keys" not in caplog.text
    return oracle_output(theirs, *values())


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("lora_krea2", {}),
        ("lora_krea2", {"mlp_dim": "0", "txtfusion_dim": "2"}),
        ("lora", {"exclude_patterns": "['.*']", "include_patterns": r"['blocks\..*\.attn\..*']"}),
        ("lora_fa", {}),
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
    assert "diffusion_model.blocks.0.attn.wq.lora_A.weight" in tensors
    assert ("diffusion_model.txtfusion.projector.lora_A.weight" in tensors) == ("exclude_patterns" not in arguments)
    torch.testing.assert_close(diffusers_prediction(path, caplog), expected, **FLOAT32_DEEP)
    torch.testing.assert_close(prediction_with(path), expected, **FLOAT32_DEEP)


def test_diffusers_reads_nothing_of_other_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which is why they are not saved so: with alpha beside dotted names, and under kohya's."""
    from diffusers import Krea2Pipeline

    path = tmp_path / "ours.safetensors"
    trained_file(lora_krea2, path, {})
    with pytest.raises(ValueError, match="should be empty"):
        Krea2Pipeline.lora_state_dict({**load_file(path), "diffusion_model.blocks.0.attn.wq.alpha": torch.tensor(1.0)})
    kohya = rename(read_adapter_file(path), NAMES, "kohya").file
    save_file(adapter_tensors(kohya), tmp_path / "kohya.safetensors")
    with pytest.raises((ValueError, AssertionError)):
        diffusers_prediction(tmp_path / "kohya.safetensors", caplog)


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        (lokr, {"factor": "2"}),
        (lora_krea2, {"dora_wd": "True"}),
        (lora_krea2, {"dora_wd": "True", "wd_on_output": "True"}),  # of the projector's one output too
    ],
    ids=["lokr", "dora", "dora per output"],
)
def test_other_kinds_have_the_names_of_kohya(door: Any, arguments: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    _, expected = trained_file(door, path, arguments)
    assert any(key.startswith("lora_unet_blocks_0_attn_wq.") for key in load_file(path))
    torch.testing.assert_close(prediction_with(path, door), expected, **FLOAT32_DEEP)


# Files of other trainers: with the paths of the original layers, or with those of diffusers


def kohya_keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    stem = f"lora_unet_{path.replace('.', '_')}"
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


def dotted_keys(prefix: str) -> Callable[[str, Tensor, Tensor], dict[str, Tensor]]:
    def keys(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        return {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}

    return keys


Keys = Callable[[str, Tensor, Tensor], dict[str, Tensor]]
OTHERS: Mapping[str, tuple[bool, Keys]] = {  # whether the paths are diffusers', and the keys
    "musubi-tuner": (False, kohya_keys),
    "the authors, ai-toolkit": (False, dotted_keys("diffusion_model")),
    "PEFT": (False, dotted_keys("base_model.model")),
    "SimpleTuner": (True, dotted_keys("transformer")),
    "OneTrainer, kohya": (
        True,
        lambda *values: {k.replace("lora_unet_", "lora_transformer_"): t for k, t in kohya_keys(*values).items()},
    ),
}


def foreign_file(path: Path, trainer: str) -> Tensor:
    """Write what a trainer writes, of every layer; gives what its model predicts with it."""
    is_diffusers, keys = OTHERS[trainer]
    theirs = oracle(model()) if is_diffusers else model()
    generator = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear):
            down = torch.randn(2, module.in_features, generator=generator) / module.in_features**0.5
            up = 0.3 * torch.randn(module.out_features, 2, generator=generator)
            tensors |= keys(name, down, up)
            module.weight.add_(up @ down)
    save_file(tensors, path)
    return oracle_output(theirs, *values()) if is_diffusers else theirs(*values())


@pytest.mark.parametrize("trainer", OTHERS)
def test_files_of_other_trainers_are_merged_trained_and_converted(trainer: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    expected = foreign_file(path, trainer)
    assert (expected - model()(*values())).abs().max() > 0.01
    torch.testing.assert_close(prediction_with(path), expected, **FLOAT32_DEEP)
    ours = model()
    network, _ = lora_krea2.create_network_from_weights(1.0, str(path), None, [], ours)
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
