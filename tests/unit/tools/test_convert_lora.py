"""tools/convert_lora.py and --concat of merge_lora.py, run as commands."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import add_digest, digest_tensors
from library.checkpoints.saving import save_safetensors
from networks import flux_merge_lora, merge_lora, sdxl_merge_lora
from tests.tolerances import FLOAT32_DEEP
from tests.unit.tools import adapter_files
from tests.unit.tools.adapter_files import LINEAR, METADATA, tensors, write
from tools import merge_lora as own
from tools.convert_lora import main


def run(model: Path, save_to: Path, to: str, *more: str) -> int:
    return main(["--model", str(model), "--save_to", str(save_to), "--to", to, *more])


def test_metadata_is_kept_and_the_hashes_match_the_new_file(tmp_path: Path) -> None:
    model, out = write(tmp_path / "a.safetensors", 940), tmp_path / "b.safetensors"
    assert run(model, out, "generic") == 0
    metadata = read_metadata(out)
    model_hash, legacy_hash = sshs_hashes(load_state_dict(out), metadata)
    hashes = {"sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}
    mark = add_digest("tools/convert_lora.py: b.safetensors", digest_tensors(load_state_dict(out)))
    assert metadata == {**METADATA, **hashes, "written_by": mark}


@pytest.mark.parametrize("to", ["generic", "diffusers"])
def test_a_round_trip_gives_the_same_keys_and_changes(tmp_path: Path, to: str) -> None:
    model = write(tmp_path / "a.safetensors", 941)
    assert run(model, tmp_path / "b.safetensors", to) == 0
    assert run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya") == 0
    before, after = load_state_dict(model), load_state_dict(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(after[f"{LINEAR}.lora_up.weight"] * 2, before[f"{LINEAR}.lora_up.weight"])
    assert float(after[f"{LINEAR}.alpha"]) == 4


def test_tensors_that_the_naming_cannot_hold_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "a.safetensors", 942, {f"{LINEAR}.dora_scale": torch.ones(1, 5)})
    assert run(model, tmp_path / "b.safetensors", "diffusers") == 1
    error = capsys.readouterr().err
    assert f"{LINEAR}.dora_scale" in error and "--drop_unsupported" in error
    assert not (tmp_path / "b.safetensors").exists()


def test_tensors_that_the_naming_cannot_hold_are_dropped_on_request_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write(tmp_path / "a.safetensors", 943, {f"{LINEAR}.dora_scale": torch.ones(1, 5)})
    with caplog.at_level("WARNING"):
        assert run(model, tmp_path / "b.safetensors", "diffusers", "--drop_unsupported") == 0
    assert f"dropped keys that the diffusers naming cannot express: {LINEAR}.dora_scale" in caplog.text
    assert not any("dora" in key for key in load_state_dict(tmp_path / "b.safetensors"))


def test_casting_to_a_wider_dtype_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = tensors(944, torch.float16) | {f"{LINEAR}.alpha": torch.tensor(3.0)}
    save_safetensors(tmp_path / "a.safetensors", half)
    with caplog.at_level("INFO"):
        assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers") == 0
    assert "1 modules are written as float32" in caplog.text
    written = load_state_dict(tmp_path / "b.safetensors")
    wide = {key for key, tensor in written.items() if tensor.dtype == torch.float32}
    assert len(wide) == 2 and all("attn2.to_k.lora_" in key for key in wide)


def test_a_file_without_its_base_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"lora_unet_x.lora_down.weight": torch.ones(2, 23), "lora_unet_x.lora_up.weight": torch.ones(9, 2)}
    save_safetensors(tmp_path / "a.safetensors", content)
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "generic") == 1
    assert "base model cannot be recognised from its keys; supported: Anima, FLUX.1, " in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.safetensors", tmp_path / "b.safetensors", "generic") == 1
    assert "none.safetensors does not exist" in capsys.readouterr().err


def peft_folder(folder: Path, modules: list[str], width: int = 8) -> Path:
    """Write a folder as PEFT does: factors under the paths of an unnamed model, alpha in a separate file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(951)
    factors: dict[str, torch.Tensor] = {}
    for module in modules:
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(6, 4, generator=generator)
    save_safetensors(folder / "adapter_model.safetensors", factors)
    settings = {"r": 4, "lora_alpha": 6, "alpha_pattern": {modules[0]: 3}, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


PEFT_MODELS = {
    "unet": (
        ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.proj_in"], 8,
        ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
         "lora_unet_mid_block_attentions_0_proj_in"],
    ),
    "flux in diffusers": (
        ["transformer_blocks.0.ff.net.2", "single_transformer_blocks.3.proj_out"], 3072,
        ["lora_unet_double_blocks_0_img_mlp_2", "lora_unet_single_blocks_3_linear2"],
    ),
    "anima's own model": (
        ["blocks.0.cross_attn.q_proj", "llm_adapter.blocks.0.mlp.0"], 8,
        ["lora_unet_blocks_0_cross_attn_q_proj", "lora_unet_llm_adapter_blocks_0_mlp_0"],
    ),
    "CLIP": (["text_model.encoder.layers.0.mlp.fc1"], 8, ["lora_te_text_model_encoder_layers_0_mlp_fc1"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT_MODELS)
def test_a_peft_folder_is_recognised_by_the_model_that_has_its_modules(tmp_path: Path, kind: str) -> None:
    modules, width, expected = PEFT_MODELS[kind]
    assert run(peft_folder(tmp_path / "saved", modules, width), tmp_path / "out.safetensors", "kohya") == 0
    actual = load_state_dict(tmp_path / "out.safetensors")
    assert {key.partition(".")[0] for key in actual} == set(expected)
    alphas = [float(actual[f"{name}.alpha"]) for name in expected]
    assert alphas == [3.0, 6.0][: len(alphas)]


def test_folders_without_a_known_adapter_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out.safetensors", "kohya") == 1
    assert "is a folder without adapter_model.safetensors" in capsys.readouterr().err
    llama = peft_folder(tmp_path / "llama", ["model.layers.0.self_attn.q_proj"])
    assert run(llama, tmp_path / "out.safetensors", "kohya") == 1
    assert "PEFT wrote it for a model that is none of those known here" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_naming_that_no_program_can_load_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diffusers has no loader for LoRA of HunyuanImage, although it has the model."""
    name = "lora_unet_double_blocks_0_img_mlp_0"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 3584), f"{name}.lora_up.weight": torch.ones(14336, 2)}
    save_safetensors(tmp_path / "a.safetensors", factors)
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers") == 1
    error = capsys.readouterr().err
    assert "--to diffusers: no program reads adapters of HunyuanImage 2.1 in that naming" in error
    assert "kohya and generic are read" in error
    assert not (tmp_path / "b.safetensors").exists()
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "generic") == 0


# --concat of merge_lora.py under its own path and under those of sd-scripts.


def change(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return alpha / rank * up @ down of a module."""
    down, up = (tensors[f"{name}.lora_{end}.weight"].double().flatten(1) for end in ("down", "up"))
    return tensors[f"{name}.alpha"].double() / len(down) * up @ down


@pytest.mark.parametrize("shuffle", [[], ["--shuffle"]])
@pytest.mark.parametrize("script", [merge_lora, sdxl_merge_lora, flux_merge_lora])
def test_every_path_applies_concat_ratios_as_sd_scripts_does(
    tmp_path: Path, script: ModuleType, shuffle: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """sd-scripts multiplies both factors of file i by ratio_i * sqrt(alpha_i / alpha_1), up without the sign."""
    caplog.set_level("INFO")
    names = ("lora_unet_double_blocks_0_img_mlp_0", "lora_unet_double_blocks_1_img_attn_qkv")
    generator, files, ratios = torch.Generator().manual_seed(87), [], (1.41, -0.7)
    for path, rank, alpha in ((tmp_path / "a.safetensors", 4, 2.0), (tmp_path / "b.safetensors", 6, 3.5)):
        tensors = {f"{name}.lora_down.weight": torch.randn(rank, 9, generator=generator) for name in names}
        tensors.update({f"{name}.lora_up.weight": torch.randn(12, rank, generator=generator) for name in names})
        files.append({**tensors, **{f"{name}.alpha": torch.tensor(alpha) for name in names}})
        save_safetensors(path, files[-1], {})
    words = ["--models", *(str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")), *shuffle]
    out = tmp_path / "m.safetensors"
    words += ["--ratios", *map(str, ratios), "--concat", "--save_to", str(out)]
    assert script.main(words) == 0
    assert "act as in sd-scripts: as 0.99, -0.24 if the ranks are equal" in caplog.text  # r |r| / 2
    for name in names:
        scales = [ratio * (float(f[f"{name}.alpha"]) / 2.0) ** 0.5 for f, ratio in zip(files, ratios, strict=True)]
        theirs = {
            f"{name}.lora_down.weight": torch.cat(
                [s * f[f"{name}.lora_down.weight"] for s, f in zip(scales, files, strict=True)]
            ),
            f"{name}.lora_up.weight": torch.cat(
                [abs(s) * f[f"{name}.lora_up.weight"] for s, f in zip(scales, files, strict=True)], 1
            ),
            f"{name}.alpha": torch.tensor(2.0),
        }
        torch.testing.assert_close(change(load_state_dict(out), name), change(theirs, name), **FLOAT32_DEEP)


def test_shuffled_ranks_are_in_another_order_in_each_file(tmp_path: Path) -> None:
    """Rows of one file are not next to each other, which some users want in order to hide the training data."""
    files = [adapter_files.write(tmp_path / f"{seed}.safetensors", seed) for seed in (88, 89)]
    downs = []
    for out, shuffle in (("plain", []), ("one", ["--shuffle"]), ("two", ["--shuffle"])):
        path = tmp_path / f"{out}.safetensors"
        assert own.main(["--models", *map(str, files), "--concat", *shuffle, "--save_to", str(path)]) == 0
        tensors = load_state_dict(path)
        downs.append(torch.cat([t.flatten() for key, t in tensors.items() if key.endswith("lora_down.weight")]))
        for name in (adapter_files.LINEAR, adapter_files.CLIP):
            expected = sum(change(load_state_dict(file), name) for file in files)
            torch.testing.assert_close(change(tensors, name), expected, **FLOAT32_DEEP)
    assert not any(torch.equal(a, b) for a, b in ((downs[0], downs[1]), (downs[1], downs[2])))  # 1 in 8! ** 3 each
    assert torch.equal(*(down.sort().values for down in downs[:2]))
