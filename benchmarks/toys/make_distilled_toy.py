"""Distil the quickstart's base model: a U-Net that draws with guidance in one call per step, or in four steps.

`--kind guidance` fits u + 3 (c - u), with c and u the base's outputs for the caption and for an empty one; an empty
caption keeps u. `--kind guidance_input` fits u + s (c - u) for every s from 1 to 4, which is an input, and writes a
folder for each of three values: input_1, input_1.5 and input_3. `--kind four_steps` fits, at four noise levels, the
step that takes the base a quarter of its 20 guided DDIM steps. The other parts are copied. Drawn and trained from fixed
seeds; 2500 steps take about 8 minutes on one CPU core, of four_steps 20.
"""

import argparse
import copy
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from benchmarks.toys.make_toy_base import NUM_TIMESTEPS, SCALING_FACTOR, to_tensor, tokenize
from benchmarks.toys.toy_files import check_model_folder, new_model
from library.base.command_parser import make_parser
from library.commands.command import command
from tools.quickstart.sampling import SAMPLING_STEPS, load_pipeline
from tools.quickstart.toy_world import QUICKSTART, draw_scene, list_scenes

logger = logging.getLogger(__name__)

WRITER = "benchmarks/toys/make_distilled_toy.py"
GUIDANCE, MOST_GUIDANCE = 3.0, 4.0
INPUTS = (1.0, 1.5, GUIDANCE)
NUM_IMAGES, BATCH_SIZE, ENCODED_AT_ONCE = 1500, 16, 50
LEARNING_RATE = 4e-4
EMPTY_CAPTION_SHARE = 0.1
NUM_FEW_STEPS = 4


@dataclass(frozen=True)
class Noisy:
    """A batch of noised latents with their captions' features, which captions are empty, and the guidance."""

    latents_BCHW: Tensor
    timesteps_B: Tensor
    texts_BTC: Tensor
    is_empty_B: Tensor
    scales_B: Tensor


@dataclass(frozen=True)
class Teacher:
    """The base model's U-Net, guided away from the empty caption."""

    unet: Any
    empty_TC: Tensor

    @torch.no_grad()
    def guided(self, noisy: Noisy) -> tuple[Tensor, Tensor]:
        """Return the guided prediction and the one for the empty caption."""
        latents_BCHW, timesteps_B, texts_BTC = noisy.latents_BCHW, noisy.timesteps_B, noisy.texts_BTC
        empty_BTC = self.empty_TC.expand_as(texts_BTC)
        both = torch.cat([latents_BCHW, latents_BCHW]), torch.cat([timesteps_B, timesteps_B])
        c_BCHW, u_BCHW = self.unet(*both, torch.cat([texts_BTC, empty_BTC])).sample.chunk(2)
        return u_BCHW + noisy.scales_B[:, None, None, None] * (c_BCHW - u_BCHW), u_BCHW


