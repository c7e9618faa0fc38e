"""Representation alignment (REPA, arXiv 2410.06940) added to the quickstart's training: hidden states of the U-Net's
middle block (2 x 2 cells; the best block for U-Nets in arXiv 2503.18414), projected by an MLP of three layers that
trains beside the adapter, are aligned with features of the clean image by a frozen encoder; the added loss is the
negative cosine similarity, averaged over cells, times a weight. The encoder is a small CNN that learned shape, colour,
background and size from 38,400 images of the known world and names all four in at least 95 % of 210 new ones; like the
base model, it has never seen a heart. Without alignment the projector trains alone.

Hearts and known world: the share of 84 and 21 images that show shape, colour, background and style of their prompt.
Loss: on 42 hearts that were not trained, by `tools/choose_checkpoint.py`, relative to the loss without alignment.
Cosine: the mean similarity in the last 100 of 400 steps.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, cross_entropy

import train_network
from benchmarks.toys.experiments import CONFIG, measure
from benchmarks.toys.experiments.averages import measure_losses
from benchmarks.toys.make_toy_base import to_tensor
from library.training.command_line.cli import read_command_line
from library.training.step import losses
from tools import start
from tools.quickstart.toy_world import BACKGROUNDS, COLOURS, KNOWN_SHAPES, SIZES, Scene, draw_scene, list_scenes

PAGE = Path(__file__).parents[1] / "representation_alignment.md"
COLUMNS = ("hearts", "known world", "loss", "cosine")
WEIGHTS = {"no alignment": 0.0, "weight 0.1": 0.1, "weight 0.5": 0.5}
WORDS = {"shape": KNOWN_SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "size": tuple(SIZES)}
WIDTH = 96  # channels of the middle block and of the encoder's features
NUM_ENCODER_STEPS = 1200


def number_words(scenes: list[Scene]) -> Tensor:
    """Return the position of each word in its vocabulary, shape (4, B)."""
    return torch.tensor([[words.index(getattr(scene, kind)) for scene in scenes] for kind, words in WORDS.items()])


def train_encoder(seed: int) -> nn.Module:
    """Return a frozen encoder from pixels (B, 3, 64, 64) to features (B, 96, 8, 8)."""
    torch.manual_seed(seed)
    rng, scenes, layers = np.random.default_rng(seed), list_scenes(), list[nn.Module]()
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, WIDTH, 1), (WIDTH, WIDTH, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.SiLU()]
    encoder, head = nn.Sequential(*layers), nn.Linear(WIDTH, sum(map(len, WORDS.values())))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=NUM_ENCODER_STEPS)

    def name(scenes: list[Scene]) -> tuple[Tensor, ...]:
        logits: Tensor = head(encoder(to_tensor([draw_scene(scene, rng) for scene in scenes])).mean((2, 3)))
        return logits.split([len(words) for words in WORDS.values()], dim=1)

    for _ in range(NUM_ENCODER_STEPS):
        batch = [scenes[int(number)] for number in rng.integers(len(scenes), size=32)]
        of_kinds = zip(name(batch), number_words(batch), strict=True)
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack([cross_entropy(*of_kind) for of_kind in of_kinds]).sum())
        optimizer.step()
        schedule.step()
    encoder.eval()
    named = torch.stack([logits.argmax(1) for logits in name(scenes)])
    share = (named == number_words(scenes)).all(0).float().mean().item()
    assert share >= 0.95, f"the encoder names only {share:.0%} of new images"
    return encoder.requires_grad_(False)


def align(projector: nn.Module, weight: float, hidden_BCHW: Tensor, features_BCHW: Tensor) -> Tensor:
    """Return the negative cosine similarity of projected hidden states and features, averaged over cells, shape B.

    Hidden states receive `weight` times its gradient and the projector all of it, which for AdamW is as good as a
    weighted loss; so weight 0 measures the similarity that a training without alignment has.
    """
    hidden_BCHW = hidden_BCHW.detach() + weight * (hidden_BCHW - hidden_BCHW.detach())
    features_BCHW = adaptive_avg_pool2d(features_BCHW, hidden_BCHW.shape[2:])
    projected_BNC = projector(hidden_BCHW.flatten(2).mT)
    return -cosine_similarity(projected_BNC, features_BCHW.flatten(2).mT, dim=-1).mean(1)


class Alignment:
    """A step's loss with alignment added, and the mean cosine similarities of all steps."""

    def __init__(self, weight: float, features: Mapping[str, Tensor], seed: int) -> None:
        """`features` (96, 8, 8) are by the file name of the image."""
        torch.manual_seed(seed)
        self.weight, self.features, self.cosines = weight, features, list[float]()
        layers = [nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, WIDTH)]
        self.projector = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.projector.parameters())  # 1e-3, as the adapter
        self._compute_losses = losses.compute_losses

    def compute_losses(self, context: Any, objective: Any, batch: Any, *values: Any) -> Tensor:
        """Stand in for `losses.compute_losses`, and move the projector by the gradients of the step before."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        hidden: list[Tensor] = []
        block = context.models.denoiser.mid_block
        handle = block.register_forward_hook(lambda _block, _inputs, output: hidden.append(output))
        losses_B = self._compute_losses(context, objective, batch, *values)
        handle.remove()
        features_BCHW = torch.stack([self.features[Path(key).name] for key in batch.keys])
        added_B = align(self.projector, self.weight, *hidden, features_BCHW)
        self.cosines.append(-added_B.mean().item())
        return losses_B + added_B


def train(name: str, alignment: Alignment, seed: int, folder: Path) -> Path:
    """Train the quickstart's adapter with alignment. Return its file."""
    dataset = (start.ROOT / "configs/quickstart/dataset.toml").read_text(encoding="utf-8")
    dataset = dataset.replace('"configs/quickstart/dataset"', json.dumps(str(start.ROOT / start.PHOTOS)))
    (folder / "hearts.toml").write_text(dataset, encoding="utf-8")
    words = ["--config_file", str(start.ROOT / CONFIG), "--dataset_config", str(folder / "hearts.toml"), "--seed"]
    words += [str(seed), "--pretrained_model_name_or_path", str(start.ROOT / start.TOY_BASE), "--no_report"]
    words += ["--output_dir", str(folder), "--output_name", name]
    args = read_command_line(train_network.setup_parser(), words).args
    with patch.object(losses, "compute_losses", alignment.compute_losses):
        train_network.NetworkTrainer().train(args)
    return folder / f"{name}.safetensors"


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    encoder, figures, files = train_encoder(seed), {}, []
    images = {path.name: np.asarray(Image.open(path)) for path in (start.ROOT / start.PHOTOS).glob("*.png")}
    features = dict(zip(images, encoder(to_tensor(list(images.values()))), strict=True))
    for number, (row, weight) in enumerate(WEIGHTS.items()):
        alignment = Alignment(weight, features, seed)
        files.append(train(f"alignment_{number}", alignment, seed, folder))
        figures[row] = (measure(files[-1]), mean(alignment.cosines[-100:]))
    of_files = measure_losses(files, seed, folder)
    rows = zip(figures.items(), of_files, strict=True)
    return {row: (*shares, loss / of_files[0], cosine) for (row, (shares, cosine)), loss in rows}
