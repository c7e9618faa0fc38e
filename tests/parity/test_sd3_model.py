"""Our denoiser of Stable Diffusion 3 against diffusers' SD3Transformer2DModel with the same weights."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tests.tiny.sd3 import (
    CONFIGS,
    DUAL,
    PLAIN,
    diffusers_mmdit,
    inputs,
    mmdit_weights,
    run_ours,
    run_theirs,
    tiny_mmdit,
)

SEED = 41
SIZES = ((16, 16), (24, 12), (10, 30))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_and_gradients_equal_diffusers(name: str, size: tuple[int, int]) -> None:
    config = CONFIGS[name]
    ours, theirs = tiny_mmdit(config, SEED), diffusers_mmdit(config, mmdit_weights(config, SEED))
    probe = torch.randn(2, config.in_channels, *size, generator=torch.Generator().manual_seed(5))
    gradients = []
    velocities = []
    for run, model in ((run_ours, ours), (run_theirs, theirs)):
        values = inputs(config, size, seed=6)
        velocities.append(run(model, values))
        wanted = [values[key] for key in ("latents", "context", "pooled")]
        gradients.append(torch.autograd.grad((velocities[-1] * probe).sum(), wanted))
    assert velocities[0].shape == (2, config.in_channels, *size)
    assert relative_error(velocities[0], velocities[1]) < 1e-4
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_affects_the_output(name: str) -> None:
    """A weight without effect would hide a wrong name."""
    config = CONFIGS[name]
    model = tiny_mmdit(config, SEED).requires_grad_()
    values = inputs(config, (16, 16), seed=6)
    run_ours(model, values).square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    # The text queries of the last block are unused.
    last = f"joint_blocks.{config.depth - 1}.context_block.attn.ln_q.weight"
    assert dead == ({last} if config.norms_queries else set())


def test_a_network_may_take_away_the_weight_of_the_first_layer() -> None:
    """LyCORIS' full weights replace both the weight and the forward of a layer."""
    model, values = tiny_mmdit(PLAIN, SEED), inputs(PLAIN, (8, 8), seed=6)
    expected = run_ours(model, values)
    layer = model.x_embedder.proj
    layer.forward = partial(conv2d, weight=layer.weight, bias=layer.bias, stride=layer.stride)
    del layer.weight
    assert torch.equal(run_ours(model, values), expected)


def test_an_image_may_use_any_crop_of_the_position_table() -> None:
    model = tiny_mmdit(DUAL, SEED)
    side = DUAL.positions_side
    numbered = torch.arange(side**2, dtype=torch.float32).view(1, -1, 1).expand(-1, -1, DUAL.width)
    model.pos_embed = numbered.contiguous()
    positions = model.positions(2, 3, (5, 7))[0, :, 0].tolist()
    assert positions == [5 * side + 7, 5 * side + 8, 5 * side + 9, 6 * side + 7, 6 * side + 8, 6 * side + 9]
    assert model.positions(2, 2, None)[0, 0, 0] == (side // 2 - 1) * side + side // 2 - 1


def test_an_image_larger_than_the_position_table_is_rejected() -> None:
    with pytest.raises(ValueError, match="an image of 784x64 pixels exceeds this model's limit of 384x384"):
        run_ours(tiny_mmdit(PLAIN, SEED), inputs(PLAIN, (8, 98), seed=6))
