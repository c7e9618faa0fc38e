"""Krea 2's denoiser against diffusers' Krea2Transformer2DModel with the same weights."""

import pytest
import torch

from library.architectures.krea2.reference import diffusers_model, diffusers_state
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.krea2 import CONFIG, LENGTHS, inputs, oracle_output, tiny_krea2
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (4, 10), (14, 2)]  # of the latent


@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7)], ids=["padded", "equal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], lengths: tuple[int, ...]) -> None:
    ours = tiny_krea2(1)
    theirs = diffusers_model(ours)
    results = []
    for run in (ours, lambda *values: oracle_output(theirs, *values)):
        values = inputs(*size, lengths)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), (values[0], values[2]))
        results.append((output, *gradients))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_weight_gradients_match_diffusers() -> None:
    ours = tiny_krea2(2).requires_grad_()
    theirs = diffusers_model(ours).requires_grad_()
    for model, run in ((ours, ours), (theirs, lambda *values: oracle_output(theirs, *values))):
        output = run(*inputs(4, 6))
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    actual = diffusers_state({name: parameter.grad for name, parameter in ours.named_parameters()})  # type: ignore[misc]
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, **FLOAT32_DEEP)


def test_longer_padding_does_not_affect_outputs() -> None:
    """Text has no positions, so padding only needs masking."""
    model = tiny_krea2(3)
    latents, sigmas, text, mask = (value.detach() for value in inputs(4, 6))
    padded = torch.nn.functional.pad(text, (0, 0, 0, 4)), torch.nn.functional.pad(mask, (0, 4))
    torch.testing.assert_close(model(latents, sigmas, *padded), model(latents, sigmas, text, mask), **FLOAT32_DEEP)


def test_norms_keep_small_scales_in_bf16() -> None:
    """1 + scale is computed in float32: in bf16 it has steps of 1 / 128."""
    norm = tiny_krea2(4).bfloat16().blocks[0].prenorm
    norm.scale.copy_(torch.linspace(-0.003, 0.003, CONFIG.block.width))
    x = torch.randn(3, CONFIG.block.width, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + norm.scale.double())
    torch.testing.assert_close(norm(x), expected.bfloat16(), rtol=2**-8, atol=0)
    assert not torch.equal(norm(x), (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16())


def test_every_layer_input_has_one_row_per_sample() -> None:
    """Adapters that treat samples differently (by noise level, or by adapter of a sweep) distinguish them by the first
    axis."""
    model, batch_sizes = tiny_krea2(3), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: batch_sizes.add(len(inputs[0])))
    model(*inputs(4, 6))
    assert batch_sizes == {2}


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_krea2(3), lambda: inputs(4, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_krea2(4)
    expected = model(*inputs(4, 6))
    for block in (*model.blocks, *model.txtfusion.layerwise_blocks, *model.txtfusion.refiner_blocks):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(4, 6)), expected, **FLOAT32_DEEP)
