"""Weights into modules."""

import pytest
import torch
from torch import nn

from library.checkpoints.weights import Weights
from library.errors import UserError
from library.memory.devices import place
from library.models.loading import materialise


def weights(dtype: torch.dtype) -> Weights:
    tensors = {"weight": torch.arange(6).reshape(2, 3).to(dtype), "bias": torch.arange(2).float()}
    return Weights("model.safetensors", {key: tuple(t.shape) for key, t in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_a_quantised_checkpoint_is_refused_by_name(dtype: torch.dtype) -> None:
    """Its whole numbers mean nothing without their scales."""
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"model.safetensors: weight holds whole numbers \(.*\).*quantised checkpoint"):
        materialise(layer, weights(dtype), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_real_numbers_of_every_width_are_loaded(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    loaded = materialise(layer, weights(dtype), torch.float32)
    assert torch.equal(loaded.get_parameter("weight"), torch.arange(6).reshape(2, 3).float())


@pytest.mark.parametrize("has_frames", [False, True], ids=["pictures", "frames"])
def test_convolution_weights_come_in_the_layout_that_they_keep(has_frames: bool) -> None:
    """So that placing the model copies nothing; one with convolutions over frames stays as it is."""
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
    assert place(loaded, torch.device("cpu")).get_parameter("0.weight").data_ptr() == weight.data_ptr()
