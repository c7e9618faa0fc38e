"""Adapter kinds that depend on noise levels or weights train the same with recomputed and swapped blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.models import frozen_base
from tests.running import Finished, make_images
from tests.tiny.bases import BASES

pytestmark = pytest.mark.nightly
KINDS = {
    "T-LoRA on split projections": ["networks.tlora", "--network_args", "split_qkv=True", "tlora_min_rank=2"],
    "OLoRA": ["networks.lora", "--network_args", "init=olora"],
    "GGPO": ["networks.lora", "--network_args", "ggpo_sigma=0.05", "ggpo_beta=0.05"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_and_recomputed_blocks_do_not_change_results(
    train: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(frozen_base, "NUM_STAYING", 1)  # of the two blocks of a tiny model
    make_images(tmp_path / "data" / "1_thing", 2)
    base = BASES["sd3"]
    words = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--network_dim", "4",
        "--max_train_steps", "3", "--seed", "3", "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0",
        "--network_train_unet_only", "--network_module", *KINDS[kind],
    ]  # fmt: skip
    saved = {}
    for name, more in {"plain": [], "saving": ["--gradient_checkpointing", "--blocks_to_swap", "1"]}.items():
        done = train([*words, "--output_name", name, *more], base.script)
        assert done.status == 0, done.stderr
        saved[name] = load_file(tmp_path / "out" / f"{name}.safetensors")
    for key, weight in saved["plain"].items():
        torch.testing.assert_close(saved["saving"][key], weight, rtol=1e-4, atol=1e-5)  # float32 sums in another order
