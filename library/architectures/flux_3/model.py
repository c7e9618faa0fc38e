"""The denoiser of FLUX.3 Image Klein (Black Forest Labs 2026), in the layout of the original checkpoints.

Tokens have three modes: text, the noisy image, and reference images, which stay clean. Each mode first has blocks of
its own, then all are one stream. Text and references are modulated at noise level 0. Letters: B samples, C channels, h
and w sides of the latent (a token is one latent pixel), L text tokens, T tokens, N heads, D head width, M model width,
E text width, R modes of a block's tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from library.architectures.flux_3.layers import IMAGES, TARGETS, TEXT
from library.architectures.flux_3.text import LAYERS
from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.models.double_stream import EPS, LastModulation, MLPEmbedder, Modulation, QKNorm, SwiGLU, embed_level
from library.models.fused_norms import modulated_norm
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import ROPE_BASE, Rope, apply_rope
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES

NUM_AXES = 4  # of positions: time, row, column, text


@dataclass(frozen=True)
class Flux3Config:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of an image token: the channels of the latent
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    num_mode: int  # blocks of each mode
    num_single: int
    has_target: bool = False  # a distilled model, which takes the noise level that a step ends at as an input
    has_references: bool = True


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux3Config:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("FLUX.3 Image Klein", shapes)
    width, in_features = read.shape("emb_in.image.weight")
    (head_width,) = read.shape("single_blocks.0.norm.query_norm.scale")
    text_width = read.shape("txt_in.weight")[1]
    if width % head_width or head_width % (2 * NUM_AXES) or text_width % len(LAYERS):
        raise UserError(
            f"not a FLUX.3 model: width {width}, heads of {head_width} and text features of width {text_width}; the "
            f"last two must be multiples of {2 * NUM_AXES}"
        )
    return Flux3Config(
        in_features=in_features,
        width=width,
        head_width=head_width,
        mlp_width=read.shape("single_blocks.0.mlp_out.weight")[1],
        text_width=text_width,
        num_mode=read.count("content_mode_blocks.image"),
        num_single=read.count("single_blocks"),
        has_target="ref_time_in.in_layer.weight" in shapes,
        has_references="emb_in.image_cond.weight" in shapes,
    )


class SingleStreamBlock(nn.Module):
    """Parallel attention and SwiGLU. Network modules find the layers by this class name, which LyCORIS knows."""

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        width, self.head_width = config.width, config.head_width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = QKNorm(config.head_width)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.activation = SwiGLU()
        self.mlp_out = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x_BTM: Tensor, rows_BR3M: Tensor, lengths: list[int], rope: Rope, mask: Tensor | None) -> Tensor:
        """Return the tokens, BTM. `rows_BR3M` are shift, scale and gate of each mode, `lengths` its token counts."""
        parts = torch.split(functional.layer_norm(x_BTM, x_BTM.shape[-1:], eps=EPS), lengths, dim=1)
        shifts, scales, gates = (torch.split(rows_BRM, 1, dim=1) for rows_BRM in rows_BR3M.unbind(2))
        y_BTM = torch.cat(
            [y * (1 + scale) + shift for y, shift, scale in zip(parts, shifts, scales, strict=True)], dim=1
        )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(y_BTM).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for layer in projections)
        norms = ((q, self.norm.query_norm.scale), (k, self.norm.key_norm.scale))
        normed = (functional.rms_norm(x.float(), scale.shape, scale.float(), EPS) for x, scale in norms)
        q, k = (apply_rope(x_BNTD, rope).to(v.dtype) for x_BNTD in normed)  # rounded only once
        attended_BTM = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        change_BTM = self.attn_out(attended_BTM) + self.mlp_out(self.activation(self.mlp_in(y_BTM)))
        changes = torch.split(change_BTM, lengths, dim=1)
        return x_BTM + torch.cat([gate * change for gate, change in zip(gates, changes, strict=True)], dim=1)


def list_rows(modulations: nn.ModuleDict, vecs: Mapping[str, Tensor]) -> Tensor:
    """Return shift, scale and gate of each mode in `vecs`, (B, R, 3, M)."""
    return torch.stack([torch.cat(modulations[mode](vec_BM), dim=1) for mode, vec_BM in vecs.items()], dim=1)


class LastLayer(nn.Module):
    """The last layer, which maps image tokens to the velocity."""

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.in_features, bias=False)
        self.adaLN_modulation = LastModulation(config.width, bias=False)

    def forward(self, x_BTM: Tensor, level_BM: Tensor) -> Tensor:
        velocity_BTC: Tensor = self.linear(modulated_norm(x_BTM, *self.adaLN_modulation(level_BM)))
        return velocity_BTC


class Flux3(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        width, images = config.width, IMAGES if config.has_references else IMAGES[:1]
        modes = (*images, TEXT)
        self.emb_in = nn.ModuleDict({mode: nn.Linear(config.in_features, width, bias=False) for mode in images})
        self.txt_in = nn.Linear(config.text_width, width, bias=False)
        self.time_in = MLPEmbedder(FREQUENCIES, width, bias=False)
        if config.has_target:
            self.ref_time_in = MLPEmbedder(FREQUENCIES, width, bias=False)
        self.early_stream_modulations = nn.ModuleDict({mode: Modulation(width, 1, bias=False) for mode in modes})
        self.single_stream_modulations = nn.ModuleDict({mode: Modulation(width, 1, bias=False) for mode in modes})
        stacks = [nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_mode)) for _ in modes]
        self.content_mode_blocks = nn.ModuleDict(dict(zip(images, stacks, strict=False)))
        self.txt_mode_blocks = stacks[-1]
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_single))
        self.final_layer = nn.ModuleDict({"image": LastLayer(config)})

    def stacks(self) -> Stacks:
        """Return the blocks that run in every pass; those of references, which run in some, are not offloaded."""
        return [[*self.txt_mode_blocks, *self.content_mode_blocks[IMAGES[0]].children(), *self.single_blocks]]

    def forward(
        self,
        latents_BChw: Tensor,
        sigmas_B: Tensor,
        text_BLE: Tensor,
        text_mask_BL: Tensor,
        references: Sequence[Tensor] = (),
        targets_B: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, shape BChw.

        `sigmas_B` are shares of noise, 0..1. `text_mask_BL` is 1 for the tokens that are attended to, which come first;
        it should be on the host, because the lengths are read from it. `references` are the latents of reference
        images, BChw each. `targets_B` are the shares of noise that a step ends at, for a distilled model; by default
        the step has no length.
        """
        text_lengths = [int(length) for length in text_mask_BL.sum(1).tolist()]
        device, dtype, L = latents_BChw.device, self.txt_in.weight.dtype, max(text_lengths)
        sides = [(image.shape[-2], image.shape[-1]) for image in (latents_BChw, *references)]
        (h, w), num_images = sides[0], sum(h * w for h, w in sides)
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(text_lengths) < L:
            is_text_BL = send(torch.arange(L)[None] < torch.tensor(text_lengths)[:, None], device)
            text_mask, mask = is_text_BL[:, None, None], key_mask(is_text_BL, num_images)
        rope = send(rope_at(L, sides, self.config.head_width), device)
        levels = [embed_level(self.time_in, level_B, dtype) for level_B in (sigmas_B, torch.zeros_like(sigmas_B))]
        if self.config.has_target:
            target_BM = embed_level(self.ref_time_in, sigmas_B if targets_B is None else targets_B, dtype)
            levels = [level_BM + target_BM for level_BM in levels]
        noisy_BM, clean_BM = levels
        tokens = {TEXT: self.txt_in(text_BLE[:, :L].to(dtype))}
        for mode, images in zip(self.emb_in, ([latents_BChw], references), strict=False):
            if images:
                patches_BTC = torch.cat([patchify(image, 1) for image in images], dim=1)
                tokens[mode] = self.emb_in[mode](patches_BTC.to(dtype))
        lengths = [part.shape[1] for part in tokens.values()]
        vecs = {mode: noisy_BM if mode == IMAGES[0] else clean_BM for mode in tokens}
        for mode, length, angles in zip(vecs, lengths, torch.split(rope, lengths), strict=True):
            rows_B13M = list_rows(self.early_stream_modulations, {mode: vecs[mode]})
            mode_mask = text_mask if mode == TEXT else None
            for block in (self.txt_mode_blocks if mode == TEXT else self.content_mode_blocks[mode]).children():
                tokens[mode] = self.runner(block, tokens[mode], rows_B13M, [length], angles, mode_mask)
        rows_BR3M = list_rows(self.single_stream_modulations, vecs)
        x_BTM = torch.cat([tokens.pop(mode) for mode in vecs], dim=1)
        for block in self.single_blocks:
            x_BTM = self.runner(block, x_BTM, rows_BR3M, lengths, rope, mask)
        return unpatchify(self.final_layer["image"](x_BTM[:, L : L + h * w], noisy_BM), h, w, 1)


def rope_at(num_text: int, sides: Sequence[tuple[int, int]], head_width: int) -> Rope:
    """Return the angles of the tokens on the host. Each axis (time, row, column, text) rotates a quarter of a head.

    Text token i is at (0, 0, 0, i), row y and column x of image i at (0, y / 2, x / 2, -i); the noisy image is first.
    """
    # In float32 the angle of text token 1000 would be off by 1e-4, and not every device has float64.
    zero = torch.zeros(1, dtype=torch.float64)
    halves = [[torch.arange(length).double() / 2 for length in side] for side in sides]
    grids = [torch.cartesian_prod(zero, *rows_and_columns, zero - i) for i, rows_and_columns in enumerate(halves)]
    positions_T4 = torch.cat([torch.cartesian_prod(zero, zero, zero, torch.arange(num_text).double()), *grids])
    width = head_width // NUM_AXES
    bands = ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (positions_T4[..., None] * bands).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()
