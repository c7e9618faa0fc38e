"""Tensor files: read one tensor at a time, written completely or not at all, and refused if damaged."""

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from library.base.atomic_files import atomic_path
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.fused_tensors import join_tensors
from library.checkpoints.headers import read_header, read_metadata
from library.checkpoints.model_lookup import find_model
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from library.checkpoints.weights import Quantised, Weights, fingerprint, open_weights
from tests.running import ROOT
from tests.tiers import first_is_fast

TWO_TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def write_raw(path: Path, header: Any, data: bytes, num_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data)
    return path


def test_a_hand_made_file_is_read_according_to_the_format(tmp_path: Path) -> None:
    values = struct.pack("<6f", 1, 2, 3, 4, 5, 6.5) + struct.pack("<4e", -1, 0.5, 2, 1024)
    path = write_raw(tmp_path / "x.safetensors", {"__metadata__": {"ss_steps": "7"}, **TWO_TENSORS}, values)
    tensors = load_state_dict(path)
    assert tensors["a"].tolist() == [[1, 2, 3], [4, 5, 6.5]]
    assert tensors["b"].dtype == torch.float16 and tensors["b"].tolist() == [-1, 0.5, 2, 1024]
    assert read_metadata(path) == {"ss_steps": "7"}


def test_the_header_is_read_without_the_data(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", TWO_TENSORS, bytes(32))
    header = read_header(path)
    assert header.tensors["b"].shape == (4,) and header.tensors["b"].dtype == "F16"
    assert header.metadata == {} and header.num_bytes == len(json.dumps(TWO_TENSORS))


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": TWO_TENSORS["a"], "b": {**TWO_TENSORS["b"], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "num_bytes", "problem"),
    [
        (TWO_TENSORS, bytes(32), 2**60, "header would be 1152921504606846976 bytes"),
        (TWO_TENSORS, b"", 5000, "truncated: 128 of 5000 header bytes exist"),
        (TWO_TENSORS, bytes(31), None, "'b' ends at byte 32"),
        (TWO_TENSORS, bytes(33), None, "1 bytes follow the last tensor"),
        (b"{nonsense", b"", None, "not valid JSON"),
        (b"[1, 2]", b"", None, "not a JSON object"),
        (entry(data_offsets=[16, 24]), bytes(24), None, "'b' overlaps 'a'"),
        (entry(data_offsets=[28, 36]), bytes(36), None, "gap of 4 bytes before 'b'"),
        (entry(data_offsets=[24, 34]), bytes(34), None, "'b' needs 8 bytes"),
        (entry(data_offsets=[24, -8]), bytes(32), None, "offsets 24 to -8"),
        (entry(shape=[-4]), bytes(32), None, "shape (-4,)"),
        (entry(dtype="F7"), bytes(32), None, "the type F7"),
        ({"a": {"dtype": "F32"}}, b"", None, "lacks dtype, shape or data_offsets"),
        ({"__metadata__": {"k": 3}}, b"", None, "metadata does not map names to strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused_with_its_name_and_problem(
    tmp_path: Path, header: Any, data: bytes, num_bytes: int | None, problem: str
) -> None:
    path = write_raw(tmp_path / "broken.safetensors", header, data, num_bytes)
    with pytest.raises(ValueError) as caught:
        load_state_dict(path)
    assert problem in str(caught.value) and "broken.safetensors" in str(caught.value)


def test_a_file_of_three_bytes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"short\.safetensors.*only 3 bytes"):
        read_header(tmp_path / "short.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.safetensors does not exist"):
        load_state_dict(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_pickled_tensors_survive_a_round_trip(tmp_path: Path, extension: str) -> None:
    tensors = {"w": torch.randn(3, 5), "alpha": torch.tensor(2.0)}
    save_pickle_state_dict(tmp_path / f"x.{extension}", tensors)
    loaded = load_state_dict(tmp_path / f"x.{extension}")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_a_state_dict_inside_a_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    weight = torch.randn(2, 2)
    torch.save({"state_dict": {"w": weight}, "global_step": 3}, tmp_path / "model.ckpt")
    assert torch.equal(load_state_dict(tmp_path / "model.ckpt")["w"], weight)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should-not-be-made",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Payload()}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt.*plain tensors"):
        load_state_dict("evil.ckpt")
    assert not Path("should-not-be-made").exists()


def test_errors_about_unreadable_files_are_one_line(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4000)}, tmp_path / "a.pt")
    content_of_file = (tmp_path / "a.pt").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    for content, message in (
        (b"", "is empty; download or copy it again"),
        (content_of_file[: len(content_of_file) // 2], "it is truncated or damaged ("),
        (pointer, "is a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><html>", "is a web page, not a checkpoint"),
        (b"Entry not found", "is a text file, not a checkpoint; it begins with 'Entry not found'"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(UserError) as error:
            load_state_dict(tmp_path / "a.pt")
        assert message in str(error.value) and "\n" not in str(error.value)
    torch.save({"w": Payload}, tmp_path / "a.pt")
    with pytest.raises(
        UserError, match=r"it contains other Python objects \(tests.unit.checkpoints.test_files.Payload\)"
    ):
        load_state_dict(tmp_path / "a.pt")


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_safetensors(path, {"w": torch.ones(2)}, {"ss_steps": "1"})
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        with atomic_path(path) as temporary:
            temporary.write_bytes(before[:20])
            raise OSError(28, "No space left on device")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_temporary_file_is_next_to_the_target_and_keeps_its_extension(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "x.safetensors") as temporary:
        assert temporary.parent == tmp_path / "new" and temporary.suffix == ".safetensors"
        assert not (tmp_path / "new" / "x.safetensors").exists()
        temporary.write_text("done")
    assert (tmp_path / "new" / "x.safetensors").read_text() == "done"


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut may leave the name with an empty file."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, plain=plain: calls.append(name) or plain(*args))
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("done")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_written_file_has_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_safetensors(tmp_path / "x.safetensors", {"w": torch.ones(2)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.safetensors")}
    assert len(modes) == 1


def test_views_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    save_safetensors(tmp_path / "x.safetensors", {"t": matrix.t(), "half": matrix.bfloat16()[::2]})
    loaded = load_state_dict(tmp_path / "x.safetensors")
    assert torch.equal(loaded["t"], matrix.t()) and torch.equal(loaded["half"], matrix.bfloat16()[::2])


def test_an_alpha_pickled_as_a_number_is_loaded(tmp_path: Path) -> None:
    torch.save({"a.alpha": 4, "b.alpha": 0.5, "a.lora_up.weight": torch.ones(2, 2), "epoch": 3}, tmp_path / "a.pt")
    tensors = load_state_dict(tmp_path / "a.pt")
    assert tensors.keys() == {"a.alpha", "b.alpha", "a.lora_up.weight"}
    assert (float(tensors["a.alpha"]), float(tensors["b.alpha"])) == (4.0, 0.5)


# Tensors that one layout of a checkpoint stacks and another stores separately.

PARTS = {"qkv": ("q", "k"), "out": ("o",), "last": ("norm",), "absent": ("x", "y")}


def weights_of(names: str) -> Weights:
    tensors = {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(ord(name[0]))) for name in names.split()}
    return Weights(
        "file",
        {name: (4, 3) for name in tensors},
        lambda name: tensors[name],
        {name: Quantised(name, None, dict) for name in tensors},
        padded_to=dict.fromkeys(tensors, 16),
    )


def test_parts_are_stacked_and_halves_swapped() -> None:
    weights = weights_of("q k o norm z")
    joined = join_tensors(weights, PARTS, "last")
    assert joined.shapes == {"qkv": (8, 3), "out": (4, 3), "last": (4, 3), "z": (4, 3)}
    assert torch.equal(joined.read("qkv"), torch.cat([weights.read("q"), weights.read("k")]))
    assert torch.equal(joined.read("last"), weights.read("norm")[[2, 3, 0, 1]])
    assert torch.equal(joined.read("out"), weights.read("o")) and torch.equal(joined.read("z"), weights.read("z"))


def test_tensors_that_are_only_renamed_keep_their_stored_form() -> None:
    joined = join_tensors(weights_of("q k o norm z"), PARTS, "last")
    assert {name: quantised.kind for name, quantised in joined.quantised.items()} == {"out": "o", "z": "z"}
    assert joined.padded_to == {"out": 16, "z": 16}


def test_a_missing_part_of_a_tensor_is_named() -> None:
    with pytest.raises(UserError, match="file is incomplete: k is missing"):
        join_tensors(weights_of("q o"), PARTS)


# Checkpoints that are read one tensor at a time.

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


def test_a_file_is_read_on_the_named_device_whatever_the_default_is(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    with torch.device("meta"):
        tensors = load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


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


# Malicious weight files are refused by name before memory is allocated for the sizes that they claim.


def write_hostile(path: Path, header: bytes, data: bytes = b"\0" * 8, num_bytes: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if num_bytes is None else num_bytes) + header + data)
    return path


def hostile_entry(**fields: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 200_000, "not valid JSON"),
        (b"null", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "not valid JSON"),
        (hostile_entry(shape=[2**62, 4]), "needs 73786976294838206464 bytes"),
        (hostile_entry(shape=[-2]), "has the shape (-2,)"),
        (hostile_entry(shape=[True]), "has the shape (True,)"),
        (hostile_entry(shape=["2"]), "has the shape ('2',)"),
        (hostile_entry(shape=[1] * 65 + [2]), "has the shape"),
        (hostile_entry(dtype=["F32"]), "has the type"),
        (hostile_entry(dtype="OBJECT"), "has the type OBJECT"),
        (hostile_entry(data_offsets=[0, 2**63]), "needs 8 bytes"),
        (hostile_entry(data_offsets=[8, 0]), "needs 8 bytes"),
        (hostile_entry(data_offsets=[0.0, 8.0]), "offsets 0.0 to 8.0"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "overlaps",
        ),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "a gap of 4 bytes"),
        (b'{"__metadata__":{"a":{}}}', "its metadata"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write_hostile(tmp_path / "evil.safetensors", header)
    with pytest.raises(ValueError) as refused:
        read_header(path)
    assert "evil.safetensors" in str(refused.value) and message in str(refused.value)
    assert len(str(refused.value)) < 1000


@given(header=st.one_of(st.binary(max_size=80), st.recursive(
    st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.just("F32")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4)),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = write_hostile(tmp_path_factory.getbasetemp() / "any.safetensors", header)
    try:
        read_header(path)
    except ValueError as refused:
        assert "any.safetensors" in str(refused)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the memory of a process")
@pytest.mark.parametrize("claimed", first_is_fast([2**63, 99_000_000, 100_000_001]))
def test_a_header_that_claims_more_than_the_file_has_allocates_no_memory(tmp_path: Path, claimed: int) -> None:
    """A process limited to 64 MB of extra memory refuses the file, so it never allocates the claimed size."""
    path = write_hostile(tmp_path / "evil.safetensors", b"{}", num_bytes=claimed)
    code = (
        "import resource, sys; from library.checkpoints.headers import read_header\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))\n"
        "try: read_header(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "evil.safetensors is not a complete safetensors file" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[1]", "no weight_map"),
        ('{"weight_map": {"a": 5}}', "no weight_map"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "/outside.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"b": "part.safetensors"}}', "missing from its files: b"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path: Path, content: str, message: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path.parent / "outside.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ValueError) as refused:
        open_weights(path)
    assert message in str(refused.value) and path.name in str(refused.value)
