"""Frozen Linear layers in 8 bits."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.fp8 import FP8, Linear, keep_in_fp8
from networks import lora
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tests.unit.networks.toy_transformer import toy_transformer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16, bias=False))])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(self.outside(x))
        return x


def frozen(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model().requires_grad_(False).to(dtype)


def decoded_copy(model: nn.Module) -> nn.Module:
    """The same model with plain layers that hold what the 8-bit ones decode to."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, Linear):
            weight = layer.weight.clone()
            del layer.codes, layer.scales
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def test_only_layers_inside_blocks_change_and_they_take_a_byte_a_weight() -> None:
    model = frozen()
    assert keep_in_fp8(model) == 2
    assert type(model.outside) is nn.Linear
    layer = model.blocks[0][0]
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert layer.codes.dtype == FP8 and layer.codes.shape == (24, 16)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_off_by_a_sixteenth_at_most_however_small_its_row(dtype: torch.dtype) -> None:
    model = frozen(dtype=dtype)
    layer = model.blocks[0][0]
    layer.weight[3] *= 1e-3
    layer.weight[5] = 0
    before = layer.weight.double()
    keep_in_fp8(model)
    after = layer.weight
    assert after.dtype == dtype
    limit = (before.abs() / 16).maximum(before.abs().amax(1, keepdim=True) * 2.0**-17)
    assert ((after.double() - before).abs() <= limit).all()
    assert not torch.equal(after.double(), before)
    assert (after[5] == 0).all()


def test_outputs_and_gradients_are_those_of_the_decoded_weight() -> None:
    model = frozen()
    keep_in_fp8(model)
    plain = decoded_copy(model)
    results = []
    for one in (model, plain):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = one(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **FLOAT32_SAME_MATH)


def test_under_autocast_the_product_has_its_dtype() -> None:
    model = frozen(dtype=torch.bfloat16)
    keep_in_fp8(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0][0](torch.randn(2, 16)).dtype == torch.bfloat16


def test_the_backward_pass_keeps_no_decoded_weight() -> None:
    model = frozen()
    keep_in_fp8(model)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 16).requires_grad_())
    kept = [t for t in saved if t.shape in ((24, 16), (16, 24))]
    assert kept and all(t.dtype == FP8 for t in kept)


@pytest.mark.parametrize("arguments", [{}, {"dora_wd": "True"}, {"split_qkv": "True"}], ids=str)
def test_adapters_train_on_them_as_on_the_decoded_weight(arguments: dict[str, str]) -> None:
    base = toy_transformer(0)
    assert keep_in_fp8(base) > 0
    results = []
    for model in (base, decoded_copy(base)):
        network = lora.create_network(1.0, 3, 2, None, None, model, **arguments)
        randomize(network, 5)
        network.apply_to(None, model, False, True)
        network.eval()
        y = model(torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2)))
        y.square().sum().backward()
        results.append((y.detach(), *(parameter.grad for parameter in network.parameters())))
        network.remove()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
