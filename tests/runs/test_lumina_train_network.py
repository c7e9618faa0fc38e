"""lumina_train_network.py on a tiny Lumina Image 2.0 model: every adapter kind trains, saves and resumes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.running import Finished
from tests.tiny.flux import build_tiny_flux
from tests.tiny.lumina import build_tiny_lumina

Train = Callable[..., Finished]
SYSTEM = "be a good red dog"
CACHED = ["--network_train_unet_only", "--cache_text_encoder_outputs"]
ON_DISK = ["--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]


@pytest.fixture(scope="session")
def tiny_lumina_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_lumina(tmp_path_factory.mktemp("tiny_lumina"), seed=31)


@pytest.fixture
def arguments(tiny_lumina_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    return [
        *tiny_lumina_arguments, "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64",
        "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_lumina", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "3", "--seed",
        "5", "--max_data_loader_n_workers", "0", "--gemma2_max_token_length", "60", "--system_prompt", SYSTEM,
    ]  # fmt: skip


@pytest.fixture
def train_lumina(train: Train) -> Train:
    return partial(train, script="lumina_train_network")


def load_saved(tmp_path: Path, name: str = "mine") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("module", "network_args"),
    [
        ("networks.lora_lumina", []),
        ("networks.lora_lumina", ["split_qkv=True", "rank_dropout=0.1"]),
        ("networks.lora_lumina", ["dora_wd=True", "embedder_dims=[2,2,2]"]),
        ("networks.lora", ["mod_dim=0", "refiner_dim=2", "train_block_indices=1", "loraplus_lr_ratio=4"]),
        ("networks.lora_fa", ["split_qkv=True"]),
        ("networks.dylora", ["unit=2"]),
    ],
    ids=str,
)
def test_every_adapter_kind_trains_and_is_reproducible_by_seed(
    train_lumina: Train, arguments: list[str], tmp_path: Path, module: str, network_args: list[str]
) -> None:
    extra = ["--network_module", module, *(["--network_args", *network_args] if network_args else [])]
    for name in ("a", "b"):
        done = train_lumina([*arguments, *extra, "--output_name", name])
        assert done.status == 0, done.stderr
    a, b = load_saved(tmp_path, "a"), load_saved(tmp_path, "b")
    assert all(torch.equal(a[key], b[key]) for key in a)
    ups = {key: weight for key, weight in a.items() if key.endswith("lora_up.weight")}
    assert {key.split("_")[1] for key in ups} == {"te", "unet"}
    for key, weight in ups.items():
        is_reached = not key.startswith("lora_te_layers_2_")  # the output of Gemma's last layer is not used
        assert weight.isfinite().all() and bool(weight.abs().max() > 0) == is_reached, key


@pytest.mark.nightly
def test_both_layouts_of_a_model_train_the_same(train_lumina: Train, arguments: list[str], tmp_path: Path) -> None:
    common = arguments[arguments.index("--train_data_dir") :]
    assert train_lumina(arguments).status == 0
    first = load_saved(tmp_path)
    for layout in ("whole", "diffusers"):
        model = build_tiny_lumina(tmp_path / layout, seed=31, layout=layout)  # type: ignore[arg-type]
        done = train_lumina([*model, *common, "--output_name", layout])
        assert done.status == 0, done.stderr
        assert "ignoring weights" not in done.stderr
        other = load_saved(tmp_path, layout)
        assert other.keys() == first.keys() and all(torch.equal(other[key], first[key]) for key in first)
    with safe_open(tmp_path / "out" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "lumina2"
    assert metadata["modelspec.architecture"] == "lumina-2/lora"
    assert (metadata["ss_timestep_sampling"], metadata["ss_discrete_flow_shift"]) == ("shift", "6.0")
    assert "ss_guidance_scale" not in metadata and "modelspec.prediction_type" not in metadata


@pytest.mark.nightly
def test_memory_modes_and_caches_do_not_change_results(
    train_lumina: Train, arguments: list[str], tmp_path: Path
) -> None:
    alone = [*arguments, "--network_train_unet_only", "--cache_latents"]
    assert train_lumina([*alone, "--output_name", "plain"]).status == 0
    done = train_lumina([*alone, "--output_name", "other", "--gradient_checkpointing", "--cache_latents_to_disk"])
    assert done.status == 0, done.stderr
    plain, other = load_saved(tmp_path, "plain"), load_saved(tmp_path, "other")
    for key, weight in plain.items():
        torch.testing.assert_close(other[key], weight, rtol=1e-4, atol=1e-6)
    assert any((tmp_path / "data" / "2_thing").glob("*_0064x0064_lumina.npz"))


@pytest.mark.nightly
def test_gradient_checkpointing_of_the_text_encoder_does_not_change_results(
    train_lumina: Train, arguments: list[str], tmp_path: Path
) -> None:
    for name, extra in (("kept", []), ("again", ["--gradient_checkpointing"])):
        assert train_lumina([*arguments, *extra, "--output_name", name]).status == 0
    plain, again = load_saved(tmp_path, "kept"), load_saved(tmp_path, "again")
    for key, weight in plain.items():
        torch.testing.assert_close(again[key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_half_precision_and_8_bit_weights_train(train_lumina: Train, arguments: list[str], tmp_path: Path) -> None:
    half = ["--mixed_precision", "bf16", "--save_precision", "bf16"]
    for name, extra in (("half", []), ("cached", ON_DISK), ("eighth", ["--fp8_base", "--full_bf16"])):
        done = train_lumina([*arguments, *half, *extra, "--output_name", name])
        assert done.status == 0, done.stderr
        ups = [weight for key, weight in load_saved(tmp_path, name).items() if "unet" in key and "lora_up" in key]
        assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in ups)


@pytest.mark.nightly
def test_cached_text_features_train_identically(
    train_lumina: Train, arguments: list[str], tmp_path: Path, images: Path
) -> None:
    """All runs start from the same file, as new weights would be drawn differently without text encoders."""
    train_lumina([*arguments, "--network_train_unet_only", "--max_train_steps", "1", "--output_name", "start"])
    start = ["--network_weights", str(tmp_path / "out" / "start.safetensors")]
    common = [*arguments, *start, "--caption_dropout_rate", "0.3"]
    runs = {"plain": ["--network_train_unet_only"], "memory": CACHED, "disk": ON_DISK, "again": ON_DISK}
    for name, options in runs.items():
        done = train_lumina([*common, *options, "--output_name", name])
        assert done.status == 0, done.stderr
    plain = load_saved(tmp_path, "plain")
    assert any(not torch.equal(weight, load_saved(tmp_path, "start")[key]) for key, weight in plain.items())
    for name in ("memory", "disk", "again"):
        actual = load_saved(tmp_path, name)
        assert actual.keys() == plain.keys() and all(torch.equal(actual[key], plain[key]) for key in plain)
    assert "text cache: 7 files reused, 0 to encode, 0 stale" in done.stderr
    with np.load(images / "2_thing" / "00_lumina_te.npz") as archive:
        entries = {n: (archive[n].dtype.name, archive[n].shape) for n in archive.files if n != "captions"}
    assert entries == {
        "hidden_state": ("float32", (64, 32)),
        "attention_mask": ("int64", (64,)),
        "input_ids": ("int64", (64,)),
    }
    done = train_lumina([*common, *ON_DISK, "--system_prompt", "be bad"])
    assert done.status == 0 and "0 to encode, 7 stale" in done.stderr


def test_training_continues_from_a_split_file(train_lumina: Train, arguments: list[str], tmp_path: Path) -> None:
    split = ["--network_args", "split_qkv=True"]
    assert train_lumina([*arguments, *split]).status == 0
    first = load_saved(tmp_path)
    assert first["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape == (12, 72)
    assert float(first["lora_unet_layers_0_attention_qkv.alpha"]) == 3
    weights = ["--network_weights", str(tmp_path / "out" / "mine.safetensors"), "--dim_from_weights"]
    done = train_lumina([*arguments, *split, *weights, "--output_name", "more"])
    assert done.status == 0, done.stderr
    more = load_saved(tmp_path, "more")
    assert {key: weight.shape for key, weight in more.items()} == {key: weight.shape for key, weight in first.items()}


def test_previews_are_drawn_with_and_without_cached_text(
    train_lumina: Train, arguments: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --n a dog --w 64 --h 48 --s 4 --l 4 --d 1 --ctr 0.5 --rcfg 0.8 --fs 3\n")
    images = []
    for number, extra in enumerate((["--network_train_unet_only"], CACHED)):
        out = tmp_path / f"out{number}"
        done = train_lumina(
            [*arguments, *extra, "--sample_prompts", str(prompts), "--sample_at_first", "--output_dir", str(out)]
        )
        assert done.status == 0, done.stderr
        (image,) = (out / "sample").glob("*.png")
        images.append(image.read_bytes())
    assert images[0] == images[1]


def test_a_checkpoint_of_another_base_model_is_recognised(
    train_lumina: Train, train: Train, arguments: list[str], tiny_sd_file: Path, tmp_path: Path
) -> None:
    flux = build_tiny_flux(tmp_path / "flux", seed=1)
    base = "--pretrained_model_name_or_path"
    for file, message in (
        (str(tiny_sd_file), "this is an SD 1.x model; use train_network.py"),
        (flux[1], "this is a FLUX model; use flux_train_network.py"),
    ):
        done = train_lumina([*arguments, base, file])
        assert done.status == 1 and message in done.stderr
    done = train_lumina([*arguments, "--gemma2", flux[7]])
    assert done.status == 1 and f"--gemma2 {flux[7]} is not a Gemma 2 text encoder" in done.stderr
    common = arguments[6 : arguments.index("--gemma2_max_token_length")]
    done = train([*common, base, arguments[1]])
    assert done.status == 1 and "lumina_train_network.py" in done.stderr
