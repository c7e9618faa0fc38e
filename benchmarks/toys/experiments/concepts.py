"""Two subjects in one adapter: "kova circle", a pink heart, and "milu circle", a blue diamond, learned from 48 pictures
of one (64 x 64) and 48 of both side by side (128 x 64); a caption names the left one first. The base model has learned
pairs of the shapes that it knows, in 1,500 steps; 12 % of the shapes in its pairs are as asked. Both methods train a
LoRA of rank 8 for each subject on the linear layers of the U-Net's transformer blocks for 450 steps, on the same
pictures with the same noise and the same learning rate of 3e-3.

Token masks: a subject's LoRA changes keys and values of text only at the tokens of its trigger, and all other layers
everywhere (token focus masking of TARA, arXiv 2508.08812, as in its authors' code). Their alignment loss is not tested.
The last row draws with the adapters of the second as a program that knows no masks would.

Cells: of 48 pictures of one subject, of 96 subjects in 48 pictures of both, and of these 48 pictures, those with shape,
colour, background and style as asked; bleeding is the share of the 96 that have the other's shape or colour.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.toys.make_toy_base import SCALING_FACTOR, Trainer, to_tensor, tokenize
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from tools import start
from tools.quickstart.sampling import GUIDANCE_SCALE, SAMPLING_STEPS, load_pipeline
from tools.quickstart.toy_world import BACKGROUNDS, COLOURS, IMAGE_SIZE, KNOWN_SHAPES, Scene, Seen, draw_scene, look_at

COLUMNS = ("alone", "each of both", "both", "bleeding")
CLASS = "circle"
SUBJECTS = {"kova": ("heart", "pink"), "milu": ("diamond", "blue")}
NUM_BASE_STEPS, NUM_STEPS, RANK = 1500, 450, 8
Thing = tuple[str, Scene]  # its words in a caption, and what they ask for


def choose_known(rng: np.random.Generator, background: str) -> Thing:
    scene = Scene(str(rng.choice(KNOWN_SHAPES)), str(rng.choice([*COLOURS])), background, "large")
    return f"{scene.colour} {scene.shape}", scene


def list_pictures() -> tuple[list[list[Thing]], list[list[Thing]]]:
    """Return 48 pictures of one subject, and 48 of this and the other, from left to right."""
    alone = [(f"{word} {CLASS}", Scene(*SUBJECTS[word], place, "large")) for place in BACKGROUNDS for word in SUBJECTS]
    both = [[thing, alone[number ^ 1]] for number, thing in enumerate(alone)]
    return [[thing] for thing in alone] * 8, both * 8


def caption(things: Sequence[Thing]) -> str:
    """Return "a red circle and a kova circle on a white background"."""
    return " and ".join(f"a {words}" for words, _ in things) + f" on a {things[0][1].background} background"


def encode(pipeline: Any, pictures: Sequence[Sequence[Thing]], rng: np.random.Generator) -> Tensor:
    """Draw the things of each picture from left to right. Return latents (B, 4, 8, 8 or 16)."""
    images = [np.concatenate([draw_scene(scene, rng) for _, scene in things], axis=1) for things in pictures]
    with torch.no_grad():
        latents_BCHW: Tensor = pipeline.vae.encode(to_tensor(images)).latent_dist.mean * SCALING_FACTOR
    return latents_BCHW


def predict_loss(pipeline: Any, latents_BCHW: Tensor, hidden_BTC: Tensor) -> Tensor:
    noise_BCHW, timesteps_B = torch.randn_like(latents_BCHW), torch.randint(1000, (len(latents_BCHW),))
    noisy_BCHW = pipeline.scheduler.add_noise(latents_BCHW, noise_BCHW, timesteps_B)
    return mse_loss(pipeline.unet(noisy_BCHW, timesteps_B, hidden_BTC).sample, noise_BCHW)


def train_base(pipeline: Any) -> None:
    """Teach the base model pairs. A fifth of the shapes have no colour in their caption, as subjects have none."""
    rng, modules = np.random.default_rng(1), [pipeline.unet, pipeline.text_encoder]
    torch.manual_seed(1)
    trainer = Trainer(modules, 5e-4, 0.01, NUM_BASE_STEPS)
    for _ in range(NUM_BASE_STEPS):
        losses = []
        for num_things, count in ((1, 6), (2, 12)):
            places = rng.choice([*BACKGROUNDS], size=count)
            pictures = [[choose_known(rng, str(place)) for _ in range(num_things)] for place in places]
            latents_BCHW = encode(pipeline, pictures, rng)
            for things in pictures:
                things[:] = [(scene.shape if rng.random() < 0.2 else words, scene) for words, scene in things]
            captions = ["" if rng.random() < 0.1 else caption(things) for things in pictures]
            hidden_BTC = pipeline.text_encoder(tokenize(pipeline.tokenizer, captions)).last_hidden_state
            losses.append(count * predict_loss(pipeline, latents_BCHW, hidden_BTC) / 18)
        trainer.step(torch.stack(losses).sum())
    for module, average in zip(modules, trainer.averages, strict=True):
        module.load_state_dict(average.state_dict())


def load_base(file: Path) -> Any:
    """Load the base model that knows pairs, or train it if its file does not exist."""
    pipeline = load_pipeline(start.ROOT / start.TOY_BASE)
    modules = nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    if not file.is_file():
        train_base(pipeline)
        save_safetensors(file, modules.state_dict(), {})
    modules.load_state_dict(load_state_dict(file))
    modules.requires_grad_(False)
    return pipeline


class Adapter(nn.Module):
    """The LoRAs of all subjects, applied by hooks. Letters: S subjects, R rank, D and O inputs and outputs."""

    def __init__(self, pipeline: Any, has_masks: bool) -> None:
        super().__init__()
        self.has_masks, self.factors = has_masks, nn.ParameterDict()
        rows = tokenize(pipeline.tokenizer, list(SUBJECTS)).tolist()
        self.triggers = [torch.tensor(row[1 : row.index(pipeline.tokenizer.eos_token_id)]) for row in rows]
        for name, module in pipeline.unet.named_modules():
            if isinstance(module, nn.Linear) and "transformer_blocks" in name:
                down_SRD = torch.randn(len(SUBJECTS), RANK, module.in_features) / module.in_features**0.5
                factors = nn.Parameter(down_SRD), nn.Parameter(torch.zeros(len(SUBJECTS), module.out_features, RANK))
                for kind, factor in zip(("down", "up"), factors, strict=True):
                    self.factors[f"{name.replace('.', '_')}_{kind}"] = factor
                module.register_forward_hook(self._make_hook(name, *factors))

    def set_captions(self, ids_BT: Tensor) -> None:
        """Find the tokens of each subject's trigger, shape (S, B, T)."""
        self.is_trigger_SBT = torch.zeros(len(self.triggers), *ids_BT.shape, dtype=torch.bool)
        for is_trigger_BT, trigger in zip(self.is_trigger_SBT, self.triggers, strict=True):
            for row, first in (ids_BT.unfold(1, len(trigger), 1) == trigger).all(2).nonzero():
                is_trigger_BT[row, first : first + len(trigger)] = True

    def _make_hook(self, name: str, down_SRD: Tensor, up_SOR: Tensor) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output_BTO: Tensor) -> Tensor:
            changes_SBTO = inputs[0] @ down_SRD.mT[:, None] @ up_SOR.mT[:, None]
            if self.has_masks and name.endswith(("attn2.to_k", "attn2.to_v")):
                changes_SBTO = changes_SBTO * self.is_trigger_SBT[..., None]
            return output_BTO + changes_SBTO.sum(0)

        return hook


