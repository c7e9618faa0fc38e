"""tools/convert_lora.py as it is typed."""

from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict, read_metadata, save_safetensors
from library.checkpoints.hashes import sshs_hashes
from tests.unit.tools.adapter_files import LINEAR, METADATA, tensors, write
from tools import convert_lora
from tools.convert_lora import main


def run(model: Path, save_to: Path, to: str, *more: str) -> int:
    return main(["--model", str(model), "--save_to", str(save_to), "--to", to, *more])


def test_metadata_is_kept_and_the_hashes_are_those_of_the_new_file(tmp_path: Path) -> None:
    model, out = write(tmp_path / "a.safetensors", 940), tmp_path / "b.safetensors"
    assert run(model, out, "generic") == 0
    metadata = read_metadata(out)
    model_hash, legacy_hash = sshs_hashes(load_state_dict(out), metadata)
    assert metadata == {**METADATA, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}


@pytest.mark.parametrize("to", ["generic", "diffusers"])
def test_there_and_back_gives_the_same_keys_and_changes(tmp_path: Path, to: str) -> None:
    model = write(tmp_path / "a.safetensors", 941)
    assert run(model, tmp_path / "b.safetensors", to) == 0
    assert run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya") == 0
    before, after = load_state_dict(model), load_state_dict(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(after[f"{LINEAR}.lora_up.weight"] * 2, before[f"{LINEAR}.lora_up.weight"])
    assert float(after[f"{LINEAR}.alpha"]) == 4


def test_what_the_naming_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "a.safetensors", 942, {f"{LINEAR}.dora_scale": torch.ones(1, 5)})
    assert run(model, tmp_path / "b.safetensors", "diffusers") == 1
    said = capsys.readouterr().err
    assert f"{LINEAR}.dora_scale" in said and "--drop_unsupported" in said
    assert not (tmp_path / "b.safetensors").exists()


def test_it_is_left_out_on_request_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write(tmp_path / "a.safetensors", 943, {f"{LINEAR}.dora_scale": torch.ones(1, 5)})
    with caplog.at_level("WARNING"):
        assert run(model, tmp_path / "b.safetensors", "diffusers", "--drop_unsupported") == 0
    assert f"left out, the diffusers naming has no place for them: {LINEAR}.dora_scale" in caplog.text
    assert not any("dora" in key for key in load_state_dict(tmp_path / "b.safetensors"))


def test_widening_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = tensors(944, torch.float16) | {f"{LINEAR}.alpha": torch.tensor(3.0)}
    save_safetensors(tmp_path / "a.safetensors", half)
    with caplog.at_level("INFO"):
        assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers") == 0
    assert "1 modules are written as float32" in caplog.text
    written = load_state_dict(tmp_path / "b.safetensors")
    wide = {key for key, tensor in written.items() if tensor.dtype == torch.float32}
    assert len(wide) == 2 and all("attn2.to_k.lora_" in key for key in wide)


def test_a_base_model_without_a_table_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [table for table in convert_lora.all_tables() if table.base != "lumina"]
    monkeypatch.setattr(convert_lora, "all_tables", lambda: others)
    name = "lora_unet_noise_refiner_0_attention_qkv"
    content = {f"{name}.lora_down.weight": torch.ones(2, 2304), f"{name}.lora_up.weight": torch.ones(9, 2)}
    save_safetensors(tmp_path / "a.safetensors", content)
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "generic") == 1
    assert "is for Lumina Image 2.0, which is not supported yet; supported: " in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.safetensors", tmp_path / "b.safetensors", "generic") == 1
    assert "none.safetensors does not exist" in capsys.readouterr().err
