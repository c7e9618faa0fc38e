"""The log line about a saved file and the programs that read it."""

import logging
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from library.architectures.specs import list_specs
from library.checkpoints.saving import save_safetensors
from library.options.output.saving import HubOptions
from library.options.train import TrainOptions
from library.training.saving.checkpoints import Writer
from library.training.saving.hub import Uploads
from library.training.saving.names import Names
from library.training.saving.readers import readers_line
from library.training.saving.schedule import Schedule
from networks.core.protocol import AdoptedNetwork

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LOKR = {f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lokr_w2": torch.ones(3, 4), f"{NAME}.alpha": torch.ones(())}


def test_a_third_party_lokr_file_is_recognised(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", LOKR)
    assert readers_line(list_specs(), tmp_path / "x.safetensors") == (
        "3 keys, all used by ComfyUI, Forge, A1111-style, stable-diffusion.cpp; none by diffusers"
    )


@pytest.mark.parametrize(("limit", "expected"), [(0.0, "all used by ComfyUI"), (0.1, "none by ComfyUI")])
def test_the_limit_of_an_oft_is_read_from_the_file(tmp_path: Path, limit: float, expected: str) -> None:
    tensors = {f"{NAME}.oft_blocks": torch.ones(5, 64, 64), f"{NAME}.alpha": torch.tensor(limit)}
    save_safetensors(tmp_path / "x.safetensors", tensors)
    assert expected in (readers_line(list_specs(), tmp_path / "x.safetensors") or "")


def test_other_formats_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"anything": torch.ones(2)})
    assert readers_line(list_specs(), tmp_path / "x.safetensors") is None
    assert readers_line(list_specs(), tmp_path / "x.ckpt") is None


def test_a_file_that_cannot_be_read_back_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"none")
    assert "cannot be read back" in (readers_line(list_specs(), tmp_path / "x.safetensors") or "")
    assert "cannot be read back" in (readers_line(list_specs(), tmp_path / "absent.safetensors") or "")


class Lokr(torch.nn.Module):
    """A network that only writes a file."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        save_safetensors(file, LOKR, metadata)


def test_the_line_is_logged_once_per_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: Future[dict[str, str]] = Future()
    done.set_result({})
    writer = Writer(
        options=TrainOptions(),
        is_main=True,
        names=Names(tmp_path, "x", "safetensors"),
        schedule=Schedule(None, None, None, None, 1),
        network=AdoptedNetwork(Lokr()),
        architecture={},
        metadata={},
        base_files=done,
        saved_weights=nullcontext,
        specs=list_specs(),
        write_state=lambda folder, step, epoch, done: None,
        uploads=Uploads(HubOptions()),
    )
    with caplog.at_level(logging.INFO, logger="library.training.saving.checkpoints"):
        writer.write(tmp_path / "one.safetensors", 1, 1)
        writer.write(tmp_path / "two.safetensors", 2, 1)
    lines = [record.getMessage() for record in caplog.records if "keys" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("one.safetensors: 3 keys, all used by ComfyUI")
