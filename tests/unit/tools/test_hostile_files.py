"""Tools given an adapter file whose header the safetensors library rejects."""

import json
import struct
from pathlib import Path

import pytest

from tools import check_lora_weights, convert_lora, merge_lora, resize_lora, show_metadata


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return an adapter file with half of a surrogate pair in its metadata."""
    name = "lora_unet_mid_block.lora_down.weight"
    header = {name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}, "__metadata__": {"ss_tag": "\ud800"}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    return path


COMMANDS = {
    "check": (check_lora_weights.main, ["{file}"]),
    "show": (show_metadata.main, ["--model", "{file}"]),
    "resize": (resize_lora.main, ["--model", "{file}", "--save_to", "{out}", "--new_rank", "1"]),
    "convert": (convert_lora.main, ["--model", "{file}", "--save_to", "{out}", "--to", "diffusers"]),
    "merge": (merge_lora.main, ["--models", "{file}", "--ratios", "1", "--save_to", "{out}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_half_a_surrogate_pair_in_the_metadata_is_named(
    name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = COMMANDS[name]
    status = main([word.format(file=file, out=tmp_path / "out.safetensors") for word in words])
    assert status == 1 and "half of a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize("metadata", [[], 0, "", False, [1], "x", 1.5, {"a": 1}], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_metadata_of_another_type_are_named(
    command: str, metadata: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    name = "lora_unet_mid_block.lora_down.weight"
    header = {name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}, "__metadata__": metadata}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    main, words = COMMANDS[command]
    assert main([word.format(file=path, out=tmp_path / "out.safetensors") for word in words]) == 1
    assert (
        f"{path} is not a complete safetensors file: its metadata does not map names to strings"
        in capsys.readouterr().err
    )
