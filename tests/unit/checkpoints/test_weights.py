"""Checkpoints that are read one tensor at a time."""

import json

import pytest
import torch
from safetensors.torch import save_file

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.model_lookup import find_model
from library.checkpoints.weights import fingerprint, open_weights

GENERATOR = torch.Generator().manual_seed(71)
TENSORS = {
    "float": torch.randn(3, 5, generator=GENERATOR),
    "half": torch.randn(7, generator=GENERATOR).half(),
    "bf16": torch.randn(2, 3, 4, generator=GENERATOR).bfloat16(),
    "fp8": torch.randn(9, generator=GENERATOR).to(torch.float8_e4m3fn),
    "scalar": torch.randn((), generator=GENERATOR),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(6)[None],
    "flag": torch.tensor([True, False, True]),
}


def assert_contains_all(weights, tensors=TENSORS):
    assert dict(weights.shapes) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        actual = weights.read(name)
        assert actual.dtype == tensor.dtype
        assert actual.view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.ndim else actual == tensor


def test_every_dtype_of_a_safetensors_file_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"note": "metadata is no tensor"})
    assert_contains_all(open_weights(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
def test_every_dtype_of_a_pickle_is_read(tmp_path, suffix):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / f"a.{suffix}")
    assert_contains_all(open_weights(tmp_path / f"a.{suffix}"))


def test_a_pickle_written_by_torch_before_1_6_is_read(tmp_path):
    """This format cannot be memory-mapped and has no float8."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "fp8"}
    torch.save(tensors, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    assert_contains_all(open_weights(tmp_path / "a.ckpt"), tensors)


def test_tensors_that_are_read_are_copies(tmp_path):
    """Writing to a tensor changes neither the file nor later reads."""
    for name in ("a.safetensors", "a.ckpt"):
        save_file(TENSORS, tmp_path / name) if name.endswith("s") else torch.save(TENSORS, tmp_path / name)
        weights = open_weights(tmp_path / name)
        weights.read("float").zero_()
        assert torch.equal(weights.read("float"), TENSORS["float"])


def test_sharded_files_are_read_as_one_checkpoint(tmp_path):
    names = sorted(TENSORS)
    halves = {"m-00001-of-00002.safetensors": names[:3], "m-00002-of-00002.safetensors": names[3:]}
    for file, keys in halves.items():
        save_file({key: TENSORS[key] for key in keys}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}}))
    assert_contains_all(open_weights(index))
    assert_contains_all(open_weights(tmp_path / "m-00001-of-00002.safetensors"))
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lists files that are not next to it: m-00002-of-00002.safetensors"):
        open_weights(index)
    with pytest.raises(ValueError, match=r"first of 2 files, but these are not next to it: m-00002-of-00002"):
        open_weights(tmp_path / "m-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["a.sft", "a.ckpt", "a.bin", "a.SFT", "a.model", "a"])
def test_safetensors_files_are_recognised_under_any_name(tmp_path, name):
    save_file(TENSORS, tmp_path / name, {"note": "kept"})
    assert_contains_all(open_weights(tmp_path / name))
    assert load_state_dict(tmp_path / name).keys() == TENSORS.keys()
    assert read_metadata(tmp_path / name) == {"note": "kept"}


@pytest.mark.parametrize("name", ["a.sft", "a.safetensors", "a.model", "a"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_are_recognised_under_any_name(tmp_path, name, is_zip):
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "fp8"}
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    assert_contains_all(open_weights(tmp_path / name), tensors)
    assert read_metadata(tmp_path / name) == {}


def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_read(tmp_path):
    """A length of 640 is stored as the bytes 80 02, with which old PyTorch pickles begin."""
    entry = {"w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    text = json.dumps(entry).encode().ljust(640)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes([5, 6, 7]))
    assert_contains_all(open_weights(tmp_path / "a.safetensors"), {"w": torch.tensor([5, 6, 7], dtype=torch.uint8)})


def test_an_unsupported_file_format_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) * 20)
    with pytest.raises(ValueError, match=r"a.gguf is not a checkpoint: it contains neither safetensors nor .*GGUF"):
        open_weights(tmp_path / "a.gguf")


def test_the_error_for_a_damaged_file_names_the_format_of_its_extension(tmp_path):
    (tmp_path / "a.sft").write_bytes(bytes(range(200, 232)))
    with pytest.raises(ValueError, match=r"a.sft is not a complete safetensors file"):
        open_weights(tmp_path / "a.sft")


def test_a_missing_sft_file_is_not_searched_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--ae models/ae.sft does not exist"):
        find_model("--ae", "models/ae.sft", [])


def test_a_fingerprint_depends_on_the_tensors_and_not_on_the_file_format(tmp_path):
    """A changed bit, dtype, shape, name or order of parts gives another fingerprint; the container does not."""
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(dict(reversed(TENSORS.items())), tmp_path / "b.ckpt")
    original = fingerprint(open_weights(tmp_path / "a.safetensors"))
    assert fingerprint(open_weights(tmp_path / "b.ckpt")) == original

    flipped = TENSORS["float"].clone()
    flipped.view(torch.int32).view(-1)[-1] ^= 1
    changes = [{"float": flipped}, {"float": TENSORS["float"].double()}, {"ids": TENSORS["ids"][0]}]
    renamed = {("other" if name == "flag" else name): tensor for name, tensor in TENSORS.items()}
    seen = {original}
    for tensors in [*({**TENSORS, **change} for change in changes), renamed]:
        save_file(tensors, tmp_path / "c.safetensors")
        seen.add(fingerprint(open_weights(tmp_path / "c.safetensors")))
    a, c = open_weights(tmp_path / "a.safetensors"), open_weights(tmp_path / "c.safetensors")
    assert len(seen | {fingerprint(a, c), fingerprint(c, a)}) == 7
