"""Every feature that works beside a step, once on the simulated GPU: no faults, and the same file as where it is off.

Other base models and combinations are in the slow tests of this folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.memory.offload import encoders
from tests.ranks import Job
from tests.running import Finished, make_images
from tests.runs.test_leco import PAIRS
from tests.runs.test_pairs import PREFERENCES, SLIDER, write_dataset
from tests.simulated_gpu.ranks import run_ranks
from tests.simulated_gpu.test_runs import OFFLOADED, Run, assert_same, run, waits
from tests.tiny.bases import BASES

__all__ = ["run", "waits"]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]

BASE = "zimage"
NEWEST = ("krea2", "moss_image", "qwen_image_21", "zimage")


def learned(folder: Path, name: str = "mine") -> dict[str, Any]:
    """Return the tensors of an adapter that learned something."""
    tensors = load_file(folder / f"{name}.safetensors")
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_up" in key or "lora_B" in key)
    return tensors


@pytest.mark.parametrize("name", NEWEST)
def test_the_newest_base_models_swap_and_offload(run: Run, name: str, tmp_path: Path) -> None:
    done = run(name, "--cache_latents", "--blocks_to_swap", BASES[name].blocks_to_swap, *OFFLOADED, "--selftest")
    assert "(pinned): they are copied while others compute" in done.stderr
    assert "equal those of the plain mode" in done.stderr
    learned(tmp_path / "out")


def test_averages_and_compiled_blocks_have_no_faults(run: Run, tmp_path: Path) -> None:
    run(BASE, "--cache_latents")
    run(BASE, "--cache_latents", "--ema_decay", "0.5", folder="ema")
    swapped = ["--gradient_checkpointing", "--blocks_to_swap", BASES[BASE].blocks_to_swap]
    run(BASE, "--cache_latents", "--compile", "--compile_backend", "aot_eager", *swapped, folder="compiled")
    plain = learned(tmp_path / "out")
    averaged, compiled = learned(tmp_path / "ema"), learned(tmp_path / "compiled")
    assert any(not torch.equal(averaged[key], tensor) for key, tensor in plain.items())
    for key, tensor in plain.items():
        torch.testing.assert_close(compiled[key].float(), tensor.float(), rtol=0.1, atol=2e-3)  # bf16 in another order


@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=" ".join)
def test_pairs_of_images_have_no_faults(run: Run, words: tuple[str, str], tmp_path: Path) -> None:
    make_images(tmp_path / "preferred", 4, seed=4)
    make_images(tmp_path / "rejected", 4, seed=5)
    write_dataset(tmp_path, "")
    dataset = ["--train_data_dir", "", "--dataset_config", str(tmp_path / "data.toml")]
    run(BASE, *dataset, "--cache_latents", *words)
    learned(tmp_path / "out")


def test_concepts_from_prompts_alone_have_no_faults(train: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.toml").write_text(PAIRS)
    words = [
        *BASES["sd"].build(tmp_path / "model"), "--prompts_file", str(tmp_path / "pairs.toml"), "--output_dir",
        str(tmp_path), "--output_name", "mine", "--learning_rate", "1e-2", "--max_train_steps", "2",
        "--max_denoising_steps", "2", "--seed", "5", "--mixed_precision", "bf16", "--no_report",
    ]  # fmt: skip
    done: Finished = train(words, script="train_leco")
    assert done.status == 0, done.stderr
    learned(tmp_path)


def test_streamed_text_encoders_have_no_faults(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "MARGIN_BYTES", 1 << 40)  # nothing fits
        patch.setattr(encoders, "count_streamed_bytes", lambda encoder: 0)  # of few layers, two take as much as all
        done = run("flux", "--cache_latents")
    assert "its layers are streamed from main memory" in done.stderr
    run("flux", "--cache_latents", folder="plain")
    assert_same(tmp_path / "out", tmp_path / "plain")


def test_previews_without_a_training_adapter_have_no_faults(run: Run, tmp_path: Path) -> None:
    run(BASE, "--cache_latents")
    save_file(learned(tmp_path / "out"), tmp_path / "trainer.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    beside = ["--training_adapter", str(tmp_path / "trainer.safetensors")]
    run(BASE, "--cache_latents", *beside, *drawing, folder="beside")
    assert list((tmp_path / "beside" / "sample").glob("*.png"))
    learned(tmp_path / "beside")


def test_two_gpus_share_a_base_model_without_faults(tmp_path: Path) -> None:
    make_images(tmp_path / "data" / "1_thing", 4, seed=91)
    words = [
        *BASES[BASE].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--network_module", BASES[BASE].module, "--network_dim", "4", "--learning_rate",
        "1e-2", "--seed", "5", "--max_data_loader_n_workers", "0", "--max_train_steps", "2", "--output_name", "mine",
        "--no_report", "--cache_latents", "--output_dir", str(tmp_path), "--network_train_unet_only",
        "--cache_text_encoder_outputs",
    ]  # fmt: skip
    ((first, second),) = run_ranks([Job(words, 2, str(tmp_path), script="zimage_train_network")], tmp_path)
    for rank in (first, second):
        assert rank.status == 0, rank.said
        assert rank.gave["faults"] == [], json.dumps(rank.gave)
    learned(tmp_path)
