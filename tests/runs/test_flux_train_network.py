"""flux_train_network.py on a tiny FLUX.1 model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.running import Finished, load_saved, small_run
from tests.runs.test_validation import charts, scalars
from tests.tiny.flux import build_tiny_flux

Train = Callable[..., Finished]
LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)}  # for 64 inputs and outputs
LOHA = {f"hada_w{i}_{side}": (64, 2) if side == "a" else (2, 64) for i in (1, 2) for side in "ab"}


@pytest.fixture(scope="session")
def tiny_flux_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux(tmp_path_factory.mktemp("tiny_flux"), seed=21)


@pytest.fixture
def arguments(tiny_flux_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    words = ["--t5xxl_max_token_length", "32", "--model_prediction_type", "raw", "--guidance_scale", "1"]
    return [*tiny_flux_arguments, *small_run(images, tmp_path, "networks.lora_flux", "3"), *words]


@pytest.fixture
def train_flux(train: Train) -> Train:
    return partial(train, script="flux_train_network")


def test_t5_trains_on_request(train_flux: Train, arguments: list[str], tmp_path: Path) -> None:
    done = train_flux([*arguments, "--network_args", "train_t5xxl=True", "use_scalar=True", "loraplus_lr_ratio=4"])
    assert done.status == 0, done.stderr
    ups = {key: weight for key, weight in load_saved(tmp_path).items() if key.endswith("lora_up.weight")}
    assert {key.split("_")[1] for key in ups} == {"te1", "te3", "unet"}
    assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in ups.values())


def test_schnell_trains_without_guidance_and_attention_masks_apply_to_both_models(
    train_flux: Train, arguments: list[str], tmp_path: Path
) -> None:
    schnell = build_tiny_flux(tmp_path / "schnell", seed=22, layout="whole", has_guidance=False)
    common = arguments[arguments.index("--train_data_dir") :]
    for name, flags in (("plain", []), ("masked", ["--apply_t5_attn_mask"])):
        done = train_flux([*schnell, *common, "--output_name", name, *flags])
        assert done.status == 0, done.stderr
        assert "--guidance_scale has no effect" in done.stderr
    plain, masked = load_saved(tmp_path, "plain"), load_saved(tmp_path, "masked")
    assert any(not torch.equal(weight, masked[key]) for key, weight in plain.items())
    with safe_open(tmp_path / "out" / "masked.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "flux1"
    assert metadata["modelspec.architecture"] == "flux-1-schnell/lora"
    assert "modelspec.prediction_type" not in metadata
    assert metadata["ss_apply_t5_attn_mask"] == "True"


@pytest.mark.nightly
def test_gradient_checkpointing_of_text_encoders_does_not_change_results(
    train_flux: Train, arguments: list[str], tmp_path: Path
) -> None:
    both = [*arguments, "--network_args", "train_t5xxl=True", "--text_encoder_lr", "1e-3", "5e-4"]
    assert train_flux([*both, "--output_name", "plain"]).status == 0
    done = train_flux([*both, "--output_name", "saving", "--gradient_checkpointing"])
    assert done.status == 0, done.stderr
    plain, saving = load_saved(tmp_path, "plain"), load_saved(tmp_path, "saving")
    for key, weight in plain.items():
        torch.testing.assert_close(saving[key], weight, rtol=1e-4, atol=1e-6)


def test_validation_uses_the_same_noise_levels_every_time(
    train_flux: Train, arguments: list[str], tmp_path: Path
) -> None:
    """With a negligible learning rate both validations measure the same model."""
    checked = ["--validation_split", "0.34", "--validation_seed", "1", "--validate_every_n_steps", "1"]
    still = ["--learning_rate", "1e-12", "--max_train_steps", "2", "--logging_dir", str(tmp_path / "logs")]
    done = train_flux([*arguments, *checked, *still])
    assert done.status == 0, done.stderr
    values = [value for _, value in scalars(charts(tmp_path / "logs"), "loss/validation/step_average")]
    assert len(values) >= 2
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_a_file_with_separate_qkv_continues_resumes_and_keeps_its_names(
    train_flux: Train, arguments: list[str], tmp_path: Path, kind: str
) -> None:
    generator, tensors = torch.Generator().manual_seed(61), {}
    for block in ("lycoris_transformer_blocks_0_attn_", "lycoris_single_transformer_blocks_0_attn_"):
        for part in ("to_q", "to_k", "to_v"):
            shapes = LOKR if kind == "lokr" else LOHA
            leaves = {leaf: 0.1 * torch.randn(shape, generator=generator) for leaf, shape in shapes.items()}
            tensors |= {f"{block}{part}.{leaf}": tensor for leaf, tensor in leaves.items()}
            tensors[f"{block}{part}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "theirs.safetensors")
    network_module = ["--network_module", f"networks.{kind}", "--network_train_unet_only", "--save_state"]
    further = [*arguments, *network_module, "--dim_from_weights", "--network_weights"]
    words = ["--save_every_n_steps", "2", "--network_args", "loraplus_lr_ratio=2", "rank_dropout=0.1"]
    uninterrupted = [*further, str(tmp_path / "theirs.safetensors"), *words]
    done = train_flux([*uninterrupted, "--output_name", "whole"])
    assert done.status == 0, done.stderr
    state = str(tmp_path / "out" / "whole-step00000002-state")
    done = train_flux([*uninterrupted, "--output_name", "resumed", "--resume", state])
    assert done.status == 0, done.stderr
    expected, resumed = load_saved(tmp_path, "whole"), load_saved(tmp_path, "resumed")
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(weight, resumed[key]) for key, weight in expected.items())
    moved = [not torch.equal(expected[key], tensor) for key, tensor in tensors.items() if not key.endswith(".alpha")]
    assert all(moved)
    again = [*further, str(tmp_path / "out" / "whole.safetensors")]
    done = train_flux([*again, "--output_name", "again", "--max_train_steps", "1"])
    assert done.status == 0 and load_saved(tmp_path, "again").keys() == tensors.keys(), done.stderr


def test_captions_cached_with_another_token_limit_are_encoded_again(train_flux: Train, arguments: list[str]) -> None:
    words = [*arguments, "--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]
    assert train_flux(words).status == 0
    done = train_flux([*words, "--t5xxl_max_token_length", "24"])
    assert done.status == 0 and "7 stale (7 made with other text encoders or settings" in done.stderr
