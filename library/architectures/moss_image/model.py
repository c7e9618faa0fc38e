"""The denoiser of MOSS-Image (OpenMOSS 2026), in the layout of its published checkpoint.

All tokens are one stream: the noisy image, the text, then reference images. The image and the text attend to
everything, reference images to reference images only; they stay clean, and are modulated at noise level 0. Letters: B
samples, C channels, h and w sides of the latent (a token is one latent pixel), I tokens of the noisy image, L of the
text, T all, R rows of modulation (the noise level's, and that of references if there are any), N heads, D head width,
M model width, E text width, A axes of positions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.architectures.moss_image.layers import TARGETS
from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.memory.fused_kernels import Fused, fuses, owned
from library.models.fused_norms import modulated_rms_norm, rotated_norm_of_halves
from library.models.patches import patchify, unpatchify
from library.models.rotary import ROPE_BASE, AxisTables, Rope, apply_rope
from library.models.shapes import ShapeReader
from library.models.token_parts import add_gated, by_parts

EPS = 1e-6
LEVEL_SCALE = 1000
NUM_AXES = 4  # of positions: reference, time, row, column
FP16_SCALE = 2**-4  # of the residual stream, which overflows float16 otherwise
GATE_LIMIT, VALUE_LIMIT = 4.0, 25.0


@dataclass(frozen=True)
class MossImageConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of an image token: the channels of the latent
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    level_features: int
    num_text_blocks: int
    num_layers: int


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> MossImageConfig:
    """Read the configuration from the shapes in a checkpoint, names without prefix.

    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader("MOSS-Image", shapes)
    width, in_features = read.shape("video_embedder.weight")
    (head_width,) = read.shape("layers.0.q_norm.weight")
    if width % head_width or head_width % (2 * NUM_AXES):
        raise UserError(
            f"not a MOSS-Image model: width {width}, heads of {head_width}, which must be multiples of {2 * NUM_AXES}"
        )
    return MossImageConfig(
        in_features=in_features,
        width=width,
        head_width=head_width,
        mlp_width=read.shape("layers.0.proj.ffn_down.weight")[1],
        text_width=read.shape("text_embedder.proj.weight")[1],
        level_features=read.shape("time_embedding.0.weight")[1],
        num_text_blocks=read.count("text_embedder.blocks"),
        num_layers=read.count("layers"),
    )


def situ_of(value: Tensor, gate: Tensor) -> Tensor:
    """Return SiTU: SiLU of the gate times the value, both limited by hyperbolic tangents."""
    limited_gate = GATE_LIMIT * torch.tanh(gate / GATE_LIMIT) * torch.sigmoid(gate)
    return limited_gate * (VALUE_LIMIT * torch.tanh(value / VALUE_LIMIT))


def situ_of_halves(halves: Tensor) -> Tensor:
    return situ_of(*halves.chunk(2, dim=-1))


situ = Fused(situ_of, {0: (0, 1), 1: (0, 1)})
situ_halves = Fused(situ_of_halves, {0: (0,)}, widens=False)  # the gradient's halves would be joined in float32
rotate_norm = rotated_norm_of_halves(EPS)
modulated_norms = {scale: modulated_rms_norm(EPS * scale**2) for scale in (1, FP16_SCALE)}  # by Stream.scale


def split_heads(
    block: "TextBlock | SingleStreamBlock", parts: Sequence[Tensor], rope: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values, BTM each, into heads, (B, N, T, D); normalize and rotate queries and keys."""
    q, k, v = (part.unflatten(-1, (-1, block.head_width)).transpose(1, 2) for part in parts)  # type: ignore[no-untyped-call]
    q, k = (rotate(norm, part, rope).to(v.dtype) for norm, part in ((block.q_norm, q), (block.k_norm, k)))
    return q, k, owned(v)


def rotate(norm: nn.RMSNorm, x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Normalize queries or keys and rotate values j and j + D / 2 of each head, which may come out as neighbours:
    queries and keys are reordered alike, which does not change attention."""
    if fuses(x_BNTD):
        return rotate_norm(x_BNTD, norm.weight, rope)
    # Norms and attention save inputs for the backward pass; a view of a fused layer would keep all three alive.
    x_BNTD = norm(x_BNTD.contiguous())
    return apply_rope(x_BNTD.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), rope)  # type: ignore[no-untyped-call]


