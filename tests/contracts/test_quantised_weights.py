"""Checkpoints in 8 and 4 bits in ComfyUI's formats: dequantised when read, or kept in 8 bits where supported.

`data/quantised_weights.safetensors` was made with comfy-kitchen 0.2.40: weights with an input 20 times as large as the
others, what its quantisers make of them, and in `expected.<layer>` what its own decoders give.
`data/quantised_padded_weights.safetensors`: the same of `QuantizedTensor`, for a weight that has to be padded, with
scales in float8_e8m0fnu.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.base.errors import UserError
from library.checkpoints.quantised import open_checkpoint, regular_hadamard
from library.memory.codecs.codec import AS_IN_FILE
from library.memory.codecs.scaled import Scaled
from library.memory.frozen import FrozenLayer
from library.models.loading import materialise
from tests.tolerances import FLOAT32_SAME_MATH
from tests.weight_formats import CODECS

FILE = Path(__file__).parent / "data" / "quantised_weights.safetensors"
PADDED_FILE = FILE.with_name("quantised_padded_weights.safetensors")
TENSORS = load_file(FILE)
LAYERS = sorted(name.removeprefix("expected.") for name in TENSORS if name.startswith("expected."))
STORED = {name: tensor for name, tensor in TENSORS.items() if not name.startswith("expected.")}
CONFIGS = {layer: json.loads(bytes(TENSORS[f"{layer}.comfy_quant"].tolist())) for layer in LAYERS}
KINDS = {  # forms in which a layer can stay quantised
    "fp8": "fp8",
    "fp8_e5m2": "fp8",
    "int8": "int8",
    "int8_rows": "int8",
    "turned": "int8_rotated",
    "turned_16": "int8_rotated",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_format_is_decoded_as_comfy_kitchen_decodes_it(layer: str) -> None:
    weights = open_checkpoint(FILE)
    expected = TENSORS[f"expected.{layer}"]
    assert weights.shapes[f"{layer}.weight"] == tuple(expected.shape)
    torch.testing.assert_close(weights.read(f"{layer}.weight").float(), expected, **FLOAT32_SAME_MATH)


def test_scales_and_markers_are_not_weights_and_other_weights_are_unchanged() -> None:
    weights = open_checkpoint(FILE)
    names = {f"{layer}.weight" for layer in LAYERS} | {f"expected.{layer}" for layer in LAYERS} | {"plain.weight"}
    assert set(weights.shapes) == names
    assert torch.equal(weights.read("plain.weight"), TENSORS["plain.weight"])
    assert {name.removesuffix(".weight"): stored.kind for name, stored in weights.quantised.items()} == KINDS


def test_the_header_may_describe_the_layers(tmp_path: Path) -> None:
    """Names in the header may lack the prefix of the tensors."""
    tensors = {f"model.diffusion_model.{k}": t for k, t in STORED.items() if not k.endswith("comfy_quant")}
    description = json.dumps({"format_version": "1.0", "layers": CONFIGS})
    save_file(tensors, tmp_path / "a.safetensors", metadata={"_quantization_metadata": description})
    weights = open_checkpoint(tmp_path / "a.safetensors")
    for layer in LAYERS:
        actual = weights.read(f"model.diffusion_model.{layer}.weight").float()
        torch.testing.assert_close(actual, TENSORS[f"expected.{layer}"], **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("shape", [(1,), (6, 1), (6, 4, 1)], ids=str)
def test_the_older_format_has_one_scale_or_scales_per_row_or_group(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(81)
    codes = torch.randn(6, 32, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, generator=generator) + 0.5
    tensors = {"a.weight": codes, "a.scale_weight": scales, "a.scale_input": torch.ones(1)}
    save_file({**tensors, "scaled_fp8": torch.empty(0)}, tmp_path / "a.safetensors")
    weights = open_checkpoint(tmp_path / "a.safetensors")
    groups = scales.double().reshape(-1, shape[1] if len(shape) == 3 else 1)
    wanted = codes.double() * groups.repeat_interleave(32 // groups.shape[1], dim=1)
    assert list(weights.shapes) == ["a.weight"]
    torch.testing.assert_close(weights.read("a.weight").double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"format": "asym_w4a8_int8"},
            "fp8.weight is stored in the unsupported format 'asym_w4a8_int8'; supported: float8",
        ),
        ("not JSON", "the JSON description of its weights is invalid"),
    ],
)
def test_unknown_formats_are_rejected_by_name(config: Any, message: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    changed = {"fp8.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    save_file({**STORED, **changed}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors") as refused:
        open_checkpoint(tmp_path / "a.safetensors")
    assert message in str(refused.value)


def fp8_layers(scale: Any = 0.5, rest: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
    """Return two layers in fp8, the second with `scale` unless it is None."""
    codes = torch.ones(4, 32).to(torch.float8_e4m3fn)
    tensors = {"a.weight": codes, "a.scale_weight": torch.tensor(0.5), "b.weight": codes.clone()}
    return {**tensors, **({} if scale is None else {"b.scale_weight": torch.as_tensor(scale)}), **rest}


MARKER = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
UNUSABLE = {
    "missing beside others": fp8_layers(None),
    "missing beside the marker": {"b.weight": fp8_layers()["b.weight"], **MARKER},
    "missing beside the marker, a vector": {"b.weight": fp8_layers()["b.weight"][0].clone(), **MARKER},
    "missing beside the marker, a kernel": {"b.weight": fp8_layers()["b.weight"][..., None, None].clone(), **MARKER},
    "missing beside the marker, in a model": {"model.diffusion_model.b.weight": fp8_layers()["b.weight"], **MARKER},
    "missing in a described layer": {k: t for k, t in STORED.items() if k != "turned.weight_scale"},
    "zero": fp8_layers(0.0),
    "negative": fp8_layers([[0.5], [0.5], [-0.5], [0.5]]),
    "not finite": fp8_layers(float("nan")),
    "second of nvfp4 missing": {k: t for k, t in STORED.items() if k != "nvfp4.weight_scale_2"},
    "second of nvfp4 zero": {**STORED, "nvfp4.weight_scale_2": torch.tensor(0.0)},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_missing_or_invalid_scale_is_rejected_naming_the_layer(case: str, tmp_path: Path) -> None:
    save_file(UNUSABLE[case], tmp_path / "a.safetensors")
    layer = "nvfp4" if "nvfp4" in case else "turned" if "described" in case else "b"
    with pytest.raises(UserError, match=rf"a\.safetensors.* (have|has) .*: (model.*)?{layer}(\.weight)?\. Download"):
        open_checkpoint(tmp_path / "a.safetensors")


def redescribe(layer: str, **changes: Any) -> dict[str, Tensor]:
    """Return the file's tensors with a changed description of one layer."""
    text = json.dumps({**CONFIGS[layer], **changes})
    return {**STORED, f"{layer}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}


NESTED = torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)
HOSTILE = {  # -> expected message
    "too few scales": ({**STORED, "int8_rows.weight_scale": torch.ones(3, 1)}, "int8_rows has 3 scales"),
    "too many scales": ({**STORED, "int8_rows.weight_scale": torch.ones(10_000)}, "int8_rows has 10000 scales"),
    "no scales": ({**STORED, "fp8.weight_scale": torch.ones(0)}, "fp8 has 0 scales"),
    "format a list": (redescribe("fp8", format=["fp8"]), "fp8.weight is stored in the unsupported format"),
    "format a number": (redescribe("fp8", format=8), "fp8.weight is stored in the unsupported format '8'"),
    "group 3": (redescribe("turned", convrot_groupsize=3), "turned has the convrot_groupsize '3'"),
    "group -4": (redescribe("turned", convrot_groupsize=-4), "turned has the convrot_groupsize '-4'"),
    "group text": (redescribe("turned", convrot_groupsize="four"), "turned has the convrot_groupsize 'four'"),
    "group huge": (redescribe("turned", convrot_groupsize=10**9), "turned has the convrot_groupsize '1000000000'"),
    "group that divides nothing": (redescribe("turned", convrot_groupsize=4096), "divides the weight's"),
    "nvfp4 as text": (redescribe("fp8", format="nvfp4"), "have no scale .*: fp8"),
    "mxfp8 as fp8": (redescribe("fp8", format="mxfp8"), "fp8 has 1 scales"),
    "mxfp8 with float32 scales": (
        {**STORED, "mxfp8.weight_scale": torch.ones(STORED["mxfp8.weight_scale"].shape)},
        "mxfp8 has .* scales",
    ),
    "mxfp8 of one axis": ({**STORED, "mxfp8.weight": STORED["mxfp8.weight"][0].clone()}, "mxfp8 has .* scales"),
    "two scales of nvfp4": ({**STORED, "nvfp4.weight_scale_2": torch.ones(2)}, "not finite or 0 .*: nvfp4"),
    "nested JSON": ({**STORED, "fp8.comfy_quant": NESTED}, "the JSON description of its weights is invalid"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_mismatched_descriptions_and_scales_are_rejected(case: str, tmp_path: Path) -> None:
    tensors, message = HOSTILE[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: .*{message}"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("layers", [None, [], 3, "fp8"])
def test_a_header_without_a_layer_table_describes_no_layers(layers: Any, tmp_path: Path) -> None:
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(fp8_layers(), tmp_path / "a.safetensors", metadata=metadata)
    assert torch.equal(open_checkpoint(tmp_path / "a.safetensors").read("a.weight"), torch.full((4, 32), 0.5))


def test_a_deeply_nested_header_is_rejected(tmp_path: Path) -> None:
    save_file(fp8_layers(), tmp_path / "a.safetensors", metadata={"_quantization_metadata": "[" * 100_000})
    with pytest.raises(UserError, match="the JSON description of its weights is invalid"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_fp8_without_scales_is_read_where_no_scale_is_needed(tmp_path: Path) -> None:
    """Rows of zeros may have scale 0; convolutions, vectors and other models in the file may be plain fp8."""
    codes = fp8_layers()["a.weight"]
    blank = torch.cat([codes[:2].float(), torch.zeros(2, 32)]).to(torch.float8_e4m3fn)
    plain = {"norm.weight": codes[0].clone(), "conv.weight": codes.reshape(4, 2, 4, 4)}
    tensors = {f"model.diffusion_model.{k}": t for k, t in {**fp8_layers(), **plain, **MARKER}.items()}
    tensors["model.diffusion_model.c.weight"] = blank
    tensors["model.diffusion_model.c.scale_weight"] = torch.tensor([[0.5], [0.5], [0.0], [0.0]])
    save_file({**tensors, "text_encoders.t5xxl.x.weight": codes.clone()}, tmp_path / "a.safetensors")
    weights = open_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(weights.read("text_encoders.t5xxl.x.weight").float(), torch.ones(4, 32))
    assert weights.read("model.diffusion_model.c.weight").sum(1).tolist() == [16, 16, 0, 0]


@pytest.mark.parametrize("size", [4, 16, 256])
def test_the_regular_hadamard_matrix_is_its_own_inverse_with_equal_row_sums(size: int) -> None:
    matrix = regular_hadamard(size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)


class Model(nn.Module):
    """A block whose layers have the names and shapes of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({k: linear(TENSORS[f"expected.{k}"]) for k in LAYERS})])


def linear(like: Tensor) -> nn.Linear:
    return nn.Linear(like.shape[1], like.shape[0], bias=False, device="meta")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({f"blocks.0.{k}": t for k, t in STORED.items() if not k.startswith("plain")}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_8_bit_weights_stay_in_the_format_of_the_file(file: Path) -> None:
    model = materialise(Model(), open_checkpoint(file), torch.float32, AS_IN_FILE)
    for layer in LAYERS:
        module = model.blocks[0][layer]
        assert isinstance(module, FrozenLayer) == (layer in KINDS)
        if layer in KINDS:
            assert isinstance(module.decoder, Scaled) and module.codes.dtype == STORED[f"{layer}.weight"].dtype
        torch.testing.assert_close(module.weight, TENSORS[f"expected.{layer}"], **FLOAT32_SAME_MATH)


def test_a_requested_format_replaces_the_one_in_the_file(file: Path) -> None:
    model = materialise(Model(), open_checkpoint(file), torch.float32, CODECS["int8"])
    decoders = {layer: model.blocks[0][layer].decoder for layer in LAYERS}
    assert all(isinstance(decoders[layer], Scaled) == (KINDS.get(layer) == "int8") for layer in LAYERS)
    assert decoders["nvfp4"] is CODECS["int8"] is decoders["turned"]


def test_without_a_requested_format_all_weights_are_dequantised(file: Path) -> None:
    model = materialise(Model(), open_checkpoint(file), torch.bfloat16)
    assert {type(module) for module in model.blocks[0].values()} == {nn.Linear}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layer", ["mxfp8", "nvfp4"])
def test_padding_is_cropped_to_the_model_shape(layer: str, tmp_path: Path) -> None:
    tensors = load_file(PADDED_FILE)
    expected = tensors[f"expected.{layer}"]
    save_file({k: t for k, t in tensors.items() if k.startswith(layer)}, tmp_path / "m.safetensors")
    weights = open_checkpoint(tmp_path / "m.safetensors")
    model = materialise(nn.ModuleDict({layer: linear(expected)}), weights, torch.float32)
    torch.testing.assert_close(model[layer].weight.data, expected, **FLOAT32_SAME_MATH)
    with pytest.raises(UserError, match=f"does not fit ModuleDict: {layer}.weight"):
        materialise(nn.ModuleDict({layer: linear(torch.empty(35, 33))}), weights, torch.float32)
