"""The denoiser of Qwen-Image 2.1 (Qwen team 2026), in the layout of diffusers' QwenImage21Transformer2DModel.

All tokens are one stream: the text with the reference images in their places, then the noisy image. Text attends to
everything before it, an image to everything before it and to all of itself. The tokens before the noisy image therefore
stay clean, and are modulated at noise level 0. Letters: B samples, C channels, h and w sides of the latent (a token is
one latent pixel), L text tokens, T all tokens, R reference images, N heads, D head width, M model width, E text width,
V rows of modulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention, silu

from library.architectures.qwen_image_21.layers import TARGETS
from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.memory.fused_kernels import fuses
from library.models.fused_norms import modulated_norm, parted_norm, parted_sum, rotated_norm, silu_product
from library.models.patches import patchify, unpatchify
from library.models.rotary import Rope, Rotary, apply_rope
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES, sinusoids
from library.models.token_parts import add_gated, by_parts

EPS = 1e-6
rotate_norm = rotated_norm(EPS)
LEVEL_SCALE = 1000
ROPE_SHARES = (2, 7, 7)  # of a head's values, in sixteenths, that rotate with (time, row, column)
ROPE_STEP = 32  # head widths are multiples, so that every share is an even number of values
EXTENT_STEP = 1024  # the kept tables of angles have a multiple of this many positions

Segments = tuple[tuple[int, int, bool], ...]
"""The parts of a sequence before the noisy image: (first token, end, True for text)."""


@dataclass(frozen=True)
class QwenImage21Config:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of an image token: the channels of the latent
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    num_blocks: int

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """The number of values of a head that rotate with (time, row, column): 16, 56 and 56 of 128."""
        return tuple(self.head_width // 16 * share for share in ROPE_SHARES)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> QwenImage21Config:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("Qwen-Image 2.1", shapes)
    width, in_features = read.shape("img_in.weight")
    (head_width,) = read.shape("transformer_blocks.0.attn.norm_q.weight")
    if width % head_width or head_width % ROPE_STEP:
        raise UserError(
            f"not a Qwen-Image 2.1 model: width {width}, heads of {head_width}, which must be multiples of {ROPE_STEP}"
        )
    return QwenImage21Config(
        in_features=in_features,
        width=width,
        head_width=head_width,
        mlp_width=read.shape("transformer_blocks.0.img_mlp.out.weight")[1],
        text_width=read.shape("txt_in.in_layer.weight")[1],
        num_blocks=read.count("transformer_blocks"),
    )


class ZeroCenteredNorm(nn.Module):
    """Root mean square norm whose weight is stored as scale - 1, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), x.shape[-1:], self.weight.float() + 1, EPS).to(x.dtype)


class TextProjection(nn.Module):
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.text_norm = ZeroCenteredNorm(text_width)
        self.in_layer = nn.Linear(text_width, width, bias=False)
        self.act = nn.GELU(approximate="tanh")
        self.out_layer = nn.Linear(width, width, bias=False)

    def forward(self, text_BLE: Tensor) -> Tensor:
        text_BLM: Tensor = self.out_layer(self.act(self.in_layer(self.text_norm(text_BLE))))
        return text_BLM


class LevelEmbedder(nn.Module):
    """Two linear layers with SiLU in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(FREQUENCIES, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        vec: Tensor = self.linear_2(silu(self.linear_1(sinusoids(LEVEL_SCALE * levels.float()).to(dtype))))
        return vec


def rotate(norm: nn.RMSNorm, x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Normalize and rotate queries or keys."""
    if fuses(x_BNTD):
        return rotate_norm(x_BNTD, norm.weight, rope)
    # Norms and attention save inputs for the backward pass; a view would keep queries and keys alive.
    return apply_rope(norm(x_BNTD.contiguous()), rope)


