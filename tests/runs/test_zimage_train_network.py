"""zimage_train_network.py on a tiny Z-Image model: a training adapter, and noise levels that resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.running import Finished, small_run
from tests.tiny.zimage import CONFIG, build_tiny_zimage
from tools import draw

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


@pytest.fixture
def training_adapter(tmp_path: Path) -> str:
    """Write a file in the layout of the published training adapters."""
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for number in range(CONFIG.num_layers):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            stem = f"diffusion_model.layers.{number}.attention.{part}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(2, CONFIG.width, generator=generator)
            adapter[f"{stem}.lora_B.weight"] = torch.randn(CONFIG.width, 2, generator=generator)
    save_file(adapter, tmp_path / "zimage_turbo_training_adapter.safetensors")
    return str(tmp_path / "zimage_turbo_training_adapter.safetensors")


def test_a_training_adapter_is_left_out_of_the_file_and_of_previews(
    train_zimage: Train, tiny_arguments: list[str], arguments: list[str], training_adapter: str, tmp_path: Path
) -> None:
    prompt = "a red cat --w 64 --h 64 --s 2 --d 3"
    (tmp_path / "prompts.txt").write_text(prompt)
    words = [*arguments, "--model_version", "turbo", "--mixed_precision", "no"]
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    plain = train_zimage(words)
    merged = train_zimage([*words, "--output_name", "merged", "--base_weights", training_adapter])
    done = train_zimage([*words, *drawing, "--training_adapter", training_adapter])
    kept = train_zimage(
        [*words, *drawing, "--output_name", "kept", "--training_adapter", f"{training_adapter}:1.0",
         "--sample_with_training_adapter"]
    )  # fmt: skip
    assert done.status == kept.status == merged.status == 0, done.stderr
    assert "which is distilled" in plain.stderr
    assert all("which is distilled" not in run.stderr for run in (merged, done, kept))
    assert plain.losses != done.losses == merged.losses == kept.losses
    out = tmp_path / "out"
    beside, expected = (load_file(out / f"{name}.safetensors") for name in ("mine", "merged"))
    assert beside.keys() == expected.keys()
    assert beside["diffusion_model.layers.0.attention.to_q.lora_A.weight"].shape == (4, CONFIG.width)
    at = tiny_arguments.index("--pretrained_model_name_or_path")
    base = [tiny_arguments[at + 1], *tiny_arguments[:at], *tiny_arguments[at + 2 :], "--model_version", "turbo"]
    drawn = tmp_path / "drawn"
    assert (
        draw.main([*base, "--adapter", str(out / "mine.safetensors"), "--prompt", prompt, "--output", str(drawn)]) == 0
    )
    ((preview,), (other,)) = ((out / "sample").glob(f"{name}_000002_00_*.png") for name in ("mine", "kept"))
    assert pixels(preview) == pixels(drawn / "01_3.png") != pixels(other)


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_training_adapter_of_another_base_model_is_refused_by_name(
    train_zimage: Train, arguments: list[str], tmp_path: Path
) -> None:
    stem, file = "diffusion_model.blocks.0.attn.wq", tmp_path / "krea2_turbo_training_adapter.safetensors"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}, file)
    done = train_zimage([*arguments, "--training_adapter", str(file)])
    assert done.status == 1
    assert f"--training_adapter {file} is an adapter for Krea 2, and the base model is Z-Image" in done.stderr


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
