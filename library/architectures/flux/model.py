"""The denoiser of FLUX.1 (Black Forest Labs 2024) and Chroma, in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, T all tokens (text first, then the images in row order), N heads, D
head width, M model width, F features of a patch, V rows of modulation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from library.architectures.flux.approximator import (
    Approximator,
    ApproximatorConfig,
    modulation_inputs,
    read_approximator,
)
from library.architectures.flux.layers import CHROMA_TARGETS, TARGETS
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
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import Rotary
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES

PATCH = 2
ROPE_STEP = 32  # head widths are multiples, because the pairs of a head are split 1 : 3.5 : 3.5


@dataclass(frozen=True)
class FluxConfig(StreamConfig):
    """The hyper-parameters. dev and Chroma take guidance as an input, schnell does not."""

    pooled_width: int  # of CLIP-L; 0 for Chroma, whose modulation uses no caption
    approximator: ApproximatorConfig | None = None  # Chroma's, which computes the modulation of all blocks

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """The number of values of a head that rotate with (text, row, column): 16, 56 and 56 of 128."""
        first = self.head_width // 8
        return (first, (self.head_width - first) // 2, (self.head_width - first) // 2)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    approximator = read_approximator(shapes)
    read = ShapeReader("FLUX.1" if approximator is None else "Chroma", shapes)
    shape, count = read.shape, read.count
    width, in_features = shape("img_in.weight")
    head_width = shape("double_blocks.0.img_attn.norm.query_norm.scale")[0]
    if width % head_width or head_width % ROPE_STEP:
        raise UserError(
            f"not a {read.model} model: width {width}, heads of {head_width}, which must be multiples of {ROPE_STEP}"
        )
    return FluxConfig(
        in_features=in_features,
        width=width,
        head_width=head_width,
        mlp_width=shape("double_blocks.0.img_mlp.2.weight")[1],
        text_width=shape("txt_in.weight")[1],
        pooled_width=0 if approximator else shape("vector_in.in_layer.weight")[1],
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        has_guidance=approximator is not None or "guidance_in.in_layer.weight" in shapes,
        approximator=approximator,
    )


class Flux(StreamTransformer):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text.

    With `config.approximator` it is Chroma: the same streams without CLIP-L, modulated by one network's output for the
    noise level instead of by a layer in each block.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config, Rotary(config.rope_axes))
        self.config = config
        self.adapter_targets = TARGETS if config.approximator is None else CHROMA_TARGETS
        c = config
        last_modulation: nn.Module
        if c.approximator is not None:
            self.distilled_guidance_layer = Approximator(c.approximator, c.width)
            last_modulation = GivenModulation(0, 2)
        else:
            self.time_in = MLPEmbedder(FREQUENCIES, c.width)
            self.vector_in = MLPEmbedder(c.pooled_width, c.width)
            if c.has_guidance:
                self.guidance_in = MLPEmbedder(FREQUENCIES, c.width)
            last_modulation = LastModulation(c.width)
        self.add_streams(c, partial(make_modulation, c), last_modulation)

    def forward(
        self,
        latents_BCHW: Tensor,
        sigmas_B: Tensor,
        text_BLE: Tensor,
        pooled_BE: Tensor | None,
        guidance_B: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the velocity, shape BCHW.

        `sigmas_B` are shares of noise, 0..1. `pooled_BE` is CLIP-L's pooled state, None for Chroma. `guidance_B` is the
        guidance strength that a distilled model imitates; a model without that input ignores it. `text_mask_BL` is true
        for tokens that may be attended to, None for all. `references` are the latents of reference images, BCHW each;
        their tokens follow those of the noisy latents, as in FLUX.1 Kontext (Labs et al. 2025).
        """
        images = (latents_BCHW, *references)
        sides = [(image.shape[-2] // PATCH, image.shape[-1] // PATCH) for image in images]
        dtype = self.img_in.weight.dtype
        patches_BTF = torch.cat([patchify(image, PATCH).to(dtype) for image in images], dim=1)
        vecs = self.modulation(sigmas_B, pooled_BE, guidance_B, dtype)
        # Positions on each axis are below these numbers, by which tables of angles are kept, not made in every step.
        extents = (len(sides), *map(max, zip(*sides, strict=True)))
        rope = self.rotary(positions(text_BLE.shape[1], sides, patches_BTF.device), extents)
        mask = None if text_mask_BL is None else key_mask(text_mask_BL.bool(), patches_BTF.shape[1])
        h, w = sides[0]
        velocity_BTF = self.run_blocks(patches_BTF, (text_BLE.to(dtype),), vecs, rope, mask, h * w)
        return unpatchify(velocity_BTF, h, w, PATCH)

    def modulation(
        self, sigmas_B: Tensor, pooled_BE: Tensor | None, guidance_B: Tensor | None, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield the modulation of each double block, each single block and the last layer, in this order.

        FLUX.1 yields the same vector, BM, for all of them; Chroma yields the rows, BVM, of each.
        """
        if (approximator := self.config.approximator) is not None:
            assert guidance_B is not None
            inputs = modulation_inputs(sigmas_B, guidance_B, self.num_modulations, approximator.in_features)
            return self.modulation_rows(self.distilled_guidance_layer(inputs.to(dtype)))
        assert pooled_BE is not None
        vec_BM = embed_level(self.time_in, sigmas_B, dtype) + self.vector_in(pooled_BE.to(dtype))
        if self.config.has_guidance:
            assert guidance_B is not None
            vec_BM = vec_BM + embed_level(self.guidance_in, guidance_B, dtype)
        return repeat(vec_BM)

    @property
    def num_modulations(self) -> int:
        """The number of an approximator's rows: shift, scale and gate for each part of each block, shift and scale
        for the last layer."""
        return 3 * self.config.num_single + 2 * 6 * self.config.num_double + 2

    def modulation_rows(self, rows_BVM: Tensor) -> Iterator[Tensor]:
        """Yield the rows of each double block (image, then text), each single block and the last layer.

        The approximator uses another order: all single blocks, all image streams, all text streams, the last layer.
        """
        c = self.config
        single, img, txt, last = torch.split(rows_BVM, [3 * c.num_single, 6 * c.num_double, 6 * c.num_double, 2], dim=1)
        for img_B6M, txt_B6M in zip(torch.split(img, 6, dim=1), torch.split(txt, 6, dim=1), strict=True):
            yield torch.cat([img_B6M, txt_B6M], dim=1)
        yield from torch.split(single, 3, dim=1)
        yield last


def make_modulation(config: FluxConfig, num_parts: int, first_row: int) -> nn.Module:
    """Build the modulation of a block: a `MakeModulation`, once `config` is given."""
    if config.approximator is None:
        return Modulation(config.width, num_parts)
    return GivenModulation(first_row, 3 * num_parts)


def positions(num_text: int, sides: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return positions of tokens, shape (T, 3): text at (0, 0, 0), row y and column x of image i at (i, y, x).

    `sides` are height and width of each image in patches; image 0 is the noisy one.
    """
    parts = [torch.zeros(num_text, 3, dtype=torch.long, device=device)]
    for i, (h, w) in enumerate(sides):
        ids_T3 = torch.full((h * w, 3), i, dtype=torch.long, device=device)
        ids_T3[:, 1] = torch.arange(h, device=device).repeat_interleave(w)
        ids_T3[:, 2] = torch.arange(w, device=device).repeat(h)
        parts.append(ids_T3)
    return torch.cat(parts)
