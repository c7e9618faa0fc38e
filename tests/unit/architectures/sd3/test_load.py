"""Every form of a Stable Diffusion 3 checkpoint gives the same weights; other files are refused by name."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.sd3.assembly import build
from library.architectures.sd3.layers import view
from library.architectures.sd3.load import DENOISER_PREFIX, open_loader
from library.architectures.sd3.options import Sd3Options
from library.models.dit_loader import DitLoader
from library.options.ranges import check_ranges
from tests.tiny.sd3 import CONFIGS, build_tiny_sd3


def options_of(path: Path | str | None, **flags: Any) -> Sd3Options:
    options = {"pretrained_model_name_or_path": None if path is None else str(path), **flags}
    assert options.keys() <= Sd3Options.defaults().keys()
    return Sd3Options.from_args(Namespace(**{**Sd3Options.defaults(), **options}))


def open_tiny(path: Path | str | None, **flags: Any) -> DitLoader:
    return open_loader(options_of(path, **flags))[0]


def catch_refusal(path: Path | str | None, **flags: Any) -> str:
    with pytest.raises(ValueError) as refused:
        open_tiny(path, **flags)
    return str(refused.value)


def float_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in module.state_dict().items()}


def encoder_files(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "clip_g", "t5xxl")}


def write_renamed_copy(path: Path, target: Path, change: Any) -> Path:
    """Copy a single file with its names mapped by `change`, and link the tokenizers next to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {new: tensor for key, tensor in load_file(path).items() if (new := change(key)) is not None}
    save_file(tensors, target)
    for folder in ("tokenizer", "tokenizer_3"):
        (target.parent / folder).symlink_to(path.parent / folder)
    return target


def test_text_encoders_in_the_single_file_match_the_separate_files(sd3_file: Path, sd3_without_text: Path) -> None:
    inside = open_tiny(sd3_file).text_encoders()
    separate = open_tiny(sd3_without_text, **encoder_files(sd3_file.parent)).text_encoders()
    assert [type(encoder).__name__ for encoder in inside] == [
        "CLIPTextModelWithProjection",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
    ]
    for name, a, b in zip(("clip_l", "clip_g", "t5xxl"), inside, separate, strict=True):
        in_file = load_file(sd3_file.parent / f"{name}.safetensors")
        assert float_state(a).keys() == float_state(b).keys()
        assert all(torch.equal(float_state(a)[key], float_state(b)[key]) for key in float_state(a))
        loaded = {key.removeprefix("text_model."): tensor for key, tensor in float_state(a).items()}
        assert all(torch.equal(loaded[key.removeprefix("text_model.")], tensor) for key, tensor in in_file.items())


@pytest.mark.parametrize("prefix", [DENOISER_PREFIX, ""])
def test_the_denoiser_loads_with_and_without_its_prefix(sd3_file: Path, tmp_path: Path, prefix: str) -> None:
    path = write_renamed_copy(
        sd3_file, tmp_path / "m" / "a.safetensors", lambda key: key.replace(DENOISER_PREFIX, prefix, 1)
    )
    expected = {
        key.removeprefix(DENOISER_PREFIX): tensor
        for key, tensor in load_file(sd3_file).items()
        if key.startswith(DENOISER_PREFIX)
    }
    actual = float_state(open_tiny(path).denoiser())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_is_recognised_by_its_weights(tmp_path: Path, name: str) -> None:
    options = options_of(build_tiny_sd3(tmp_path / "m", 22, name))
    _, config = open_loader(options)
    assert config == CONFIGS[name]
    version = {"sd3-medium": "medium", "sd3.5-large": "5-large", "sd3.5-medium": "5-medium"}[name]
    metadata = build(options).metadata
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"stable-diffusion-3-{version}/lora"


def test_a_separate_vae_replaces_that_of_the_checkpoint(sd3_file: Path, tmp_path: Path) -> None:
    without = write_renamed_copy(
        sd3_file, tmp_path / "m" / "a.safetensors", lambda key: None if key.startswith("first_stage") else key
    )
    assert "has no VAE" in catch_refusal(without) and "--vae" in catch_refusal(without)
    actual = float_state(open_tiny(without, vae=str(sd3_file.parent / "vae.safetensors")).vae())
    expected = float_state(open_tiny(sd3_file).vae())
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_error_for_a_missing_clip_names_its_flag(sd3_without_text: Path) -> None:
    assert "has no text encoder clip_l" in catch_refusal(sd3_without_text)
    files = encoder_files(sd3_without_text.parent)
    assert "use --clip_g" in catch_refusal(sd3_without_text, clip_l=files["clip_l"])


def test_training_without_t5_is_warned_about(sd3_without_text: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = encoder_files(sd3_without_text.parent)
    del files["t5xxl"]
    with caplog.at_level(logging.WARNING):
        arch = build(options_of(sd3_without_text, **files))
    assert "no T5" in caplog.text and "--t5xxl" in caplog.text
    encoders = arch.load.text_encoders()
    assert len(encoders) == 2 and len(view(encoders, arch.load.denoiser())[0]) == 2
    assert arch.text.max_tokens == 75
    assert "t5_out" not in arch.text.encode(encoders, arch.text.tokenize(["a cat"]))


def test_clip_l_without_a_projection_uses_the_identity(sd3_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd3_file.parent / "clip_l.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_l.safetensors")
    encoder: Any = open_tiny(sd3_file, clip_l=str(tmp_path / "clip_l.safetensors")).text_encoders()[0]
    assert torch.equal(encoder.text_projection.weight, torch.eye(16))


def test_clip_g_without_a_projection_is_refused(sd3_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd3_file.parent / "clip_g.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_g.safetensors")
    message = catch_refusal(sd3_file, clip_g=str(tmp_path / "clip_g.safetensors"))
    assert "clip_g.safetensors" in message and "text_projection.weight" in message


def test_encoders_of_other_models_are_refused(sd3_file: Path) -> None:
    files = encoder_files(sd3_file.parent)
    assert "--clip_l and --clip_g have 16 and 16 pooled features" in catch_refusal(sd3_file, clip_g=files["clip_l"])
    assert "is not a T5 encoder" in catch_refusal(sd3_file, t5xxl=files["clip_l"])
    swapped = catch_refusal(sd3_file, clip_l=files["clip_g"], clip_g=files["clip_l"])
    assert "have 32 and 16 pooled features" in swapped and "not swapped" in swapped


def test_a_path_that_is_not_a_single_file_is_refused(tiny_sd_folder: Path, tmp_path: Path) -> None:
    assert "is a folder; SD3 requires a single file" in catch_refusal(tmp_path)
    assert "--pretrained_model_name_or_path is missing" in catch_refusal(None)
    assert "does not exist" in catch_refusal(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("flag", ["clip_l_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"])
def test_dropout_rates_must_lie_between_0_and_1(sd3_file: Path, flag: str) -> None:
    assert build(options_of(sd3_file)).vary is None
    assert build(options_of(sd3_file, **{flag: 0.5})).vary is not None
    with pytest.raises(ValueError, match=f"--{flag} is 1.5; it is a share"):
        check_ranges(options_of(sd3_file, **{flag: 1.5}))
