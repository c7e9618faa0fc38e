"""The denoiser and the text encoder of Knots. Letters: B samples, T tokens, M width, C channels, H height, W width."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from library.architectures.knots.layers import TARGETS
from library.memory.blocks import BlockRunner, Stacks, plain
from library.models.shapes import ShapeReader

NUM_BYTES = 256
NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class KnotsConfig:
    channels: int
    width: int
    num_knots: int


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> KnotsConfig:
    """Infer the sizes of a denoiser. Raises UserError for the shapes of another model."""
    reader = ShapeReader("Knots", shapes)
    width, channels = reader.shape("tie.weight")
    return KnotsConfig(channels, width, reader.count("knots"))


class Knot(nn.Module):
    """A block that adds the mean of the text to every latent. Network modules find layers by this class name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)
        self.lift = nn.Linear(width, width)

    def forward(self, x_BTM: Tensor, text_BTM: Tensor) -> Tensor:
        mixed_BTM = self.mix(torch.cat([x_BTM, text_BTM.mean(1, keepdim=True).expand_as(x_BTM)], dim=-1))
        after_BTM: Tensor = x_BTM + self.lift(silu(mixed_BTM))
        return after_BTM


class Knots(nn.Module):
    """The denoiser: predicts the noise in latents (BCHW) from the text and the timestep."""

    adapter_targets = TARGETS

    def __init__(self, config: KnotsConfig) -> None:
        super().__init__()
        self.runner: BlockRunner = plain
        self.tie = nn.Linear(config.channels, config.width)
        self.knots = nn.ModuleList(Knot(config.width) for _ in range(config.num_knots))
        self.untie = nn.Linear(config.width, config.channels)

    def stacks(self) -> Stacks:
        return [list(self.knots)]

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BTM: Tensor) -> Tensor:
        height, width = latents_BCHW.shape[2:]
        time_B11 = (timesteps_B / NUM_TIMESTEPS).to(latents_BCHW.dtype)[:, None, None]
        x_BTM = self.tie(latents_BCHW.flatten(2).transpose(1, 2)) + time_B11
        for knot in self.knots:
            x_BTM = self.runner(knot, x_BTM, text_BTM)
        noise_BCHW: Tensor = self.untie(x_BTM).transpose(1, 2).unflatten(2, (height, width))
        return noise_BCHW


class ByteEncoder(nn.Module):
    """A text encoder that embeds each byte of a caption."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(NUM_BYTES, width)
        self.project = nn.Linear(width, width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        text_BTM: Tensor = self.project(self.bytes(ids_BT))
        return text_BTM
