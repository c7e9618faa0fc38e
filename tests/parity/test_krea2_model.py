"""Krea 2's denoiser against diffusers' Krea2Transformer2DModel with the same weights."""

import torch

from library.architectures.krea2.reference import diffusers_model, diffusers_state
from tests.tiny.krea2 import CONFIG, inputs, oracle_output, tiny_krea2
from tests.tolerances import FLOAT32_DEEP


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
