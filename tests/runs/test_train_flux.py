"""Training scripts of FLUX.1, FLUX.2 and FLUX.3 on tiny models: every adapter kind, previews and third-party files."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_metadata
from tests.running import Finished, load_saved, small_run, tiny_model
from tests.runs.musubi_tuner import paths_of, run_command
from tests.runs.test_pairs import (
    test_other_models_train_on_two_references_of_a_musubi_dataset as train_on_two_references,
)
from tests.runs.test_validation import charts, scalars
from tests.tiny.flux import build_tiny_flux
from tests.tiny.flux_2 import DIT
from tests.tiny.flux_3 import CONFIG, build_tiny_flux_3

Train = Callable[..., Finished]
LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)}  # for 64 inputs and outputs
LOHA = {f"hada_w{i}_{side}": (64, 2) if side == "a" else (2, 64) for i in (1, 2) for side in "ab"}


tiny_flux_arguments = tiny_model("flux", 21)


@pytest.fixture
def arguments(tiny_flux_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    words = ["--t5xxl_max_token_length", "32", "--model_prediction_type", "raw", "--guidance_scale", "1"]
    return [*tiny_flux_arguments, *small_run(images, tmp_path, "networks.lora_flux", "3"), *words]


@pytest.fixture
def train_flux(train: Train) -> Train:
    return partial(train, script="flux_train_network")


def test_t5_trains_on_request(train_flux: Train, arguments: list[str], tmp_path: Path) -> None:
    train_flux([*arguments, "--network_args", "train_t5xxl=True", "use_scalar=True", "loraplus_lr_ratio=4"]).ok()
    ups = {key: weight for key, weight in load_saved(tmp_path).items() if key.endswith("lora_up.weight")}
    assert {key.split("_")[1] for key in ups} == {"te1", "te3", "unet"}
    assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in ups.values())


def test_schnell_trains_without_guidance_and_attention_masks_apply_to_both_models(
    train_flux: Train, arguments: list[str], tmp_path: Path
) -> None:
    schnell = build_tiny_flux(tmp_path / "schnell", seed=22, layout="whole", has_guidance=False)
    common = arguments[arguments.index("--train_data_dir") :]
    for name, flags in (("plain", []), ("masked", ["--apply_t5_attn_mask"])):
        done = train_flux([*schnell, *common, "--output_name", name, *flags]).ok()
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
    train_flux([*both, "--output_name", "saving", "--gradient_checkpointing"]).ok()
    plain, saving = load_saved(tmp_path, "plain"), load_saved(tmp_path, "saving")
    for key, weight in plain.items():
        torch.testing.assert_close(saving[key], weight, rtol=1e-4, atol=1e-6)


def test_validation_uses_the_same_noise_levels_every_time(
    train_flux: Train, arguments: list[str], tmp_path: Path
) -> None:
    """With a negligible learning rate both validations measure the same model."""
    checked = ["--validation_split", "0.34", "--validation_seed", "1", "--validate_every_n_steps", "1"]
    still = ["--learning_rate", "1e-12", "--max_train_steps", "2", "--logging_dir", str(tmp_path / "logs")]
    train_flux([*arguments, *checked, *still]).ok()
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
    done = train_flux([*uninterrupted, "--output_name", "whole"]).ok()
    state = str(tmp_path / "out" / "whole-step00000002-state")
    done = train_flux([*uninterrupted, "--output_name", "resumed", "--resume", state]).ok()
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


# flux_2_train_network.py on tiny FLUX.2 models: musubi-tuner's commands, previews, and third-party files.

TRAINING = DIT.training + " --model_version klein-base-4b"


tiny_arguments = tiny_model("flux_2", 31)


@pytest.fixture
def train_flux_2(train: Train) -> Train:
    return partial(train, script="flux_2_train_network")


@pytest.fixture
def path_replacements(tiny_arguments: list[str], tmp_path: Path) -> dict[str, str]:
    return paths_of(tiny_arguments, tmp_path)


def test_our_option_names_give_the_same_result(
    train_flux_2: Train, path_replacements: dict[str, str], tmp_path: Path
) -> None:
    theirs = train_flux_2(TRAINING.format(**path_replacements).split())
    words = TRAINING.replace("--dit {dit}", "--pretrained_model_name_or_path {dit}") + (
        " --cache_latents_to_disk --cache_text_encoder_outputs_to_disk"
    )
    ours = train_flux_2(words.format(**path_replacements).replace("flux2_shift", "flux_shift").split())
    assert theirs.status == ours.status == 0, ours.stderr
    assert theirs.losses == ours.losses and len(ours.losses) == 3


# flux_3_train_network.py on a tiny model: caching commands, references, and the distilled model.

LAYERS = ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")


tiny_flux_3_arguments = tiny_model("flux_3", 31)


@pytest.fixture
def train_flux_3(train: Train) -> Train:
    return partial(train, script="flux_3_train_network")


def test_caching_commands_fill_the_caches_that_training_reuses(
    train_flux_3: Train, tiny_flux_3_arguments: list[str], tmp_path: Path
) -> None:
    """Without --edit the file has no layers for references."""
    paths = paths_of(tiny_flux_3_arguments, tmp_path)
    run_command("flux_3_cache_latents", "--dataset_config {data} --vae {vae}", paths)
    run_command("flux_3_cache_text_encoder_outputs", "--dataset_config {data} --text_encoder {text}", paths)
    assert len(list(tmp_path.rglob("*_flux_3.npz"))) == 3
    for file in tmp_path.rglob("*_flux_3_te.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.shape == (len(mask), CONFIG.text_width) and mask.all() and len(mask) % 80 == 0
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora --max_train_steps 1"
    done = train_flux_3([*words.format(**paths).split(), "--output_name", "mine", "--mixed_precision", "bf16"]).ok()
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert re.search(r"text cache: \d files reused, 0 to encode", done.stderr)
    blocks = [
        f"{stack}.{n}" for stack in ("single_blocks", "txt_mode_blocks", "content_mode_blocks.image") for n in (0, 1)
    ]
    assert load_file(tmp_path / "out" / "mine.safetensors").keys() == {
        f"diffusion_model.{block}.{layer}.lora_{part}.weight" for block in blocks for layer in LAYERS for part in "AB"
    }
    assert read_metadata(tmp_path / "out" / "mine.safetensors")["modelspec.architecture"] == "Flux.3-image-klein/lora"


def test_it_trains_on_two_references_with_edit(train: Train, tmp_path: Path) -> None:
    train_on_two_references(train, tmp_path, build_tiny_flux_3, "flux_3_train_network", "networks.lora", ["--edit"])
    names = load_file(tmp_path / "out" / "mine.safetensors").keys()
    assert "diffusion_model.content_mode_blocks.image_cond.1.mlp_out.lora_B.weight" in names


def test_references_without_edit_are_refused(
    train_flux_3: Train, tiny_flux_3_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    folder = next(path for path in (images, *images.iterdir()) if path.is_dir() and any(path.glob("*.png")))
    (tmp_path / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n'
        f'control_dirs = ["{folder.as_posix()}"]\n'
    )
    words = ["--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path), "--max_train_steps", "1"]
    done = train_flux_3([*tiny_flux_3_arguments, *words, "--network_module", "networks.lora"])
    assert done.status != 0 and "but this base model takes none" in done.stderr


def test_the_distilled_model_trains_beside_a_training_adapter_that_simpletuner_named(
    train_flux_3: Train, images: Path, tmp_path: Path
) -> None:
    """A training adapter may have layers for references, which this run lacks."""
    distilled = build_tiny_flux_3(tmp_path, 31, is_distilled=True)
    generator, adapter = torch.Generator().manual_seed(1), {}
    for block in ("mode_blocks.image.0", "mode_blocks.image_cond.0", "single_transformer_blocks.1"):
        stem = f"transformer.{block}.attn.to_q"
        adapter[f"{stem}.lora_A.weight"] = torch.randn(2, CONFIG.width, generator=generator)
        adapter[f"{stem}.lora_B.weight"] = torch.randn(CONFIG.width, 2, generator=generator)
    save_file(adapter, tmp_path / "assistant.safetensors")
    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 64 --s 2 --d 3\n")
    words = [*distilled, *small_run(images, tmp_path, "networks.lora", "2"), "--mixed_precision", "no"]
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    plain = train_flux_3([*words, *drawing, "--output_name", "plain"])
    done = train_flux_3([*words, *drawing, "--training_adapter", str(tmp_path / "assistant.safetensors")])
    assert plain.status == done.status == 0, done.stderr
    assert "training undoes the distillation" in plain.stderr and "undoes" not in done.stderr
    key = "diffusion_model.single_blocks.1.v_proj.lora_B.weight"
    saved = [load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("plain", "mine")]
    assert saved[0].keys() == saved[1].keys() and not torch.equal(saved[0][key], saved[1][key])
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