class TextBlock(nn.Module):
    """A block of the text alone, without modulation."""

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        width, mlp_width, self.head_width = config.width, config.mlp_width, config.head_width
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=EPS) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_width, eps=EPS) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn_gate, self.ffn_up = (nn.Linear(width, mlp_width) for _ in range(2))
        self.ffn_down = nn.Linear(mlp_width, width)

    def forward(self, x_BLM: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        q, k, v = split_heads(self, self.qkv(self.norm1(x_BLM)).chunk(3, dim=-1), rope)
        x_BLM = x_BLM + self.proj(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        y_BLM = self.norm2(x_BLM)
        fed_BLM: Tensor = self.ffn_down(situ(self.ffn_up(y_BLM), self.ffn_gate(y_BLM)))
        return x_BLM + fed_BLM


def merge_heads(x_BNTD: Tensor) -> Tensor:
    return x_BNTD.transpose(1, 2).flatten(2)


class TextEmbedder(nn.Module):
    """A linear layer, then blocks of the text alone."""

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.text_width, config.width)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_text_blocks))

    def forward(self, text_BLE: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        x_BLM: Tensor = self.proj(text_BLE)
        for block in self.blocks:
            x_BLM = block(x_BLM, rope, mask)
        return x_BLM


@dataclass(frozen=True)
class Stream:
    """Lengths of the parts of the sequence, and the scale of the residual stream: the same in every block."""

    lengths: list[int]  # tokens of the image and the text, then those of references if there are any
    scale: float  # of the residual stream

    def modulate(self, norm: nn.RMSNorm, x_BTM: Tensor, scales_BRM: Tensor, shifts_BRM: Tensor) -> Tensor:
        """Normalize tokens, scale them by 1 + the scales of their part, and add its shifts."""
        modulated = modulated_norms[self.scale]
        return by_parts(
            lambda x, scale, shift: modulated(x, norm.weight, scale, shift),
            self.lengths,
            [x_BTM],
            [scales_BRM, shifts_BRM],
        )

    def shrink(self, x_BTM: Tensor) -> Tensor:
        """Scale what a linear layer without bias adds to the residual stream, before that layer can overflow."""
        return x_BTM if self.scale == 1 else x_BTM * self.scale


class SingleStreamBlock(nn.Module):
    """Attention and a feed-forward layer. Network modules find the layers by this class name, which LyCORIS knows."""

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        width, mlp_width, self.head_width = config.width, config.mlp_width, config.head_width
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=EPS) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_width, eps=EPS) for _ in range(2))
        sizes = {name: (width, width) for name in "qkvo"}
        sizes |= {"ffn_up_gate": (width, 2 * mlp_width), "ffn_down": (mlp_width, width)}
        self.proj = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(
        self, x_BTM: Tensor, modulation_BR6M: Tensor, rope: Rope, mask: Tensor | None, stream: Stream
    ) -> Tensor:
        """Return the tokens, BTM. The modulation is shift, scale and gate of attention, then of the feed-forward
        layer."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation_BR6M.unbind(2)
        y_BTM = stream.modulate(self.norm1, x_BTM, scale_1, shift_1)
        q, k, v = split_heads(self, [self.proj[name](y_BTM) for name in "qkv"], rope)
        attended_BTM = merge_heads(attend(q, k, v, stream.lengths[0], mask))
        x_BTM = add_gated(x_BTM, gate_1, self.proj["o"](stream.shrink(attended_BTM)), stream.lengths)
        y_BTM = stream.modulate(self.norm2, x_BTM, scale_2, shift_2)
        hidden = situ_halves(self.proj["ffn_up_gate"](y_BTM))
        return add_gated(x_BTM, gate_2, self.proj["ffn_down"](stream.shrink(hidden)), stream.lengths)


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, num_main: int, mask: Tensor | None) -> Tensor:
    """Return attention, BNTD: the first `num_main` tokens attend to all, the references after them to references.

    `mask`, (B, 1, 1, T), marks the keys of the first.
    """
    attended = scaled_dot_product_attention(q_BNTD[:, :, :num_main], k_BNTD, v_BNTD, attn_mask=mask)
    if num_main == q_BNTD.shape[2]:
        return attended
    q, k, v = (x[:, :, num_main:] for x in (q_BNTD, k_BNTD, v_BNTD))
    references = scaled_dot_product_attention(q, k, v)
    return torch.cat([attended, references], dim=2)


class MossImage(nn.Module):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, noise levels and text."""

    adapter_targets = TARGETS

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.level_tables = AxisTables()
        width = config.width
        self.video_embedder = nn.Linear(config.in_features, width)
        self.text_embedder = TextEmbedder(config)
        self.time_embedding = nn.Sequential(nn.Linear(config.level_features, width), nn.SiLU(), nn.Linear(width, width))
        self.shared_block_modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.num_layers))
        self.final_norm_video = nn.RMSNorm(width, eps=EPS)
        self.final_linear_video = nn.Linear(width, config.in_features, bias=False)
        self.video_head_modulation = nn.Linear(width, 2 * width)

    def stacks(self) -> Stacks:
        """Return the blocks that `runner` runs."""
        return [[*self.layers]]

    def forward(
        self,
        latents_BChw: Tensor,
        sigmas_B: Tensor,
        text_BLE: Tensor,
        text_mask_BL: Tensor,
        references: Sequence[Tensor] = (),
        skipped: Collection[int] = (),
    ) -> Tensor:
        """Return the velocity, shape BChw.

        `sigmas_B` are shares of noise, 0..1. `text_mask_BL` is 1 for the caption's tokens, which precede its padding;
        it should be on the host, because the lengths are read from it. `references` are the latents of reference
        images, BChw each. `skipped` are numbers of blocks that have no effect.
        """
        lengths = [int(length) for length in text_mask_BL.sum(1).tolist()]
        device, dtype, L = latents_BChw.device, self.video_embedder.weight.dtype, max(lengths)
        images = (latents_BChw, *references)
        sides = [(image.shape[-2], image.shape[-1]) for image in images]
        num_image, num_main = sides[0][0] * sides[0][1], sides[0][0] * sides[0][1] + L
        positions_BTA = send(torch.stack([positions(length, L, sides) for length in lengths]), device)
        rope = rope_at(positions_BTA, self.config.head_width)[:, None]
        embedded_BTM = self.video_embedder(torch.cat([patchify(image, 1) for image in images], dim=1).to(dtype))
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(lengths) < L:
            mask = send(mask_padding(lengths, L, num_image, embedded_BTM.shape[1] + L), device)
            text_mask = mask[..., num_image:num_main]
        txt_BLM = self.text_embedder(text_BLE[:, :L].to(dtype), rope[:, :, num_image:num_main], text_mask)
        tokens = (embedded_BTM[:, :num_image], txt_BLM, embedded_BTM[:, num_image:])
        stream = Stream(
            [num_main, embedded_BTM.shape[1] - num_image] if references else [num_main],
            FP16_SCALE if dtype == torch.float16 else 1,
        )
        x_BTM = stream.shrink(torch.cat(tokens, dim=1))
        level_BM, modulation_BR6M = self.modulation(sigmas_B, dtype, bool(references))
        for number, block in enumerate(self.layers):
            y_BTM = self.runner(block, x_BTM, modulation_BR6M, rope, mask, stream)
            # A skipped block runs too: offloading counts on every block in every pass.
            x_BTM = x_BTM if number in skipped else y_BTM
        shift_BM, scale_BM = self.video_head_modulation(level_BM).chunk(2, dim=-1)
        # A copy, because autograd saves it, and a view would keep the whole sequence.
        x_BIM = x_BTM[:, :num_image].contiguous()
        x_BIM = modulated_norms[stream.scale](x_BIM, self.final_norm_video.weight, scale_BM[:, None], shift_BM[:, None])
        return unpatchify(self.final_linear_video(x_BIM), *sides[0], 1)

    def modulation(self, sigmas_B: Tensor, dtype: torch.dtype, has_references: bool) -> tuple[Tensor, Tensor]:
        """Return the embedded noise level, BM, and the modulation that all blocks share, (B, R, 6, M)."""
        if has_references:
            sigmas_B = torch.cat([sigmas_B, torch.zeros_like(sigmas_B[:1])])  # the references' level, embedded once
        levels_BM: Tensor = self.time_embedding(self.embed_levels(sigmas_B).to(dtype))
        rows_B6M = self.shared_block_modulation(levels_BM).unflatten(-1, (6, -1))
        if not has_references:
            return levels_BM, rows_B6M[:, None]
        noisy_B6M, clean_B6M = rows_B6M[:-1], rows_B6M[-1:].expand(len(rows_B6M) - 1, -1, -1)
        return levels_BM[:-1], torch.stack([noisy_B6M, clean_B6M], dim=1)

    def embed_levels(self, sigmas_B: Tensor) -> Tensor:
        """Embed noise levels as cosines, then sines, of decreasing frequencies, float32."""
        # The angles need float64, which not every device supports: those of whole thousandths come from a table that is
        # computed on the host, and the rest is at most half a thousandth.
        num_features = self.config.level_features
        levels_B = sigmas_B.float() * LEVEL_SCALE
        whole_B = levels_B.round()
        tables = self.level_tables(num_features, LEVEL_SCALE + 1, ROPE_BASE, sigmas_B.device)
        cos, sin = (table[whole_B.long()] for table in tables)
        angles = (levels_B - whole_B)[:, None] * frequencies(num_features // 2, sigmas_B.device)
        cos_rest, sin_rest = angles.cos(), angles.sin()
        return torch.cat([cos * cos_rest - sin * sin_rest, sin * cos_rest + cos * sin_rest], dim=-1)


def frequencies(count: int, device: torch.device) -> Tensor:
    """Return `count` frequencies that decrease from 1 toward 1 / ROPE_BASE, float32."""
    return torch.pow(ROPE_BASE, -torch.arange(count, dtype=torch.float32, device=device) / count)


def rope_at(positions_BTA: Tensor, head_width: int) -> Rope:
    """Return the angles of tokens; each axis rotates an equal share of a head's values."""
    bands = frequencies(head_width // (2 * NUM_AXES), positions_BTA.device)
    angles = (positions_BTA[..., None] * bands).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def positions(length: int, L: int, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Return positions (reference, time, row, column) of the tokens of one sample, shape (T, A), on the host.

    Text token i is at (0, i, 0, 0). Images follow the `length` tokens of the caption in time, their rows and columns
    centred at 0; the noisy image, which is first, has reference 0. Positions of text after `length` are arbitrary.
    """
    text_LA = torch.zeros(L, NUM_AXES)
    text_LA[:, 1] = torch.arange(L)
    images = []
    for number, (h, w) in enumerate(sides):
        grid = torch.cartesian_prod(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2)
        place = torch.tensor([number, length], dtype=torch.float32).expand(h * w, -1)
        images.append(torch.cat([place, grid], dim=1))
    return torch.cat([images[0], text_LA, *images[1:]])


def mask_padding(lengths: Sequence[int], L: int, num_image: int, num_tokens: int) -> Tensor:
    """Return the keys that are no padding of a caption, shape (B, 1, 1, T), on the host."""
    place_T = torch.arange(num_tokens)[None] - num_image
    is_padding_BT = (place_T >= torch.tensor(lengths)[:, None]) & (place_T < L)
    return ~is_padding_BT[:, None, None]
