"""Loading weights into modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.base.errors import UserError
from library.checkpoints.weights import Weights, open_weights
from library.memory.devices import move_to_device
from library.models import loading
from library.models.loading import cast, materialise


def weights(dtype: torch.dtype) -> Weights:
    tensors = {"weight": torch.arange(6).reshape(2, 3).to(dtype), "bias": torch.arange(2).float()}
    return Weights("model.safetensors", {key: tuple(t.shape) for key, t in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_a_quantised_checkpoint_is_refused_by_name(dtype: torch.dtype) -> None:
    """Integer weights are meaningless without their scales."""
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"model.safetensors: weight holds integers \(.*\).*quantised checkpoint"):
        materialise(layer, weights(dtype), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_of_every_width_are_loaded(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    loaded = materialise(layer, weights(dtype), torch.float32)
    assert torch.equal(loaded.get_parameter("weight"), torch.arange(6).reshape(2, 3).float())


@pytest.mark.parametrize("has_frames", [False, True], ids=["pictures", "frames"])
def test_convolution_weights_are_loaded_in_their_final_memory_format(has_frames: bool) -> None:
    """Moving the model then copies nothing; a model with 3-D convolutions stays contiguous."""
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Conv2d(3, 5, 2), *([nn.Conv3d(2, 2, 2)] if has_frames else [])]
        model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(4120)
    tensors = {
        name: torch.randn(weight.shape, generator=generator).half() for name, weight in model.state_dict().items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    loaded = materialise(model, Weights("model.safetensors", shapes, tensors.__getitem__), torch.float32)
    weight = loaded.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is not has_frames
    assert torch.equal(weight, tensors["0.weight"].float())
    assert move_to_device(loaded, torch.device("cpu")).get_parameter("0.weight").data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("layout", [torch.preserve_format, torch.channels_last], ids=["as it is", "channels last"])
@pytest.mark.parametrize("bytes_at_once", [100, 1 << 19], ids=["in parts", "whole"])
def test_every_float16_is_rounded_to_the_nearest_bfloat16(
    layout: torch.memory_format, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "BYTES_IN_CACHE", bytes_at_once)
    bits = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(83)).to(torch.int32)
    value = bits.to(torch.int16).view(torch.float16).reshape(64, 32, 8, 4)
    actual = cast(value, torch.bfloat16, layout)
    assert actual.is_contiguous(memory_format=torch.channels_last) == (layout is torch.channels_last)
    # Round to nearest, ties to even: bfloat16 is the upper half of float32, which represents every float16.
    upper = value.float().numpy().view(np.uint32).astype(np.uint64)
    nearest = (upper + 0x7FFF + ((upper >> 16) & 1)) >> 16
    is_number = ~value.isnan().numpy()
    assert np.array_equal(actual.contiguous().view(torch.uint16).numpy()[is_number], nearest[is_number])
    assert np.array_equal(actual.isnan().numpy(), ~is_number)


def test_scalar_and_empty_float16_tensors_are_cast() -> None:
    for value in (torch.tensor(0.1, dtype=torch.float16), torch.empty(0, 3, dtype=torch.float16)):
        actual = cast(value, torch.bfloat16, torch.preserve_format)
        assert actual.shape == value.shape
        assert torch.equal(actual, value.to(torch.bfloat16))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bytes_at_once", [64, 1 << 19], ids=["in parts", "whole"])
def test_weights_converted_while_loading_match_a_cast_by_torch(
    stored: torch.dtype, bytes_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are converted through a reused buffer; some files store 1x1 kernels as matrices."""
    monkeypatch.setattr(loading, "BYTES_IN_CACHE", bytes_at_once)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(9, 4), nn.Conv2d(6, 8, 1, bias=False), nn.Embedding(0, 3))
    generator = torch.Generator().manual_seed(5107)
    tensors = {
        name: torch.randn(weight.shape, generator=generator).to(stored) for name, weight in model.state_dict().items()
    }
    tensors["2.weight"] = tensors["2.weight"].flatten(1)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = materialise(model, open_weights(tmp_path / "a.safetensors"), torch.bfloat16).state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, tensors[name].to(torch.bfloat16).reshape(value.shape)), name
    assert loaded["0.weight"].is_contiguous(memory_format=torch.channels_last)