class Attention(nn.Module):
    """Block-causal attention of all heads, see `attend`."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.to_q, self.to_k, self.to_v = (nn.Linear(config.width, config.width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(config.width, config.width, bias=False)])
        self.norm_q, self.norm_k = (nn.RMSNorm(config.head_width, eps=EPS) for _ in range(2))

    def forward(self, x_BTM: Tensor, rope: Rope, segments: Segments, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x_BTM).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = (rotate(norm, x, rope).to(v.dtype) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
        y_BTM: Tensor = self.to_out[0](attend(q, k, v, segments, mask).transpose(1, 2).flatten(2))
        return y_BTM


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, segments: Segments, mask: Tensor | None) -> Tensor:
    """Return block-causal attention, shape BNTD: text attends to what is before it, an image to that and to all of
    itself.

    It is computed segment by segment, because attention has faster kernels without a mask. `mask`, (B, 1, 1, T), marks
    the keys of the noisy image. The padding of captions is last before the noisy image, so only the noisy image could
    see it.
    """
    outputs = []
    for first, end, is_text in segments:
        queries, keys, values = q_BNTD[:, :, first:end], k_BNTD[:, :, :end], v_BNTD[:, :, :end]
        # torch aligns a causal mask at the top left, which is right for as many queries as keys, so only for the first
        # segment.
        causal = None
        if is_text and first:
            causal = torch.ones(end - first, end, dtype=torch.bool, device=queries.device).tril(first)
        is_causal = is_text and not first
        outputs.append(scaled_dot_product_attention(queries, keys, values, attn_mask=causal, is_causal=is_causal))
    num_clean = segments[-1][1]
    outputs.append(scaled_dot_product_attention(q_BNTD[:, :, num_clean:], k_BNTD, v_BNTD, attn_mask=mask))
    return torch.cat(outputs, dim=2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.out = nn.Linear(config.mlp_width, config.width, bias=False)
        self.gate_layer = nn.Linear(config.width, config.mlp_width, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.out(silu_product(self.gate_layer(x_BTM), self.proj(x_BTM)))
        return y_BTM


def scaled_norm(x_BTM: Tensor, scale_B1M: Tensor) -> Tensor:
    return modulated_norm(x_BTM, None, scale_B1M)


def scale_parts(x_BTM: Tensor, scales_B2M: Tensor, is_noisy_T1: Tensor, lengths: Sequence[int]) -> Tensor:
    """Normalize tokens and scale them by 1 + the scales of their part, clean or noisy."""
    if fuses(x_BTM):
        return parted_norm(x_BTM, scales_B2M[:, :1], scales_B2M[:, 1:], is_noisy_T1)
    return by_parts(scaled_norm, lengths, [x_BTM], [scales_B2M])


def gate_parts(x_BTM: Tensor, gates_B2M: Tensor, y_BTM: Tensor, is_noisy_T1: Tensor, lengths: Sequence[int]) -> Tensor:
    """Add tokens `y_BTM` times the tanh of the gates of their part."""
    gates_B2M = gates_B2M.tanh()
    if fuses(x_BTM):
        return parted_sum(x_BTM, gates_B2M[:, :1], gates_B2M[:, 1:], y_BTM, is_noisy_T1)
    return add_gated(x_BTM, gates_B2M, y_BTM, lengths)


class QwenImageTransformerBlock(nn.Module):
    """Attention and a feed-forward layer, scaled and gated by modulation that all blocks share.

    Network modules find the layers by this class name. It is Qwen-Image's, which LyCORIS knows too.
    """

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.img_mlp = FeedForward(config)

    def forward(
        self,
        x_BTM: Tensor,
        modulation_BV4: Tensor,
        rope: Rope,
        segments: Segments,
        mask: Tensor | None,
        is_noisy_T1: Tensor,
    ) -> Tensor:
        """Return the tokens, BTM.

        `modulation_BV4` has two rows, clean and noisy, of four vectors of width M: scale and gate of attention, then of
        the feed-forward layer.
        """
        lengths = segments[-1][1], x_BTM.shape[1] - segments[-1][1]
        scale_1, gate_1, scale_2, gate_2 = modulation_BV4.chunk(4, dim=-1)
        scaled = scale_parts(x_BTM, scale_1, is_noisy_T1, lengths)
        x_BTM = gate_parts(x_BTM, gate_1, self.attn(scaled, rope, segments, mask), is_noisy_T1, lengths)
        scaled = scale_parts(x_BTM, scale_2, is_noisy_T1, lengths)
        return gate_parts(x_BTM, gate_2, self.img_mlp(scaled), is_noisy_T1, lengths)


class LastNorm(nn.Module):
    """The last norm, scaled by the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x_BTM: Tensor, vec_BM: Tensor) -> Tensor:
        return scaled_norm(x_BTM, self.linear(silu(vec_BM))[:, None])


