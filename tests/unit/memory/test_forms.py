"""Forms of frozen weights, and the layers that keep them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.forms.form import Form
from library.memory.forms.fp8 import FP8, Fp8Rows
from library.memory.forms.plain import Plain
from library.memory.frozen import FrozenLinear, layers_in_blocks, store_all_in, store_in
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
        if isinstance(layer, FrozenLinear):
            weight = layer.weight
            for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
                delattr(layer, name)
            layer.__class__ = nn.Linear
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return plain


def test_only_layers_inside_blocks_change_and_they_take_a_byte_a_weight() -> None:
    model = frozen()
    assert store_all_in(Fp8Rows(), layers_in_blocks(model).values()) == 2
    assert type(model.outside) is nn.Linear
    layer = model.blocks[0][0]
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert layer.codes.dtype == FP8 and layer.codes.shape == (24, 16)
    parameters = dict(layer.named_parameters())
    assert list(parameters) == ["bias", "codes", "scales"]
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert sum(p.numel() * p.element_size() for name, p in parameters.items() if name != "bias") == 24 * 16 + 24 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_off_by_a_sixteenth_at_most_however_small_its_row(dtype: torch.dtype) -> None:
    model = frozen(dtype=dtype)
    layer = model.blocks[0][0]
    layer.weight[3] *= 1e-3
    layer.weight[5] = 0
    before = layer.weight.double()
    store_all_in(Fp8Rows(), layers_in_blocks(model).values())
    after = layer.weight
    assert after.dtype == dtype
    limit = (before.abs() / 16).maximum(before.abs().amax(1, keepdim=True) * 2.0**-17)
    assert ((after.double() - before).abs() <= limit).all()
    assert not torch.equal(after.double(), before)
    assert (after[5] == 0).all()


FORMS = {"plain": Plain(), "fp8": Fp8Rows()}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_outputs_and_gradients_are_those_of_the_decoded_weight(form: Form) -> None:
    model = frozen()
    store_all_in(form, layers_in_blocks(model).values())
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
    store_all_in(Fp8Rows(), layers_in_blocks(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0][0](torch.randn(2, 16)).dtype == torch.bfloat16


def test_the_backward_pass_keeps_no_decoded_weight() -> None:
    model = frozen()
    store_all_in(Fp8Rows(), layers_in_blocks(model).values())
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 16).requires_grad_())
    assert saved and not [t for t in saved if t.shape in ((24, 16), (16, 24))]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_weight_that_is_read_is_a_copy(form: Form) -> None:
    layer = nn.Linear(6, 4).requires_grad_(False)
    store_in(form, layer)
    read = layer.weight
    read.fill_(7)
    assert not (layer.weight == 7).any()


def test_the_backward_pass_asks_the_handle_for_the_weight_again() -> None:
    """What the layer's own parts hold by then does not matter: another layer's weight may be in their place."""
    torch.manual_seed(8)
    layer = nn.Linear(6, 4, bias=False).requires_grad_(False)
    before = layer.weight.clone()
    store_in(Plain(), layer)
    assert isinstance(layer, FrozenLinear)
    asked: list[str] = []
    values = before.clone()
    layer.handle = lambda: asked.append("") or {"values": values}  # type: ignore[func-returns-value]
    layer.values.fill_(float("nan"))
    x = torch.randn(3, 6).requires_grad_()
    y = layer(x)
    assert len(asked) == 1
    y.sum().backward()
    assert len(asked) == 2
    torch.testing.assert_close(x.grad, before.sum(0).expand(3, 6), **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("arguments", [{}, {"dora_wd": "True"}, {"split_qkv": "True"}], ids=str)
def test_adapters_train_on_them_as_on_the_decoded_weight(arguments: dict[str, str]) -> None:
    base = toy_transformer(0)
    assert store_all_in(Fp8Rows(), layers_in_blocks(base).values()) > 0
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
