"""Malicious weight files are refused by name before memory is allocated for the sizes that they claim."""

import json
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

from library.checkpoints.headers import read_header
from library.checkpoints.weights import open_weights
from tests.running import ROOT
from tests.tiers import first_is_fast


def write_raw(path: Path, header: bytes, data: bytes = b"\0" * 8, num_bytes: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if num_bytes is None else num_bytes) + header + data)
    return path


def entry(**fields: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 200_000, "not valid JSON"),
        (b"null", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "not valid JSON"),
        (entry(shape=[2**62, 4]), "needs 73786976294838206464 bytes"),
        (entry(shape=[-2]), "has the shape (-2,)"),
        (entry(shape=[True]), "has the shape (True,)"),
        (entry(shape=["2"]), "has the shape ('2',)"),
        (entry(shape=[1] * 65 + [2]), "has the shape"),
        (entry(dtype=["F32"]), "has the type"),
        (entry(dtype="OBJECT"), "has the type OBJECT"),
        (entry(data_offsets=[0, 2**63]), "needs 8 bytes"),
        (entry(data_offsets=[8, 0]), "needs 8 bytes"),
        (entry(data_offsets=[0.0, 8.0]), "offsets 0.0 to 8.0"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "overlaps",
        ),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "a gap of 4 bytes"),
        (b'{"__metadata__":{"a":{}}}', "its metadata"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write_raw(tmp_path / "evil.safetensors", header)
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
    path = write_raw(tmp_path_factory.getbasetemp() / "any.safetensors", header)
    try:
        read_header(path)
    except ValueError as refused:
        assert "any.safetensors" in str(refused)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the memory of a process")
@pytest.mark.parametrize("claimed", first_is_fast([2**63, 99_000_000, 100_000_001]))
def test_a_header_that_claims_more_than_the_file_has_allocates_no_memory(tmp_path: Path, claimed: int) -> None:
    """A process limited to 64 MB of extra memory refuses the file, so it never allocates the claimed size."""
    path = write_raw(tmp_path / "evil.safetensors", b"{}", num_bytes=claimed)
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
