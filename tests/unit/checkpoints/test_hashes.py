"""Hashes, compared with those of hand-built file contents."""

import hashlib
import json
import struct
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.hashes import sha256_of_file, sshs_hashes, webui_hash, with_hashes
from library.checkpoints.headers import LENGTH_BYTES, read_header
from library.checkpoints.saving import save_safetensors

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def build_file_content(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, bytes]:
    """Build a safetensors file as (length and header, data), sorted by falling dtype size, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for name in order:
        raw = bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, data


def tensors_of_several_dtypes() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {
        "b.weight": torch.randn(3, 4),
        "a.weight": torch.randn(5).bfloat16(),
        "z.alpha": torch.tensor([4]),
        "a.scale": torch.randn(2),
    }


def test_the_model_hash_covers_the_data_in_file_order() -> None:
    tensors = tensors_of_several_dtypes()
    assert sshs_hashes(tensors, {})[0] == hashlib.sha256(build_file_content(tensors, {})[1]).hexdigest()


def test_the_model_hash_matches_the_data_of_the_written_file(tmp_path: Path) -> None:
    tensors = tensors_of_several_dtypes()
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors, with_hashes(tensors, {"ss_steps": "3", "modelspec.title": "x"}))
    header = read_header(path)
    data = path.read_bytes()[LENGTH_BYTES + header.num_bytes :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_the_legacy_hash_covers_64_kib_at_1_mib_of_a_file_with_only_ss_keys() -> None:
    torch.manual_seed(6)
    tensors = {"w": torch.randn(600, 512)}
    head, data = build_file_content(tensors, {"ss_steps": "3"})
    expected = hashlib.sha256((head + data)[1048576 : 1048576 + 65536]).hexdigest()[:8]
    metadata = {"ss_steps": "3", "modelspec.title": "left out", "sshs_x": "too"}
    assert sshs_hashes(tensors, metadata)[1] == expected


def test_the_legacy_hash_of_a_file_below_1_mib_is_the_hash_of_empty_data() -> None:
    assert sshs_hashes(tensors_of_several_dtypes(), {"ss_steps": "3"})[1] == "e3b0c442"


def test_old_hashes_in_metadata_are_replaced() -> None:
    tensors = tensors_of_several_dtypes()
    fresh = with_hashes(tensors, {"ss_steps": "3"})
    assert with_hashes(tensors, {"ss_steps": "3", "sshs_model_hash": "old", "sshs_legacy_hash": "old"}) == fresh


def test_the_webui_hash_covers_64_kib_at_1_mib(tmp_path: Path) -> None:
    content = bytes(i * 7 % 251 for i in range(1048576 + 70000))
    (tmp_path / "model.ckpt").write_bytes(content)
    assert webui_hash(tmp_path / "model.ckpt") == hashlib.sha256(content[1048576 : 1048576 + 65536]).hexdigest()[:8]
    assert sha256_of_file(tmp_path / "model.ckpt") == hashlib.sha256(content).hexdigest()


def test_the_hashes_of_a_missing_file_and_a_folder_are_placeholders(tmp_path: Path) -> None:
    assert (webui_hash(tmp_path / "no.ckpt"), sha256_of_file(tmp_path / "no.ckpt")) == ("NOFILE", "NOFILE")
    assert (webui_hash(tmp_path), sha256_of_file(tmp_path)) == ("IsADirectory", "IsADirectory")
