"""anima_train_network.py on a tiny Anima model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.running import Finished
from tests.tiny import anima
from tests.tiny.anima import QWEN_WIDTH, build_tiny_anima

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_anima_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_anima(tmp_path_factory.mktemp("tiny_anima"), seed=41)


@pytest.fixture
def common_arguments(images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps, without those of the base model."""
    return [
        "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64",
        "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_anima", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed", "5",
        "--max_data_loader_n_workers", "0", "--qwen3_max_token_length", "32", "--t5_max_token_length", "32",
    ]  # fmt: skip


@pytest.fixture
def arguments(tiny_anima_arguments: list[str], common_arguments: list[str]) -> list[str]:
    return [*tiny_anima_arguments, *common_arguments]


@pytest.fixture
def train_anima(train: Train) -> Train:
    return partial(train, script="anima_train_network")


def load_saved(tmp_path: Path, name: str = "mine") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("module", "network_args"),
    [
        ("networks.lora_anima", []),
        ("networks.lora_anima", ["train_llm_adapter=true", "rank_dropout=0.1", "network_reg_dims=blocks\\.0\\..*=2"]),
        ("networks.lora", ["dora_wd=True", "include_patterns=.*", "loraplus_lr_ratio=4"]),
        ("networks.lora_fa", ["exclude_patterns=['.*mlp.*', '.*cross_attn.*']"]),
        ("networks.dylora", ["unit=2"]),
    ],
    ids=str,
)
def test_every_adapter_kind_trains_and_changes_every_module(
    train_anima: Train, arguments: list[str], tmp_path: Path, module: str, network_args: list[str]
) -> None:
    extra = ["--network_module", module, *(["--network_args", *network_args] if network_args else [])]
    done = train_anima([*arguments, *extra])
    assert done.status == 0, done.stderr
    weights = load_saved(tmp_path)
    ups = {key: weight for key, weight in weights.items() if key.endswith("lora_up.weight")}
    assert {key.split("_")[1] for key in ups} == {"te", "unet"}
    assert any("_llm_adapter_" in key for key in ups) == ("train_llm_adapter=true" in network_args)
    assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in ups.values())
    downs = {key: weight.shape[0] for key, weight in weights.items() if key.endswith("lora_down.weight")}
    small = {key for key, rank in downs.items() if rank == 2}
    assert small == ({key for key in downs if "unet_blocks_0_" in key} if "rank_dropout=0.1" in network_args else set())


