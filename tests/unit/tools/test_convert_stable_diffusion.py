"""tools/convert_stable_diffusion.py, under its own path and that of sd-scripts, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.architectures.sd import layouts
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from tests.tiny.sd import build_tiny_sd
from tools import convert_diffusers20_original_sd, convert_stable_diffusion

pytestmark = pytest.mark.slow


def convert(*arguments: object) -> int:
    return convert_stable_diffusion.main([str(argument) for argument in arguments])


def assert_same_weights(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Assert that every weight has its name and shape and is cast but otherwise unchanged."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == dtype
        assert torch.equal(actual[key], tensor.to(dtype)), key


def state_of(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (path for path in (folder / part).iterdir() if path.suffix in (".safetensors", ".bin"))
    return load_state_dict(file)


@pytest.fixture(params=[False, True], ids=["sd1", "sd2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bool, Path, Path]:
    """Return (is SD 2.x, a folder, a file of the same weights)."""
    folder = build_tiny_sd(tmp_path / "folder", 91, is_v2=request.param)
    return request.param, folder, build_tiny_sd(tmp_path / "file", 91, "safetensors", is_v2=request.param)


def test_a_folder_is_converted_to_a_file_with_the_same_weights(model: tuple[bool, Path, Path], tmp_path: Path) -> None:
    is_v2, folder, file = model
    out = tmp_path / "out.safetensors"
    assert convert(folder, out, "--metadata", "{'name': 'mine'}", "--bf16") == 0
    mark = "tools/convert_stable_diffusion.py: out.safetensors"
    saved = read_metadata(out)
    assert saved.pop("written_by").startswith(f"{mark} #") and saved == {"name": "mine"}
    actual, expected = load_state_dict(out), load_state_dict(file)
    if is_v2:  # unused weights are made up: a third layer, the projection, the temperature
        prefix, num_layers = "cond_stage_model.model.", 2
        last, ones = actual.pop(f"{prefix}logit_scale"), actual.pop(f"{prefix}text_projection")
        assert float(last) == 1 and torch.equal(ones, torch.ones(32, 32, dtype=torch.bfloat16))
        assert not any(f".resblocks.{num_layers}." in key for key in actual)  # real checkpoints have 23 and get a 24th
        del expected[f"{prefix}logit_scale"]
    assert_same_weights(actual, expected, torch.bfloat16)


def test_the_layer_that_sd2_does_not_use_is_a_copy_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layouts, "LAST_LAYER", "transformer.resblocks.1.")
    monkeypatch.setattr(layouts, "ONE_MORE", "transformer.resblocks.2.")
    assert convert(build_tiny_sd(tmp_path / "v2", 92, is_v2=True), tmp_path / "out.ckpt", "--v2") == 0
    actual = load_state_dict(tmp_path / "out.ckpt")
    last = {key: tensor for key, tensor in actual.items() if ".resblocks.2." in key}
    assert len(last) == 12
    assert all(torch.equal(tensor, actual[key.replace(".2.", ".1.")]) for key, tensor in last.items())


def test_a_file_is_converted_to_a_folder_that_diffusers_loads(model: tuple[bool, Path, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    is_v2, folder, file = model
    out = tmp_path / "out"
    assert convert(file, out, "--reference_model", folder, "--use_safetensors", "--fp16") == 0
    for part in ("unet", "vae", "text_encoder"):
        assert_same_weights(state_of(out, part), state_of(folder, part), torch.float16)
    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert pipeline.unet.config.use_linear_projection == is_v2 and pipeline.unet.config.sample_size == 8
    assert (out / "tokenizer" / "vocab.json").read_bytes() == (folder / "tokenizer" / "vocab.json").read_bytes()
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"


def test_projections_of_sd2_are_convolutions_unless_matrices_are_requested(tmp_path: Path) -> None:
    """sd-scripts writes convolutions; the flag or the reference's configuration asks for Stability's matrices."""
    folder = build_tiny_sd(tmp_path / "folder", 93, is_v2=True)
    (folder / "unet" / "config.json").unlink()
    file = build_tiny_sd(tmp_path / "file", 93, "ckpt", is_v2=True)
    key = "down_blocks.0.attentions.0.proj_in.weight"
    for out, flags, num_sides in (("plain", [], 4), ("linear", ["--unet_use_linear_projection"], 2)):
        assert convert(file, tmp_path / out, "--reference_model", folder, *flags) == 0
        assert (tmp_path / out / "unet" / "diffusion_pytorch_model.bin").is_file()
        assert state_of(tmp_path / out, "unet")[key].dim() == num_sides
        config = json.loads((tmp_path / out / "unet" / "config.json").read_text())
        assert config["use_linear_projection"] == (num_sides == 2)
        parts = convert_stable_diffusion.open_source(str(tmp_path / out), None, None).parts
        converted = dict(layouts.to_single_file("sd2", parts, torch.float32))  # has matrices in either case
        assert converted["model.diffusion_model.input_blocks.1.1.proj_in.weight"].dim() == 2


def test_rewriting_a_file_keeps_unknown_tensors_and_continues_its_step_count(tmp_path: Path) -> None:
    file = build_tiny_sd(tmp_path / "file", 94, "ckpt")
    content = torch.load(file, weights_only=True)
    state = {key.replace(".text_model.", "."): tensor for key, tensor in content["state_dict"].items()}
    state |= {
        "model_ema.decay": torch.tensor(0.5),
        "cond_stage_model.transformer.embeddings.position_ids": torch.arange(7),
    }
    torch.save({"state_dict": state, "epoch": 2, "global_step": 7}, file)
    out = tmp_path / "out.ckpt"
    assert convert(file, out, "--epoch", 1, "--global_step", 30, "--save_precision_as", "fp16") == 0
    written = torch.load(out, weights_only=True)
    assert (written["epoch"], written["global_step"]) == (3, 37)
    actual = written["state_dict"]
    assert torch.equal(actual.pop("cond_stage_model.transformer.text_model.embeddings.position_ids"), torch.arange(7))
    assert actual.pop("model_ema.decay").dtype == torch.float32
    assert_same_weights(actual, content["state_dict"], torch.float16)


def test_a_variant_of_a_folder_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = build_tiny_sd(tmp_path / "a", 95), build_tiny_sd(tmp_path / "b", 96)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        state = load_state_dict(other / part / f"{stem}.safetensors")
        save_safetensors(folder / part / f"{stem}.ema.safetensors", state)
    out, file = tmp_path / "out.safetensors", build_tiny_sd(tmp_path / "c", 96, "safetensors")
    assert convert_diffusers20_original_sd.main([str(folder), str(out), "--variant", "ema"]) == 0
    assert_same_weights(load_state_dict(out), load_state_dict(file))
    assert convert(folder, out, "--variant", "fp16") == 1
    assert "--variant fp16 is in the name of no weight file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{file}", "{tmp}/v1.5", "--reference_model", "{folder}"], "ends in .5: a file ends in one of"),
        (["{file}", "{folder}", "--reference_model", "{folder}"], "not a model that tools/convert"),
        (["{file}", "{tmp}/new", "--reference_model", "{tmp}"], "has no scheduler/scheduler_config.json"),
        (["{file}", "{tmp}/new.ckpt", "--v2"], "this is an SD 1.x model; remove --v2"),
        (["{file}", "{tmp}/new.ckpt", "--v1", "--v2"], "--v1 and --v2 exclude each other"),
        (["{file}", "{tmp}/new.ckpt", "--variant", "fp16"], "is a file; remove it"),
        (["{folder}", "{tmp}/new.safetensors", "--metadata", "{'a': 1}"], "is not a mapping of strings"),
        (["{sdxl}", "{tmp}/new.safetensors"], "this is an SDXL model; this command supports only SD 1.x and SD 2.x"),
        (["{tmp}/none.ckpt", "{tmp}/new.safetensors"], "none.ckpt does not exist"),
    ],
)
def test_impossible_conversions_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_sdxl_folder: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = build_tiny_sd(tmp_path / "folder", 97), build_tiny_sd(tmp_path / "file", 97, "ckpt")
    before = sorted(tmp_path.rglob("*"))
    names = {"{tmp}": tmp_path, "{folder}": folder, "{file}": file, "{sdxl}": tiny_sdxl_folder}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert convert(*words) == 1
    assert expected in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_options_without_effect_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, file = build_tiny_sd(tmp_path / "folder", 98), build_tiny_sd(tmp_path / "file", 98, "safetensors")
    assert convert(folder, tmp_path / "a.safetensors", "--use_safetensors", "--epoch", 3) == 0
    assert convert(folder, tmp_path / "a.ckpt", "--metadata", "{}") == 0
    assert convert(file, tmp_path / "a", "--reference_model", folder, "--global_step", 3) == 0
    messages = [
        record.message for record in caplog.records if "has no effect" in record.message or "have no" in record.message
    ]
    assert [message.split()[0] for message in messages] == [
        "--use_safetensors",
        "--epoch",
        "--metadata",
        "--global_step",
    ]