class QwenImage21(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.rotary = Rotary(config.rope_axes)
        width = config.width
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": LevelEmbedder(width)})
        self.txt_in = TextProjection(config.text_width, width)
        self.img_in = nn.Linear(config.in_features, width, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width, bias=False))
        self.transformer_blocks = nn.ModuleList(QwenImageTransformerBlock(config) for _ in range(config.num_blocks))
        self.norm_out = LastNorm(width)
        self.proj_out = nn.Linear(width, config.in_features, bias=False)

    def stacks(self) -> Stacks:
        """Return the blocks that `runner` runs."""
        return [[*self.transformer_blocks]]

    def forward(
        self,
        latents_BChw: Tensor,
        sigmas_B: Tensor,
        text_BLE: Tensor,
        text_mask_BL: Tensor,
        places: Sequence[int] = (),
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the velocity, shape BChw.

        `sigmas_B` are shares of noise, 0..1. `text_mask_BL` is 1 for the caption's tokens, which precede its padding;
        it should be on the host, because the lengths are read from it. `references` are the latents of reference
        images, BChw each. `places` are the numbers of text tokens before each of them; all images precede the caption.
        """
        lengths = [int(length) for length in text_mask_BL.sum(1).tolist()]
        device, dtype, L = latents_BChw.device, self.img_in.weight.dtype, max(lengths)
        images = (*references, latents_BChw)
        x_BTM, segments = self.embed_tokens(images, text_BLE[:, :L].to(dtype), places)
        num_clean = segments[-1][1]
        sides = [(image.shape[-2], image.shape[-1]) for image in images]
        positions_BT3 = torch.stack([positions(length, L, places, sides) for length in lengths])
        rope = self.rope(send(positions_BT3, device)[:, None], L, sides)
        mask = None
        if min(lengths) < L:
            mask = send(mask_caption_padding(lengths, L, num_clean, x_BTM.shape[1]), device)

        embed = self.time_text_embed["timestep_embedder"]
        # Level 0 is the same for all samples, so it is embedded once.
        vec_XM = embed(torch.cat([sigmas_B, torch.zeros_like(sigmas_B[:1])]), dtype)  # X: the samples, then level 0
        modulation_X4 = self.modulation(vec_XM)
        clean_B4 = modulation_X4[-1:].expand(len(sigmas_B), -1)
        modulation_BV4 = torch.stack([clean_B4, modulation_X4[:-1]], dim=1)
        is_noisy_T1 = torch.arange(x_BTM.shape[1], device=device)[:, None] >= num_clean
        for block in self.transformer_blocks:
            x_BTM = self.runner(block, x_BTM, modulation_BV4, rope, segments, mask, is_noisy_T1)
        # A copy, because autograd saves it, and a view would keep the whole sequence.
        velocity_BTC = self.proj_out(self.norm_out(x_BTM[:, num_clean:].contiguous(), vec_XM[:-1]))
        return unpatchify(velocity_BTC, *sides[-1], 1)

    def embed_tokens(
        self, images: Sequence[Tensor], text_BLE: Tensor, places: Sequence[int]
    ) -> tuple[Tensor, Segments]:
        """Return the whole sequence, BTM, and its segments before the last image, the noisy one."""
        txt_BLM = self.txt_in(text_BLE)
        tokens = [patchify(image, 1).to(txt_BLM.dtype) for image in images]
        embedded_images = self.img_in(torch.cat(tokens, dim=1)).split([t.shape[1] for t in tokens], dim=1)
        texts = [txt_BLM[:, first:end] for first, end in pairwise((0, *places, txt_BLM.shape[1]))]
        parts = [part for pair in zip(texts, embedded_images, strict=True) for part in pair]
        return torch.cat(parts, dim=1), split_segments([part.shape[1] for part in parts[:-1]])

    def rope(self, positions: Tensor, L: int, sides: Sequence[tuple[int, int]]) -> Rope:
        """Return the angles of tokens; `positions` are negative in the first half of an image."""
        # Captions have many lengths: a rounded extent reuses the tables that are kept for it.
        extent = L + sum(map(max, sides))
        extent += -extent % EXTENT_STEP
        table = self.rotary(positions.abs(), (extent,) * len(ROPE_SHARES))
        # The opposite angle has the same cosine and the opposite sine, so tables need no negative positions.
        signs = positions.sign().to(table.dtype).chunk(len(ROPE_SHARES), dim=-1)
        pair_signs = [
            sign.expand(*sign.shape[:-1], width // 2) for sign, width in zip(signs, self.rotary.widths, strict=True)
        ]
        return torch.stack([table[..., 0], table[..., 1] * torch.cat(pair_signs, dim=-1)], dim=-1)


def split_segments(lengths: Sequence[int]) -> Segments:
    """Return the segments before the noisy image from their lengths; text and reference images alternate."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple((first, end, i % 2 == 0) for i, (first, end) in enumerate(pairwise((0, *ends))))


def mask_caption_padding(lengths: Sequence[int], L: int, num_clean: int, num_tokens: int) -> Tensor:
    """Return the keys that the noisy image attends to, shape (B, 1, 1, T), on the host: all but the padding of
    captions, which is right before it."""
    padding_B = torch.tensor([L - length for length in lengths])[:, None]
    place_T = torch.arange(num_tokens)[None]
    is_padding_BT = (place_T < num_clean) & (place_T >= num_clean - padding_B)
    return ~is_padding_BT[:, None, None]


def positions(length: int, L: int, places: Sequence[int], sides: Sequence[tuple[int, int]]) -> Tensor:
    """Return positions of the tokens of one sample, shape (T, 3), on the host.

    Text advances on all three axes. An image has one time, and its rows and columns are centred at 0; time then
    advances by its longer side. Positions of text after `length` tokens are arbitrary.
    """
    parts, time = [], 0
    padding = [0] * len(places) + [L - length]
    for (first, end), num_padding, (h, w) in zip(pairwise((0, *places, length)), padding, sides, strict=True):
        parts.append(torch.arange(time, time + end - first + num_padding)[:, None].expand(-1, 3))
        time += end - first
        rows, columns = (torch.arange(side) - (side - side // 2) for side in (h, w))
        grid = torch.cartesian_prod(rows, columns)
        parts.append(torch.cat([torch.full((h * w, 1), time), grid], dim=1))
        time += max(h, w)
    return torch.cat(parts)
