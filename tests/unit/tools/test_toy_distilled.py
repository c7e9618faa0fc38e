"""Copies of the toy base model with guidance as an input, and the training that an experiment starts."""

import subprocess

import pytest
import torch

from benchmarks.toys import experiments
from benchmarks.toys.make_distilled_toy import GuidanceInput, Noisy
from library.environment.running import child_environment
from tests.tiny.init import fixed_init


def test_a_fixed_guidance_input_is_that_of_the_trained_copy() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=4,
        norm_num_groups=8,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    student = GuidanceInput(unet.eval())
    student.load_state_dict(fixed_init(student, 1))
    generator = torch.Generator().manual_seed(2)
    latents, texts = (torch.randn(2, *shape, generator=generator) for shape in ((4, 4, 4), (3, 8)))
    noisy = Noisy(latents, torch.tensor([10, 900]), texts, torch.tensor([False, False]), torch.tensor([3.0, 3.0]))
    with torch.no_grad():
        plain, guided = student(noisy, None), student(noisy, noisy.scales_B)
        for scale, expected in ((1.0, plain), (3.0, guided)):
            found = student.fix_input(scale)(noisy.latents_BCHW, noisy.timesteps_B, noisy.texts_BTC).sample
            assert torch.allclose(found, expected, atol=1e-5)
    assert (guided - plain).abs().mean() > 1e-3


def test_an_experiment_starts_a_script_in_the_environment_of_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: started.append((command[1:], settings)))
    experiments.call("train_network.py", "--seed", "1")
    ((words, settings),) = started
    assert words == ["train_network.py", "--seed", "1"] and settings["env"] == child_environment()