@pytest.mark.nightly
def test_memory_modes_caches_and_checkpoint_layouts_do_not_change_results(
    train_anima: Train, arguments: list[str], common_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    alone = ["--network_train_unet_only", "--cache_latents", "--network_args", "train_llm_adapter=True"]
    assert train_anima([*arguments, *alone, "--max_train_steps", "1", "--output_name", "start"]).status == 0
    alone += ["--network_weights", str(tmp_path / "out" / "start.safetensors")]
    assert train_anima([*arguments, *alone, "--output_name", "plain"]).status == 0
    folders = build_tiny_anima(tmp_path, seed=41, prefix="", has_folders=True)
    caching = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--gradient_checkpointing"]
    for name in ("first", "again"):
        done = train_anima([*folders, *common_arguments, *alone, *caching, "--output_name", name])
        assert done.status == 0, done.stderr
    plain, first, again = (load_saved(tmp_path, name) for name in ("plain", "first", "again"))
    for key, weight in plain.items():
        torch.testing.assert_close(first[key], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[key], again[key])
    with np.load(images / "2_thing" / "00_anima_te.npz") as file:
        actual = {key: (file[key].shape, str(file[key].dtype)) for key in file.files if not key.startswith("captions")}
    assert actual == {
        "prompt_embeds": ((32, QWEN_WIDTH), "float32"),
        "attn_mask": ((32,), "int64"),
        "t5_input_ids": ((32,), "int32"),
        "t5_attn_mask": ((32,), "int32"),
        "caption_dropout_rate": ((), "float32"),
    }
    with np.load(images / "2_thing" / "00_0064x0064_anima.npz") as file:
        assert file["latents_8x8"].shape == (16, 8, 8)
    with safe_open(tmp_path / "out" / "plain.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "anima"
    assert metadata["ss_timestep_sampling"] == "sigmoid"
    assert metadata["modelspec.architecture"] == "anima-preview/lora"


def test_llm_adapter_path_replaces_the_models_text_adapter(
    train_anima: Train, arguments: list[str], tmp_path: Path
) -> None:
    build_tiny_anima(tmp_path, seed=43)
    other = ["--llm_adapter_path", str(tmp_path / "anima.safetensors")]
    losses = []
    for flags in ([], other):
        done = train_anima([*arguments, "--network_train_unet_only", *flags])
        assert done.status == 0, done.stderr
        losses.append(done.losses)
    assert losses[0] != losses[1]


@pytest.mark.nightly
def test_a_resumed_run_equals_the_uninterrupted_one_and_draws_previews(
    train_anima: Train, arguments: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --w 64 --h 48 --s 2 --l 3 --fs 2 --d 1\n")
    uninterrupted = [*arguments, "--max_train_steps", "4"]
    assert train_anima([*uninterrupted, "--output_name", "whole"]).status == 0
    drawing = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]
    half = [*uninterrupted, *drawing, "--output_name", "half", "--save_state", "--save_every_n_steps", "2"]
    done = train_anima(half)
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
    state = str(tmp_path / "out" / "half-step00000002-state")
    done = train_anima([*uninterrupted, "--output_name", "resumed", "--resume", state])
    assert done.status == 0, done.stderr
    expected, resumed = load_saved(tmp_path, "whole"), load_saved(tmp_path, "resumed")
    assert all(torch.equal(weight, resumed[key]) for key, weight in expected.items())


def test_a_model_of_another_size_trains_with_swapped_blocks(
    train_anima: Train, common_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but two of its blocks can be swapped, and the result is the same."""
    monkeypatch.setattr(anima, "CONFIG", replace(anima.CONFIG, num_blocks=7, width=60, head_width=20, mlp_width=150))
    words = [*build_tiny_anima(tmp_path / "deep", 42), *common_arguments, "--gradient_checkpointing"]
    plain = train_anima([*words, "--output_name", "plain"])
    waiting = train_anima([*words, "--output_name", "waiting", "--blocks_to_swap", "5"])
    assert plain.status == 0 and waiting.status == 0, plain.stderr + waiting.stderr
    assert waiting.losses == plain.losses
    expected, actual = load_saved(tmp_path, "plain"), load_saved(tmp_path, "waiting")
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    assert "lora_unet_blocks_6_mlp_layer2.lora_up.weight" in actual
    done = train_anima([*words, "--blocks_to_swap", "6"])
    assert done.status == 1 and "--blocks_to_swap 6: the model has 7 blocks" in done.stderr
    assert "at most 5 can be swapped" in done.stderr


def test_swapped_model_paths_are_recognised(
    train_anima: Train, train: Train, arguments: list[str], tiny_sd_file: Path
) -> None:
    base, qwen3, vae = arguments[1], arguments[3], arguments[5]
    for flags, message in (
        (["--pretrained_model_name_or_path", str(tiny_sd_file)], "this is an SD 1.x model; use train_network.py"),
        (["--pretrained_model_name_or_path", vae], "so it is not an Anima transformer"),
        (["--qwen3", vae], "is not a Qwen3 text encoder"),
        (["--vae", qwen3], "is not the VAE of Qwen-Image"),
        (["--llm_adapter_path", qwen3], "is not a text adapter"),
    ):
        done = train_anima([*arguments, *flags])
        assert done.status == 1
        assert message in done.stderr
    common = [word for word in arguments[6:] if word not in ("--qwen3_max_token_length", "--t5_max_token_length", "32")]
    done = train([*common, "--pretrained_model_name_or_path", base])
    assert done.status == 1 and "anima_train_network.py" in done.stderr


@pytest.mark.nightly
def test_a_run_with_cached_captions_validates_and_an_8_bit_base_trains_nearly_like_16_bit(
    train_anima: Train, arguments: list[str]
) -> None:
    half = [*arguments, "--mixed_precision", "bf16", "--network_train_unet_only", "--cache_text_encoder_outputs"]
    losses = []
    for flags in ([], ["--fp8_base"]):
        done = train_anima([*half, "--validation_split", "0.3", "--validate_every_n_steps", "1", *flags])
        assert done.status == 0, done.stderr
        assert done.stderr.count("validation after") >= 2
        losses.append(done.losses[-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
