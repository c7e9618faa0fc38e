"""flux_3_train_network.py on a tiny model: caching commands, references, and the distilled model."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_metadata
from tests.running import Finished, small_run
from tests.runs.musubi_tuner import paths_of, run_command
from tests.runs.test_edit_training import (
    test_other_models_train_on_two_references_of_a_musubi_dataset as train_on_two_references,
)
from tests.tiny.flux_3 import CONFIG, build_tiny_flux_3

Train = Callable[..., Finished]
LAYERS = ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux_3(tmp_path_factory.mktemp("tiny_flux_3"), seed=31)


@pytest.fixture
def train_flux_3(train: Train) -> Train:
    return partial(train, script="flux_3_train_network")


def test_caching_commands_fill_the_caches_that_training_reuses(
    train_flux_3: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """Without --edit the file has no layers for references."""
    paths = paths_of(tiny_arguments, tmp_path)
    run_command("flux_3_cache_latents", "--dataset_config {data} --vae {vae}", paths)
    run_command("flux_3_cache_text_encoder_outputs", "--dataset_config {data} --text_encoder {text}", paths)
    assert len(list(tmp_path.rglob("*_flux_3.npz"))) == 3
    for file in tmp_path.rglob("*_flux_3_te.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.shape == (len(mask), CONFIG.text_width) and mask.all() and len(mask) % 80 == 0
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora --max_train_steps 1"
    done = train_flux_3([*words.format(**paths).split(), "--output_name", "mine", "--mixed_precision", "bf16"])
    assert done.status == 0, done.stderr
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
    train_flux_3: Train, tiny_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    folder = next(path for path in (images, *images.iterdir()) if path.is_dir() and any(path.glob("*.png")))
    (tmp_path / "data.toml").write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder.as_posix()}"\n'
        f'control_dirs = ["{folder.as_posix()}"]\n'
    )
    words = ["--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path), "--max_train_steps", "1"]
    done = train_flux_3([*tiny_arguments, *words, "--network_module", "networks.lora"])
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
