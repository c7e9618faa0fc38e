"""Training runs of the fast tier: every base model, script and adapter kind once, and resumed runs.

All other training runs are slow, see `SLOW_FOLDERS` in tests/conftest.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from networks.core.registry.layouts import list_kinds
from tests.running import Finished, make_images
from tests.runs.test_resume import ALL_RANDOM, interrupt_and_resume
from tests.tiny.bases import BASES

Train = Callable[..., Finished]
KINDS = sorted(kind.network_module for kind in list_kinds() if kind.network_module)
PAIR = '[[prompts]]\ntarget = "a red cat"\npositive = "an cat"\n'


def training_arguments(tmp_path: Path, *model: str) -> list[str]:
    make_images(tmp_path / "data" / "1_thing", 2, seed=61)
    return [
        *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_dim", "4", "--max_train_steps", "2",
        "--learning_rate", "1e-2", "--seed", "5", "--max_data_loader_n_workers", "0", "--no_report",
    ]  # fmt: skip


def trained_parts(tmp_path: Path) -> set[str]:
    """Return the adapter prefixes, such as lora_unet, that have trained (non-zero) weights."""
    tensors = load_state_dict(tmp_path / "out" / "mine.safetensors")
    return {
        key.partition("_")[0] + "_" + key.split("_")[1] for key, tensor in tensors.items() if tensor.abs().max() > 0
    }


@pytest.mark.parametrize("name", BASES)
def test_every_base_model_trains_with_its_script_and_resumes(train: Train, name: str, tmp_path: Path) -> None:
    base = BASES[name]
    words = training_arguments(tmp_path, *base.build(tmp_path / "model"))
    words += ["--network_module", base.module, "--network_dropout", "0.1"]
    train([*words, "--save_state", "--save_every_n_steps", "1"], base.script).ok()
    parts = trained_parts(tmp_path)
    assert any(part.startswith(("lora_unet", "diffusion_model.", "transformer.")) for part in parts)
    assert any(part.startswith("lora_te") for part in parts) == base.adapts_text_encoders
    assert read_metadata(tmp_path / "out" / "mine.safetensors")["ss_steps"] == "2"
    state = str(tmp_path / "out" / "mine-step00000001-state")
    train([*words, "--output_name", "resumed", "--resume", state], base.script).ok()
    uninterrupted, resumed = (load_state_dict(tmp_path / "out" / f"{n}.safetensors") for n in ("mine", "resumed"))
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in uninterrupted.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_trains(train: Train, kind: str, tiny_sd_folder: Path, tmp_path: Path) -> None:
    words = training_arguments(tmp_path, "--pretrained_model_name_or_path", str(tiny_sd_folder))
    train([*words, "--network_module", kind, "--network_train_unet_only"]).ok()
    assert trained_parts(tmp_path) == {"lora_unet"}


@pytest.mark.parametrize(("name", "script"), [("sd", "train_leco"), ("sdxl", "sdxl_train_leco")])
def test_concepts_are_trained_from_prompts_alone(train: Train, name: str, script: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.toml").write_text(PAIR)
    words = [
        *BASES[name].build(tmp_path / "model"), "--prompts_file", str(tmp_path / "pairs.toml"), "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--learning_rate", "1e-2", "--max_train_steps", "2",
        "--max_denoising_steps", "2", "--seed", "5", "--no_report",
    ]  # fmt: skip
    train(words, script).ok()
    assert trained_parts(tmp_path) == {"lora_unet"}


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    interrupt_and_resume(train, [*base_arguments, *ALL_RANDOM], tmp_path, cuts=[3])