def train(pipeline: Any, has_masks: bool, seed: int) -> Adapter:
    torch.manual_seed(seed)
    rng, sets = np.random.default_rng(seed), []
    for pictures in list_pictures():
        ids_NT = tokenize(pipeline.tokenizer, [caption(things) for things in pictures])
        sets.append((encode(pipeline, pictures, rng), ids_NT, pipeline.text_encoder(ids_NT).last_hidden_state))
    adapter = Adapter(pipeline, has_masks)
    optimizer = torch.optim.AdamW(adapter.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        losses = []
        for count, (latents_NCHW, ids_NT, hidden_NTC) in zip((4, 6), sets, strict=True):
            rows = torch.randperm(len(ids_NT))[:count]
            adapter.set_captions(ids_NT[rows])
            losses.append(predict_loss(pipeline, latents_NCHW[rows], hidden_NTC[rows]))
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).mean())
        optimizer.step()
        schedule.step()
    return adapter.eval()


def draw(pipeline: Any, adapter: Adapter, pictures: Sequence[Sequence[Thing]]) -> Iterator[list[tuple[Scene, Seen]]]:
    """Yield what is asked and what is seen in each place of a picture; its noise depends on its position alone."""
    captions = [caption(things) for things in pictures]
    adapter.set_captions(tokenize(pipeline.tokenizer, [""] * len(captions) + captions))
    images = pipeline(
        captions,
        width=IMAGE_SIZE * len(pictures[0]),
        height=IMAGE_SIZE,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(1000 + number) for number in range(len(captions))],
        output_type="np",
    ).images
    for things, image in zip(pictures, np.rint(images * 255).astype(np.uint8), strict=True):
        places = np.split(image, len(things), axis=1)
        yield [(scene, look_at(place)) for (_, scene), place in zip(things, places, strict=True)]


def count(pipeline: Any, adapter: Adapter) -> tuple[float, ...]:
    """Draw all pictures and return the cells of a row."""
    of_alone, of_both = ([*draw(pipeline, adapter, pictures)] for pictures in list_pictures())
    bled = [
        seen.shape == other.shape or seen.colour == other.colour
        for pair in of_both
        for (_, seen), (other, _) in zip(pair, pair[::-1], strict=True)
    ]
    is_right = [[seen.shows(scene) for scene, seen in pair] for pair in of_both]
    alone = mean(seen.shows(scene) for ((scene, seen),) in of_alone)
    return alone, float(np.mean(is_right)), mean(map(all, is_right)), mean(bled)


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    figures = {}
    for name, has_masks in (("plain", False), ("token masks", True)):
        pipeline = load_base(folder.parent / "base.safetensors")
        adapter = train(pipeline, has_masks, seed)
        figures[name] = count(pipeline, adapter)
    adapter.has_masks = False
    return figures | {"token masks, drawn without them": count(pipeline, adapter)}
