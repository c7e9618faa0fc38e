"""The denoiser of FLUX.1 (Black Forest Labs 2024) and Chroma, in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, T all tokens (text first, then the images in row order), N heads, D
head width, M model width, F features of a patch, V rows of modulation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from library.architectures.flux.approximator import (
    Approximator,
    ApproximatorConfig,
    GivenModulation,
    modulation_inputs,
    read_approximator,
)
from library.architectures.flux.layers import EPS, MLPEmbedder, RMSNorm
from library.architectures.flux.targets import CHROMA_TARGETS, TARGETS
from library.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.models.patches import patchify, unpatchify
from library.models.rotary import Rope, Rotary, turn
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES, sinusoids

PATCH = 2
ROPE_STEP = 32  # head widths are multiples: the pairs of a head are split 1 : 3.5 : 3.5


@dataclass(frozen=True)
class FluxConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of a patch: four times the channels of the latent
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    pooled_width: int  # of CLIP-L; 0 with an approximator, which uses no caption
    num_double: int
    num_single: int
    has_guidance: bool  # true for dev and Chroma, false for schnell
    approximator: ApproximatorConfig | None = None  # Chroma's, which computes the modulation of all blocks

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """The number of values of a head that rotate with (text, row, column): 16, 56 and 56 of 128."""
        first = self.head_width // 8
        return (first, (self.head_width - first) // 2, (self.head_width - first) // 2)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
    """Read the configuration of a checkpoint from names and shapes, names without prefix. Raises UserError for a
    missing name and for invalid sizes."""
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
        mlp_width=shape("double_blocks.0.img_mlp.0.weight")[0],
        text_width=shape("txt_in.weight")[1],
        pooled_width=0 if approximator else shape("vector_in.in_layer.weight")[1],
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        has_guidance=approximator is not None or "guidance_in.in_layer.weight" in shapes,
        approximator=approximator,
    )


class Flux(nn.Module):
    """The network from noisy latents, noise level and text to the velocity noise - latent.

    With `config.approximator` it is Chroma: the same streams, modulated by one network's output for the noise level
    instead of by a layer in each block, and without CLIP-L.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter_targets = TARGETS if config.approximator is None else CHROMA_TARGETS
        self.runner: BlockRunner = plain
        self.rotary = Rotary(config.rope_axes)
        c = config
        self.img_in = nn.Linear(c.in_features, c.width)
        if c.approximator is not None:
            self.distilled_guidance_layer = Approximator(c.approximator, c.width)
        else:
            self.time_in = MLPEmbedder(FREQUENCIES, c.width)
            self.vector_in = MLPEmbedder(c.pooled_width, c.width)
            if c.has_guidance:
                self.guidance_in = MLPEmbedder(FREQUENCIES, c.width)
        self.txt_in = nn.Linear(c.text_width, c.width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(c) for _ in range(c.num_double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(c) for _ in range(c.num_single))
        self.final_layer = LastLayer(c)

    def stacks(self) -> Stacks:
        """Return the blocks that run through the runner: the double ones, then the single ones."""
        return [[*self.double_blocks], [*self.single_blocks]]

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

        `sigmas_B` are shares of noise, 0..1. `pooled_BE` is CLIP-L's, None for Chroma. `guidance_B` is the guidance
        strength that a distilled model imitates; a model without that input ignores it. `text_mask_BL` is true for
        tokens that may be attended to, None for all. `references` are the latents of reference images, BCHW each, whose
        tokens follow those of the noisy latents, as in FLUX.1 Kontext (Labs et al. 2025).
        """
        images = (latents_BCHW, *references)
        sides = [(image.shape[-2] // PATCH, image.shape[-1] // PATCH) for image in images]
        dtype = self.img_in.weight.dtype
        img_BTM = self.img_in(torch.cat([patchify(image, PATCH).to(dtype) for image in images], dim=1))
        txt_BLM = self.txt_in(text_BLE.to(dtype))
        vecs = self.modulation(sigmas_B, pooled_BE, guidance_B, dtype)
        extents = (len(sides), *map(max, zip(*sides, strict=True)))
        rope = self.rotary(positions(txt_BLM.shape[1], sides, img_BTM.device), extents)
        mask = None if text_mask_BL is None else key_mask(text_mask_BL, img_BTM.shape[1])
        for block in self.double_blocks:
            img_BTM, txt_BLM = self.runner(block, img_BTM, txt_BLM, next(vecs), rope, mask)
        x_BTM = torch.cat([txt_BLM, img_BTM], dim=1)
        for block in self.single_blocks:
            x_BTM = self.runner(block, x_BTM, next(vecs), rope, mask)
        h, w = sides[0]
        first = txt_BLM.shape[1]
        return unpatchify(self.final_layer(x_BTM[:, first : first + h * w], next(vecs)), h, w, PATCH)

    def modulation(
        self, sigmas_B: Tensor, pooled_BE: Tensor | None, guidance_B: Tensor | None, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield the modulation of each double block, each single block and the last layer, in this order: one vector BM
        for all, or for Chroma each one's rows BVM."""
        if (approximator := self.config.approximator) is not None:
            assert guidance_B is not None
            inputs = modulation_inputs(sigmas_B, guidance_B, self.num_modulations, approximator.in_features)
            return self.modulation_rows(self.distilled_guidance_layer(inputs.to(dtype)))
        assert pooled_BE is not None
        vec_BM = self.time_in(sinusoids(1000 * sigmas_B.float()).to(dtype)) + self.vector_in(pooled_BE.to(dtype))
        if self.config.has_guidance:
            assert guidance_B is not None
            vec_BM = vec_BM + self.guidance_in(sinusoids(1000 * guidance_B.float()).to(dtype))
        return repeat(vec_BM)

    @property
    def num_modulations(self) -> int:
        """The number of an approximator's rows: shift, scale and gate of each part of each block, shift and scale of
        the last."""
        return 3 * self.config.num_single + 2 * 6 * self.config.num_double + 2

    def modulation_rows(self, rows_BVM: Tensor) -> Iterator[Tensor]:
        """Yield the rows of each double block (image, then text), each single block and the last layer. An approximator
        returns those of the single blocks first, then all of the image's, all of the text's, and the last layer's."""
        c = self.config
        single, img, txt, last = torch.split(rows_BVM, [3 * c.num_single, 6 * c.num_double, 6 * c.num_double, 2], dim=1)
        for img_B6M, txt_B6M in zip(torch.split(img, 6, dim=1), torch.split(txt, 6, dim=1), strict=True):
            yield torch.cat([img_B6M, txt_B6M], dim=1)
        yield from torch.split(single, 3, dim=1)
        yield last


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


def key_mask(text_mask_BL: Tensor, num_patches: int) -> Tensor:
    """Return the mask of tokens that may be attended to: the text's as given, the whole image; shape (B, 1, 1, T)."""
    image = text_mask_BL.new_ones((len(text_mask_BL), num_patches), dtype=torch.bool)
    return torch.cat([text_mask_BL.bool(), image], dim=1)[:, None, None]


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """Return attention, shape BTM."""
    attended = scaled_dot_product_attention(turn(q_BNTD, rope), turn(k_BNTD, rope), v_BNTD, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(width)
        self.key_norm = RMSNorm(width)


def heads(qkv_BTM: Tensor, norm: QKNorm, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values that are concatenated on the last axis, and normalize the first two; each BNTD."""
    q, k, v = qkv_BTM.unflatten(-1, (3, -1, head_width)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
    return norm.query_norm(q), norm.key_norm(k), v


class SelfAttention(nn.Module):
    """The projections of one stream; attention itself spans both streams."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(head_width)
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x_BTM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.qkv(x_BTM), self.norm, self.head_width)


class Modulation(nn.Module):
    """Shift, scale and gate for each of several parts of a block."""

    def __init__(self, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.lin = nn.Linear(width, 3 * num_parts * width)

    def forward(self, vec_BM: Tensor) -> tuple[Tensor, ...]:
        """Return 3 times the number of parts, each (B, 1, M)."""
        parts: tuple[Tensor, ...] = self.lin(silu(vec_BM))[:, None].chunk(3 * self.num_parts, dim=-1)
        return parts


def make_modulation(config: FluxConfig, num_parts: int, first_row: int = 0) -> nn.Module:
    """Build the module that returns shift, scale and gate of each part, each (B, 1, M), from a block's modulation."""
    if config.approximator is None:
        return Modulation(config.width, num_parts)
    return GivenModulation(first_row, 3 * num_parts)


def modulate(x_BTM: Tensor, shift_B1M: Tensor, scale_B1M: Tensor) -> Tensor:
    return x_BTM * (1 + scale_B1M) + shift_B1M


def make_mlp(width: int, mlp_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width))


def make_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=EPS)


class DoubleStreamBlock(nn.Module):
    """Image and text streams with their own weights, attending to both. Network modules find the layers by this class
    name."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.img_mod = make_modulation(config, 2)
        self.img_norm1 = make_norm(width)
        self.img_attn = SelfAttention(width, config.head_width)
        self.img_norm2 = make_norm(width)
        self.img_mlp = make_mlp(width, config.mlp_width)
        self.txt_mod = make_modulation(config, 2, first_row=6)
        self.txt_norm1 = make_norm(width)
        self.txt_attn = SelfAttention(width, config.head_width)
        self.txt_norm2 = make_norm(width)
        self.txt_mlp = make_mlp(width, config.mlp_width)

    def forward(
        self, img_BTM: Tensor, txt_BLM: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn.queries_keys_values(modulate(self.img_norm1(img_BTM), *img_mod[:2]))
        txt_qkv = self.txt_attn.queries_keys_values(modulate(self.txt_norm1(txt_BLM), *txt_mod[:2]))
        q, k, v = (torch.cat(both, dim=2) for both in zip(txt_qkv, img_qkv, strict=True))
        attended_BTM = attend(q, k, v, rope, mask)
        num_text = txt_BLM.shape[1]
        img_BTM = img_BTM + img_mod[2] * self.img_attn.proj(attended_BTM[:, num_text:])
        img_BTM = img_BTM + img_mod[5] * self.img_mlp(modulate(self.img_norm2(img_BTM), *img_mod[3:5]))
        txt_BLM = txt_BLM + txt_mod[2] * self.txt_attn.proj(attended_BTM[:, :num_text])
        txt_BLM = txt_BLM + txt_mod[5] * self.txt_mlp(modulate(self.txt_norm2(txt_BLM), *txt_mod[3:5]))
        return img_BTM, txt_BLM


class SingleStreamBlock(nn.Module):
    """Parallel attention and MLP over all tokens. Network modules find the layers by this class name."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.widths = [3 * config.width, config.mlp_width]
        self.head_width = config.head_width
        self.linear1 = nn.Linear(config.width, sum(self.widths))
        self.linear2 = nn.Linear(config.width + config.mlp_width, config.width)
        self.norm = QKNorm(config.head_width)
        self.pre_norm = make_norm(config.width)
        self.modulation = make_modulation(config, 1)

    def forward(self, x_BTM: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        mlp, q, k, v = self.parts(modulate(self.pre_norm(x_BTM), shift, scale))
        attended_BTM = attend(q, k, v, rope, mask)
        del q, k, v  # their rotated copies are kept
        y_BTM: Tensor = self.linear2(torch.cat([attended_BTM, gelu(mlp, approximate="tanh")], dim=-1))
        after_BTM: Tensor = x_BTM + gate * y_BTM
        return after_BTM

    def parts(self, x_BTM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the MLP's input, queries, keys and values, as copies: a view would keep the whole tensor alive."""
        qkv, mlp = self.linear1(x_BTM).split(self.widths, dim=-1)
        q, k, v = heads(qkv, self.norm, self.head_width)
        return mlp.contiguous(), q, k, v.contiguous()


class LastModulation(nn.Sequential):
    """Shift and scale of the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, vec_BM: Tensor) -> tuple[Tensor, ...]:
        """Return both, each (B, 1, M)."""
        parts: tuple[Tensor, ...] = self[1](self[0](vec_BM))[:, None].chunk(2, dim=-1)
        return parts


class LastLayer(nn.Module):
    """The last layer, from tokens to patches of the velocity."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_final = make_norm(width)
        self.linear = nn.Linear(width, config.in_features)
        self.adaLN_modulation = LastModulation(width) if config.approximator is None else GivenModulation(0, 2)

    def forward(self, x_BTM: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)
        patches_BTF: Tensor = self.linear(modulate(self.norm_final(x_BTM), shift, scale))
        return patches_BTF
