"""Running blocks: every denoiser runs all of its blocks through its runner."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.memory.blocks import BlockRunner, plain, recompute, run_blocks_with, run_encoder_layers_with
from library.models.unet.unet import run_unet_blocks_with
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET
from tests.tolerances import FLOAT32_SAME_MATH


def tiny_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**UNET).eval()
    unet.load_state_dict(fixed_init(unet, 31))
    return unet.requires_grad_(False)


def gradient(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(32)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    text = torch.randn(2, 7, UNET["cross_attention_dim"], generator=generator)
    unet(x, torch.tensor([17, 801]), text).sample.square().mean().backward()
    assert x.grad is not None
    return x.grad


def test_layers_of_a_text_encoder_are_recomputed_with_the_base_models_dropout_off() -> None:
    clip = CLIPTextModel(CLIPTextConfig(**{**CLIP, "attention_dropout": 0.5})).eval()
    clip.load_state_dict(fixed_init(clip, 34))
    ids = torch.tensor([[0, 5, 7, 1]])

    def gradients() -> list[Tensor]:
        loss = clip(ids).last_hidden_state.square().sum()
        return list(torch.autograd.grad(loss, [p for p in clip.parameters() if p.requires_grad], allow_unused=True))

    alone = gradients()
    recorder = Recorder(recompute)
    run_encoder_layers_with(clip, recorder)
    recomputed = gradients()
    assert len(recorder.ran) == CLIP["num_hidden_layers"]
    for expected, actual in zip(alone, recomputed, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(expected, actual, **FLOAT32_SAME_MATH)


class Recorder:
    """A runner that records the blocks it ran and delegates to another runner."""

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self.ran: list[nn.Module] = []

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        self.ran.append(block)
        return self.runner(block, *inputs, **named)


def test_recomputing_keeps_the_inputs_of_a_block_and_changes_no_gradient() -> None:
    torch.manual_seed(33)
    block = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5))
    x = torch.randn(3, 5)
    results, saved_inputs = [], []
    for runner in (plain, recompute):
        saved: list[Tensor] = []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            y = runner(block, leaf)
        results.append(torch.autograd.grad(y.square().sum(), leaf)[0])
        saved_inputs.append(max((t.shape[-1] for t in saved), default=0))
    assert torch.equal(*results)
    assert saved_inputs == [40, 5]  # only the inputs if blocks are recomputed


def test_nothing_is_recomputed_without_gradients() -> None:
    grad_enabled: list[bool] = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grad_enabled.append(torch.is_grad_enabled())
            return x

    with torch.no_grad():
        recompute(Block(), torch.ones(1))
    assert grad_enabled == [False]


def test_all_residual_and_transformer_blocks_of_a_unet_run_through_the_runner() -> None:
    unet = tiny_unet()
    alone = gradient(unet)
    names = dict(unet.named_modules()).keys()
    recorder = Recorder(plain)
    run_unet_blocks_with(unet, recorder)
    assert torch.equal(gradient(unet), alone)
    kinds = [type(body.block).__name__ for body in recorder.ran]
    expected = [type(module).__name__ for module in unet.modules()]
    for kind in ("ResnetBlock2D", "BasicTransformerBlock"):
        assert kinds.count(kind) == expected.count(kind) > 0
    assert len(set(kinds)) == 2 and len(set(recorder.ran)) == len(recorder.ran)
    assert dict(unet.named_modules()).keys() == names
    assert all(any(p is q for q in unet.parameters()) for p in recorder.ran[0].parameters())


def test_a_later_runner_replaces_the_first() -> None:
    unet = tiny_unet()
    alone = gradient(unet)
    first, second = Recorder(plain), Recorder(recompute)
    run_unet_blocks_with(unet, first)
    run_unet_blocks_with(unet, second)
    assert torch.equal(gradient(unet), alone)
    assert not first.ran and second.ran


def flux() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.flux import inputs, tiny_flux

    return tiny_flux(3), list(inputs(8, 6))


def lumina() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.lumina import inputs, tiny_lumina

    return tiny_lumina(3), list(inputs(8, 6))


def anima() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.anima import inputs, tiny_anima

    return tiny_anima(4), list(inputs(8, 6))


@pytest.mark.parametrize("build", [flux, lumina, anima], ids=lambda build: build.__name__)
def test_our_denoisers_run_every_block_in_order(build: Callable[[], tuple[nn.Module, list[Tensor]]]) -> None:
    model, values = build()
    recorder = Recorder(plain)
    alone = model(*values)
    run_blocks_with(model, recorder)
    assert torch.equal(model(*values), alone)
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for block_list in lists for block in block_list if any(block is ran for ran in recorder.ran)]
    assert sorted(map(id, blocks)) == sorted(map(id, recorder.ran)) and len(blocks) >= 2
    transformer = max(lists, key=len)
    assert [block for block in recorder.ran if any(block is layer for layer in transformer)] == list(transformer)
