"""zimage_train_network.py on a tiny Z-Image model: a training adapter, and noise levels that resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.running import Finished, small_run
from tests.tiny.zimage import CONFIG, build_tiny_zimage

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_zimage(tmp_path_factory.mktemp("tiny_zimage"), seed=31)


@pytest.fixture
def train_zimage(train: Train) -> Train:
    return partial(train, script="zimage_train_network")


@pytest.fixture
def arguments(tiny_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps."""
    return [*tiny_arguments, *small_run(images, tmp_path, "networks.lora_zimage", "2")]


def test_a_training_adapter_is_merged_and_not_saved(train_zimage: Train, arguments: list[str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for number in range(CONFIG.num_layers):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            stem = f"diffusion_model.layers.{number}.attention.{part}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(2, CONFIG.width, generator=generator)
            adapter[f"{stem}.lora_B.weight"] = torch.randn(CONFIG.width, 2, generator=generator)
    save_file(adapter, tmp_path / "zimage_turbo_training_adapter.safetensors")
    plain = train_zimage([*arguments, "--model_version", "turbo"])
    merged = ["--base_weights", str(tmp_path / "zimage_turbo_training_adapter.safetensors")]
    done = train_zimage([*arguments, "--model_version", "turbo", *merged])
    assert done.status == 0, done.stderr
    assert "which is distilled" in plain.stderr and "which is distilled" not in done.stderr
    assert plain.losses != done.losses
    assert load_file(tmp_path / "out" / "mine.safetensors")[
        "diffusion_model.layers.0.attention.to_q.lora_A.weight"
    ].shape == (4, CONFIG.width)


def test_stratified_levels_of_a_cut_off_distribution_with_rex_resume_exactly(
    train_zimage: Train, arguments: list[str], tmp_path: Path
) -> None:
    words = [
        *arguments, "--num_timestep_buckets", "7", "--min_timestep", "150", "--max_timestep", "850",
        "--preserve_distribution_shape", "--lr_scheduler", "rex", "--lr_warmup_steps", "1",
        "--metadata_arch", "mine", "--metadata_reso", "512,768", "--save_precision", "fp32",
    ]  # fmt: skip
    plain = train_zimage([word for word in words if word not in ("--num_timestep_buckets", "7")])
    whole = train_zimage([*words, "--save_state", "--save_every_n_steps", "1"])
    assert whole.status == plain.status == 0, whole.stderr
    assert "has no effect" not in whole.stderr
    assert whole.losses != plain.losses
    file = tmp_path / "out" / "mine.safetensors"
    expected = load_file(file)
    resumed = train_zimage([*words, "--resume", str(tmp_path / "out" / "mine-step00000001-state")])
    assert resumed.status == 0, resumed.stderr
    actual = load_file(file)
    assert all(torch.equal(actual[key], weight) for key, weight in expected.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["modelspec.architecture"], metadata["modelspec.resolution"]) == ("mine/lora", "512x768")
