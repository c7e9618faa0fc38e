"""FLUX.1 training with cached text features."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.running import Finished
from tests.runs.test_flux_train_network import arguments, tiny_flux_arguments, train_flux  # noqa: F401

Train = Callable[..., Finished]
CACHED = ["--network_train_unet_only", "--cache_text_encoder_outputs"]
ON_DISK = ["--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]


def weights_of(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def test_memory_cache_disk_cache_and_no_cache_train_identically(
    train_flux: Train,  # noqa: F811
    arguments: list[str],  # noqa: F811
    tmp_path: Path,
    images: Path,
) -> None:
    """All runs start from the same file, as new weights would be drawn differently without text encoders."""
    train_flux([*arguments, "--network_train_unet_only", "--max_train_steps", "1", "--output_name", "start"])
    start = ["--network_weights", str(tmp_path / "out" / "start.safetensors")]
    common = [*arguments, *start, "--caption_dropout_rate", "0.3", "--apply_t5_attn_mask"]
    runs = {"plain": ["--network_train_unet_only"], "memory": CACHED, "disk": ON_DISK, "again": ON_DISK}
    for name, options in runs.items():
        done = train_flux([*common, *options, "--output_name", name])
        assert done.status == 0, done.stderr
    plain = weights_of(tmp_path, "plain")
    assert any(not torch.equal(weight, weights_of(tmp_path, "start")[key]) for key, weight in plain.items())
    for name in ("memory", "disk", "again"):
        actual = weights_of(tmp_path, name)
        assert actual.keys() == plain.keys() and all(torch.equal(actual[key], plain[key]) for key in plain)
    assert "text cache: 7 files reused, 0 to encode, 0 stale" in done.stderr

    with np.load(images / "2_thing" / "00_flux_te.npz") as archive:
        entries = {
            name: (archive[name].dtype.name, archive[name].shape) for name in archive.files if name != "captions"
        }
        width_l, width_t5 = entries["l_pooled"][1][0], entries["t5_out"][1][1]
        assert entries == {
            "l_pooled": ("float32", (width_l,)),
            "t5_out": ("float32", (32, width_t5)),
            "txt_ids": ("float32", (32, 3)),
            "t5_attn_mask": (entries["t5_attn_mask"][0], (32,)),
            "apply_t5_attn_mask": ("bool", ()),
        }
        assert bool(archive["apply_t5_attn_mask"])


def test_another_token_limit_encodes_everything_again(
    train_flux: Train,  # noqa: F811
    arguments: list[str],  # noqa: F811
) -> None:
    train_flux([*arguments, *ON_DISK])
    done = train_flux([*arguments, *ON_DISK, "--t5xxl_max_token_length", "24"])
    assert done.status == 0, done.stderr
    assert "7 stale (7 made with other text encoders or settings" in done.stderr
