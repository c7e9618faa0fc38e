"""Krea 2's denoiser against diffusers' Krea2Transformer2DModel with the same weights, and with references against
formulas in float64."""

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.nn.functional import fold, gelu, silu, unfold

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
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    actual = diffusers_state(gradients, ours.config)  # type: ignore[arg-type]
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, **FLOAT32_DEEP)


# One sample with references, without padding, masks and batches

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms(state: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + state[f"{name}.scale"])


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring values of each head; x is (tokens, heads, D), positions (tokens, 3)."""
    widths = [x.shape[-1] // 8 * share for share in (2, 3, 3)]
    phases = torch.cat(
        [
            positions[:, axis, None] * 1000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            for axis, width in enumerate(widths)
        ],
        dim=1,
    )[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * phases.cos() - b * phases.sin(), a * phases.sin() + b * phases.cos()], dim=-1).flatten(-2)


def attention(state: State, name: str, x: Tensor, positions: Tensor | None = None) -> Tensor:
    width = len(state[f"{name}.qknorm.qnorm.scale"])
    q, k, v = (linear(state, f"{name}.w{part}", x).unflatten(-1, (-1, width)) for part in "qkv")
    q, k = rms(state, f"{name}.qknorm.qnorm", q), rms(state, f"{name}.qknorm.knorm", k)
    if positions is not None:
        q, k = rotated(q, positions), rotated(k, positions)
    k, v = (part.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2) for part in (k, v))
    weights = (torch.einsum("...qnd,...knd->...nqk", q, k) / width**0.5).softmax(-1)
    attended = torch.einsum("...nqk,...knd->...qnd", weights, v).flatten(-2)
    return linear(state, f"{name}.wo", attended * torch.sigmoid(linear(state, f"{name}.gate", x)))


def feed(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.down", silu(linear(state, f"{name}.gate", x)) * linear(state, f"{name}.up", x))


def fused_text(state: State, states: Tensor) -> Tensor:
    """Return the text's tokens; `states` are (tokens, states of a token, width)."""
    x = states
    for kind in ("layerwise_blocks", "refiner_blocks"):
        for n in range(2):
            block = f"txtfusion.{kind}.{n}"
            x = x + attention(state, f"{block}.attn", rms(state, f"{block}.prenorm", x))
            x = x + feed(state, f"{block}.mlp", rms(state, f"{block}.postnorm", x))
        if kind == "layerwise_blocks":
            x = torch.einsum("lse,s->le", x, state["txtfusion.projector.weight"][0])
    hidden = gelu(linear(state, "txtmlp.1", rms(state, "txtmlp.0", x)), approximate="tanh")
    return linear(state, "txtmlp.3", hidden)


def level_vector(state: State, sigma: float) -> Tensor:
    half = CONFIG.time_features // 2
    phases = torch.tensor([1000 * sigma * exp(-log(10000) * k / half) for k in range(half)], dtype=torch.float64)
    hidden = gelu(linear(state, "tmlp.0", torch.cat([phases.cos(), phases.sin()])), approximate="tanh")
    return linear(state, "tmlp.2", hidden)


def velocity(state: State, latent: Tensor, sigma: float, text: Tensor, shown: list[Tensor]) -> Tensor:
    """Return the velocity of one sample, (C, H, W), of the sequence text, noisy image, references."""
    txt = fused_text(state, text.unflatten(-1, (CONFIG.num_states, -1)))
    images = [linear(state, "first", unfold(image, 2, stride=2).T) for image in (latent, *shown)]
    places = [[0, 0, 0]] * len(txt)
    for i, image in enumerate((latent, *shown)):
        places += [[i, y, x] for y in range(image.shape[1] // 2) for x in range(image.shape[2] // 2)]
    positions, x = torch.tensor(places, dtype=torch.float64), torch.cat([txt, *images])
    end = len(txt) + len(images[0])
    rows = [linear(state, "tproj.1", gelu(level_vector(state, s), approximate="tanh")) for s in (sigma, 0.0)]
    of_token = torch.stack([rows[int(number >= end)] for number in range(len(x))])
    for n in range(CONFIG.num_blocks):
        block = f"blocks.{n}"
        scale1, shift1, gate1, scale2, shift2, gate2 = (of_token + state[f"{block}.mod.lin"]).chunk(6, dim=-1)
        y = rms(state, f"{block}.prenorm", x) * (1 + scale1) + shift1
        x = x + gate1 * attention(state, f"{block}.attn", y, positions)
        y = rms(state, f"{block}.postnorm", x) * (1 + scale2) + shift2
        x = x + gate2 * feed(state, f"{block}.mlp", y)
    scale, shift = level_vector(state, sigma) + state["last.modulation.lin"]
    y = linear(state, "last.linear", rms(state, "last.norm", x[len(txt) : end]) * (1 + scale) + shift)
    return fold(y.T, latent.shape[1:], 2, stride=2)


@pytest.mark.parametrize("sides", [(), ((6, 4),), ((2, 10), (6, 6))], ids=["none", "one", "two"])
def test_references_equal_the_formulas_in_float64(sides: tuple[tuple[int, int], ...]) -> None:
    """References are at (i + 1, row, column) and at noise level 0, attended by all tokens; gradients agree too."""
    model, g = tiny_krea2(1).requires_grad_(), torch.Generator().manual_seed(3)
    latents, _, text, mask = (value.detach() for value in inputs(4, 6))
    sigmas = torch.tensor([1 / 512, 1 / 128])  # float32 angles of high levels are off by 5e-5
    shown = [torch.randn(2, 16, *side, generator=g) for side in sides]
    actual = model(latents, sigmas, text, mask, shown)
    state = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    samples = [
        (latents[b].double(), float(sigmas[b]), text[b, : int(mask[b].sum())].double(), [x[b].double() for x in shown])
        for b in range(2)
    ]
    expected = torch.stack([velocity(state, *sample) for sample in samples])
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max() and expected.abs().max() > 0.1
    weights = torch.randn(actual.shape, generator=g)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameter in model.named_parameters():
        theirs = state[name].grad
        assert parameter.grad is not None and theirs is not None
        assert (parameter.grad - theirs).norm() < 1e-5 * theirs.norm(), name


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
    """Adapters that treat samples differently (by noise level) distinguish them by the first
    axis."""
    model, batch_sizes = tiny_krea2(3), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: batch_sizes.add(len(inputs[0])))
    model(*inputs(4, 6), [torch.zeros(2, 16, 4, 4)])
    assert batch_sizes == {2}
