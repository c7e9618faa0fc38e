"""sd-scripts' options of block swapping on a run's command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.models import frozen_base
from tests.running import Finished, make_images
from tests.tiny.bases import BASES


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training of SD3, which sd-scripts refuses to swap without copying back, without gradient checkpointing."""
    monkeypatch.setattr(frozen_base, "NUM_STAYING", 1)  # of the two blocks of a tiny model
    make_images(tmp_path / "data" / "1_thing", 2)
    return [
        *BASES["sd3"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--resolution", "64",
        "--caption_extension", ".txt", "--output_dir", str(tmp_path / "out"), "--network_module",
        "networks.lora_generic", "--network_train_unet_only", "--network_dim", "4", "--max_train_steps", "2",
        "--seed", "3", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


def test_a_ring_of_any_size_trains_the_same_and_the_other_options_warn_once(
    train: Callable[..., Finished], tmp_path: Path, words: list[str]
) -> None:
    words = [*words, "--guidance_loss", "2"]  # whose second pass reads the blocks once more
    swap = ["--blocks_to_swap", "1", "--block_swap_h2d_only", "--use_pinned_memory_for_block_swap"]
    for size in ("1", "3"):
        done = train([*words, "--output_name", size, *swap, "--block_swap_ring_size", size], BASES["sd3"].script)
        assert done.status == 0, done.stderr
        log = " ".join(done.stderr.split())
        assert log.count("--block_swap_h2d_only has no effect: swapped blocks are frozen and always only copied") == 1
        assert log.count("--use_pinned_memory_for_block_swap has no effect: swapped blocks are in pinned memory") == 1
        assert "--block_swap_ring_size has no effect" not in log
    one, three = (load_file(tmp_path / "out" / f"{size}.safetensors") for size in ("1", "3"))
    assert any(weight.abs().sum() for key, weight in one.items() if "lora_up" in key)
    assert one.keys() == three.keys() and all(torch.equal(three[key], weight) for key, weight in one.items())


@pytest.mark.parametrize("size", ["0", "-1"])
def test_a_ring_without_a_slot_is_refused(train: Callable[..., Finished], words: list[str], size: str) -> None:
    done = train([*words, "--blocks_to_swap", "1", "--block_swap_ring_size", size], BASES["sd3"].script)
    assert done.status == 1 and f"--block_swap_ring_size is {size}; use at least 1" in done.stderr