class GuidanceInput(torch.nn.Module):
    """A U-Net with the guidance scale as an input, which shifts the first layer of the time embedding. Without scales
    it is the U-Net itself."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.shift_H = torch.nn.Parameter(torch.zeros(unet.time_embedding.linear_1.out_features))

    def forward(self, noisy: Noisy, scales_B: Tensor | None) -> Tensor:
        def shift(layer: Any, args: Any, output_BH: Tensor) -> Tensor:
            return output_BH if scales_B is None else output_BH + (scales_B[:, None] - 1) * self.shift_H

        with self.unet.time_embedding.linear_1.register_forward_hook(shift):
            output: Tensor = self.unet(noisy.latents_BCHW, noisy.timesteps_B, noisy.texts_BTC).sample
        return output

    def fix_input(self, scale: float) -> Any:
        """Return the U-Net that has this input always: the shift becomes part of a bias."""
        unet = copy.deepcopy(self.unet)
        with torch.no_grad():
            unet.time_embedding.linear_1.bias += (scale - 1) * self.shift_H
        return unet


def fit_guidance(teacher: Teacher, noisy: Noisy, alphas: Tensor) -> Tensor:
    """Return u + s (c - u), and u for empty captions."""
    guided_BCHW, u_BCHW = teacher.guided(noisy)
    return torch.where(noisy.is_empty_B[:, None, None, None], u_BCHW, guided_BCHW)


def fit_few_steps(teacher: Teacher, noisy: Noisy, alphas: Tensor) -> Tensor:
    """Return the noise prediction whose single DDIM step ends where the teacher's finer guided steps do."""
    jump, fine = NUM_TIMESTEPS // NUM_FEW_STEPS, NUM_TIMESTEPS // SAMPLING_STEPS

    def scales(timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        a_B111 = alphas[timesteps_B.clamp(min=0)][:, None, None, None]
        return a_B111.sqrt(), (1 - a_B111).sqrt()

    x_BCHW, t_B = noisy.latents_BCHW, noisy.timesteps_B
    for _ in range(jump // fine):
        e_BCHW, _ = teacher.guided(replace(noisy, latents_BCHW=x_BCHW, timesteps_B=t_B))
        (a, s), (a_next, s_next) = scales(t_B), scales(t_B - fine)
        x_BCHW, t_B = a_next * (x_BCHW - s * e_BCHW) / a + s_next * e_BCHW, t_B - fine
    (a, s), (a_next, s_next) = scales(noisy.timesteps_B), scales(noisy.timesteps_B - jump)
    return (x_BCHW - a_next / a * noisy.latents_BCHW) / (s_next - a_next * s / a)


KINDS: dict[str, Callable[[Teacher, Noisy, Tensor], Tensor]] = {
    "guidance": fit_guidance,
    "guidance_input": fit_guidance,
    "four_steps": fit_few_steps,
}


@torch.no_grad()
def draw_images(pipeline: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents and text features of images of the known world, and the features of the empty caption."""
    rng, scenes = np.random.default_rng(0), list_scenes()
    drawn = [(scenes[i], draw_scene(scenes[i], rng)) for i in rng.integers(len(scenes), size=NUM_IMAGES)]
    latents, texts = [], []
    for start in range(0, NUM_IMAGES, ENCODED_AT_ONCE):
        some = drawn[start : start + ENCODED_AT_ONCE]
        latents.append(pipeline.vae.encode(to_tensor([image for _, image in some])).latent_dist.mean * SCALING_FACTOR)
        texts.append(pipeline.text_encoder(tokenize(pipeline.tokenizer, [s.caption() for s, _ in some]))[0])
    (empty_TC,) = pipeline.text_encoder(tokenize(pipeline.tokenizer, [""]))[0]
    return torch.cat(latents), torch.cat(texts), empty_TC


def draw_timesteps(kind: str, generator: torch.Generator) -> Tensor:
    if kind != "four_steps":
        return torch.randint(NUM_TIMESTEPS, (BATCH_SIZE,), generator=generator)
    jump = NUM_TIMESTEPS // NUM_FEW_STEPS
    return jump * torch.randint(1, NUM_FEW_STEPS + 1, (BATCH_SIZE,), generator=generator) - 1


def draw_scales(kind: str, generator: torch.Generator) -> Tensor:
    if kind != "guidance_input":
        return torch.full((BATCH_SIZE,), GUIDANCE)
    return 1 + (MOST_GUIDANCE - 1) * torch.rand(BATCH_SIZE, generator=generator)


def distil(pipeline: Any, kind: str, num_steps: int) -> GuidanceInput:
    """Return a copy of the pipeline's U-Net that was trained to draw as `kind` says."""
    latents_NCHW, texts_NTC, empty_TC = draw_images(pipeline)
    alphas, generator = pipeline.scheduler.alphas_cumprod, torch.Generator().manual_seed(0)
    teacher = Teacher(pipeline.unet.eval().requires_grad_(False), empty_TC)
    student = GuidanceInput(copy.deepcopy(pipeline.unet)).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    progress = tqdm(range(num_steps), desc=f"distil {kind}", mininterval=5)
    for _ in progress:
        i_B = torch.randint(NUM_IMAGES, (BATCH_SIZE,), generator=generator)
        t_B, noise = draw_timesteps(kind, generator), torch.randn(latents_NCHW[i_B].shape, generator=generator)
        is_empty_B = torch.rand(BATCH_SIZE, generator=generator) < EMPTY_CAPTION_SHARE
        texts_BTC = torch.where(is_empty_B[:, None, None], empty_TC, texts_NTC[i_B])
        x_BCHW = pipeline.scheduler.add_noise(latents_NCHW[i_B], noise, t_B)
        noisy = Noisy(x_BCHW, t_B, texts_BTC, is_empty_B, draw_scales(kind, generator))
        scales_B = noisy.scales_B if kind == "guidance_input" else None
        loss = mse_loss(student(noisy, scales_B), KINDS[kind](teacher, noisy, alphas))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return student.eval()


def make_distilled_toy(args: argparse.Namespace) -> None:
    """Distil, and write the folder."""
    check_model_folder("--out", args.out, WRITER)
    pipeline = load_pipeline(args.base)
    student = distil(pipeline, args.kind, args.steps)
    inputs = {f"input_{scale:g}": scale for scale in INPUTS} if args.kind == "guidance_input" else {"": 1.0}
    with new_model(args.out, WRITER) as out:
        for name, scale in inputs.items():
            shutil.copytree(args.base, out / name, dirs_exist_ok=True)
            shutil.rmtree(out / name / "unet")
            student.fix_input(scale).half().save_pretrained(str(out / name / "unet"))
        if args.kind == "four_steps":  # from pure noise, which the default spacing would leave out
            type(pipeline.scheduler).from_config(
                pipeline.scheduler.config, timestep_spacing="trailing"
            ).save_pretrained(str(out / "scheduler"))
    logger.info("%s: distilled %s", args.out, args.kind)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        __doc__, "  python3 -m benchmarks.toys make_distilled_toy --kind guidance --out output/toy_distilled"
    )
    parser.add_argument("--kind", choices=sorted(KINDS), required=True, help="how the copy draws")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", type=Path, default=QUICKSTART / "toy_base", help="diffusers folder to distil")
    parser.add_argument("--steps", type=int, default=2500, help="training steps (default: 2500)")
    return parser


main = command(setup_parser, make_distilled_toy)
