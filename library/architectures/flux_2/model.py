"""The denoiser of FLUX.2 (Black Forest Labs 2025), in the layout of the original checkpoints.

It has FLUX.1's streams without biases, with SwiGLU, and with modulation that all blocks of a kind share. Letters: B
samples, C channels, h and w sides of the latent (a token is one latent pixel), L text tokens, T all tokens (text
first), M model width, E text width, V rows of modulation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor

from library.architectures.flux_2.layers import TARGETS
from library.architectures.flux_2.positions import NUM_AXES, REFERENCE_STEP, image_positions, text_positions
from library.base.errors import UserError
from library.models.double_stream import (
    GivenModulation,
    LastModulation,
    MLPEmbedder,
    Modulation,
    StreamConfig,
    StreamTransformer,
    embed_level,
)
from library.models.patches import patchify, unpatchify
from library.models.rotary import Rotary
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES

ROPE_BASE = 2000


@dataclass(frozen=True)
class Flux2Config(StreamConfig):
    """The hyper-parameters. dev takes guidance as an input, klein does not."""

    has_biases: ClassVar[bool] = False
    is_gated: ClassVar[bool] = True

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """The number of values of a head that rotate along each axis: 32 of 128."""
        return (self.head_width // NUM_AXES,) * NUM_AXES


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux2Config:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("FLUX.2", shapes)
    shape, count = read.shape, read.count
    width, in_features = shape("img_in.weight")
    head_width = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    if width % head_width or head_width % (2 * NUM_AXES):
        raise UserError(
            f"not a FLUX.2 model: width {width}, heads of {head_width}, which must be multiples of {2 * NUM_AXES}"
        )
    return Flux2Config(
        in_features=in_features,
        width=width,
        head_width=head_width,
        mlp_width=shape("double_blocks.0.img_mlp.2.weight")[1],
        text_width=shape("txt_in.weight")[1],
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        has_guidance="guidance_in.in_layer.weight" in shapes,
    )


class Flux2(StreamTransformer):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: Flux2Config) -> None:
        super().__init__(config, Rotary(config.rope_axes, ROPE_BASE))
        self.config = config
        width = config.width
        self.time_in = MLPEmbedder(FREQUENCIES, width, bias=False)
        if config.has_guidance:
            self.guidance_in = MLPEmbedder(FREQUENCIES, width, bias=False)
        self.double_stream_modulation_img = Modulation(width, 2, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 2, bias=False)
        self.single_stream_modulation = Modulation(width, 1, bias=False)
        self.add_streams(
            config, lambda parts, first_row: GivenModulation(first_row, 3 * parts), LastModulation(width, bias=False)
        )

    def forward(
        self,
        latents_BChw: Tensor,
        sigmas_B: Tensor,
        text_BLE: Tensor,
        guidance_B: Tensor | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the velocity, shape BChw.

        `sigmas_B` are shares of noise, 0..1. All text tokens are attended to. `guidance_B` is the guidance strength
        that dev imitates; klein ignores it. `references` are the latents of reference images, BChw each; their tokens
        follow those of the noisy latents.
        """
        images = (latents_BChw, *references)
        sides = [image.shape[-2:] for image in images]
        L, device, dtype = text_BLE.shape[1], latents_BChw.device, self.img_in.weight.dtype
        patches_BTC = torch.cat([patchify(image, 1).to(dtype) for image in images], dim=1)
        image_positions_T4 = [image_positions(h, w, device, REFERENCE_STEP * i) for i, (h, w) in enumerate(sides)]
        positions_T4 = torch.cat([text_positions(L, device), *image_positions_T4])
        # Positions on each axis are below the numbers by which tables of angles are kept.
        num_times = REFERENCE_STEP * len(references) + 1
        rope = self.rotary(positions_T4, (num_times, *map(max, zip(*sides, strict=True)), L))
        vecs = self.modulation(sigmas_B, guidance_B, dtype)
        h, w = sides[0]
        velocity_BTC = self.run_blocks(patches_BTC, (text_BLE.to(dtype),), vecs, rope, None, h * w)
        return unpatchify(velocity_BTC, h, w, 1)

    def modulation(self, sigmas_B: Tensor, guidance_B: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the rows, BVM, of each double block (image, then text) and each single block, then the last layer's
        vector, BM."""
        vec_BM = embed_level(self.time_in, sigmas_B, dtype)
        if self.config.has_guidance:
            assert guidance_B is not None
            vec_BM = vec_BM + embed_level(self.guidance_in, guidance_B, dtype)
        double = (self.double_stream_modulation_img, self.double_stream_modulation_txt)
        yield from repeat(torch.cat([layer.rows(vec_BM) for layer in double], dim=1), len(self.double_blocks))
        yield from repeat(self.single_stream_modulation.rows(vec_BM), len(self.single_blocks))
        yield vec_BM
