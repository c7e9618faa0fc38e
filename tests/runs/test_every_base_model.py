"""Every base model from images to files, with its own options: training, continuing, caches and previews."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from tests.running import Finished, small_run
from tests.tiny.base import Base
from tests.tiny.bases import BASES

UPS = ("lora_up.weight", "lora_B.weight")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
IN_TEXT_CACHE = {  # what sd-scripts reads: base model -> end of the name, arrays and their shapes
    "anima": ("_anima_te.npz", {"prompt_embeds": (32, 40), "t5_input_ids": (32,), "caption_dropout_rate": ()}),
    "flux": ("_flux_te.npz", {"l_pooled": (32,), "t5_out": (32, 32), "txt_ids": (32, 3), "t5_attn_mask": (32,)}),
    "chroma": ("_flux_te.npz", {"l_pooled": (77, 1), "t5_out": (32, 32), "txt_ids": (32, 3), "t5_attn_mask": (32,)}),
    "lumina": ("_lumina_te.npz", {"hidden_state": (32, 32), "attention_mask": (32,), "input_ids": (32,)}),
}


# The others repeat what these show.
SLOW = ("flux", "flux_2", "hunyuan_image", "krea2", "lumina", "zimage")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=() if n in SLOW else pytest.mark.nightly) for n in BASES])
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


@pytest.fixture(scope="module")
def model(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return base.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(
    train: Callable[..., Finished], base: Base, model: list[str], images: Path, tmp_path: Path
) -> Callable[..., dict[str, Tensor]]:
    """Return `run(name, ...)`, which trains two steps and returns the tensors of the file."""

    def start(name: str, *more: str) -> dict[str, Tensor]:
        small = small_run(images, tmp_path, base.module, "2")
        named = ["--output_dir", str(tmp_path), "--output_name", name, "--no_report"]
        train([*model, *small, *named, *more], script=base.script).ok()
        return load_state_dict(tmp_path / f"{name}.safetensors")

    return start


def test_its_own_network_arguments_train_every_module_and_continue(
    run: Callable[..., dict[str, Tensor]], base: Base, tmp_path: Path
) -> None:
    arguments = [f"{name}={value}" for name, value in base.everything.items()]
    words = ["--network_args", *arguments, "loraplus_lr_ratio=4"]
    first, again = run("a", *words), run("b", *words)
    assert all(torch.equal(first[key], again[key]) for key in first)
    ups = {key: tensor for key, tensor in first.items() if key.endswith(UPS)}
    assert all(tensor.isfinite().all() for tensor in ups.values())
    still = {key for key, tensor in ups.items() if tensor.abs().max() == 0}
    assert all(re.search(base.unused, key) for key in still), still
    assert any(key.startswith("lora_te") for key in ups) == base.adapts_text_encoders
    if base.name != "sd2":  # whose names here are those of a run with --v_parameterization
        written = read_metadata(tmp_path / "a.safetensors")
        assert written["ss_base_model_version"] == base.written[0]
        assert written["modelspec.architecture"] == f"{base.written[1]}/lora"
    path = ["--network_weights", str(tmp_path / "a.safetensors"), "--dim_from_weights"]
    more = run("more", *words, *path, "--learning_rate", "1e-12")
    assert more.keys() == first.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(more[key], tensor, rtol=0, atol=1e-7)


@pytest.mark.nightly
def test_caches_and_gradient_checkpointing_do_not_change_results(
    run: Callable[..., dict[str, Tensor]], base: Base, images: Path, tmp_path: Path
) -> None:
    """All runs start from one file, as new weights would be drawn differently without text encoders."""
    run("start", "--network_train_unet_only")
    alone = ["--network_train_unet_only", "--network_weights", str(tmp_path / "start.safetensors")]
    plain = run("plain", *alone, "--cache_latents")
    disk = ["--cache_latents_to_disk", "--gradient_checkpointing"]
    disk += ["--cache_text_encoder_outputs_to_disk"] if base.caches_text else []
    first, again = run("first", *alone, *disk), run("again", *alone, *disk)
    for key, tensor in plain.items():
        torch.testing.assert_close(first[key], tensor, **CLOSE)
        assert torch.equal(first[key], again[key])
    if base.adapts_text_encoders:
        kept, recomputed = run("kept"), run("recomputed", "--gradient_checkpointing")
        for key, tensor in kept.items():
            torch.testing.assert_close(recomputed[key], tensor, **CLOSE)
    if base.name in IN_TEXT_CACHE:
        end, shapes = IN_TEXT_CACHE[base.name]
        with np.load(images / "2_thing" / f"00{end}") as file:
            assert {name: file[name].shape for name in shapes} == shapes


def test_every_release_draws_a_preview_which_training_does_not_notice(
    run: Callable[..., dict[str, Tensor]], base: Base, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 64 --s 2 --d 1\n")
    plain = run("plain")
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"]
    for number, release in enumerate(((), *(release for release in base.releases if "dev" not in release))):
        shown = run(f"shown{number}", *drawing, *release)
        assert len(list((tmp_path / "sample").glob(f"shown{number}*.png"))) == 1
        assert release or all(torch.equal(shown[key], tensor) for key, tensor in plain.items())
