"""The denoiser of Lumina Image 2.0 (NextDiT, Qin et al. 2025), in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, I image tokens, T tokens, N heads, K heads of keys and values, D
head width, M model width, E text width, V width of the noise level's embedding, F features of a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from library.architectures.lumina.targets import TARGETS
from library.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.models.patches import patchify, unpatchify
from library.models.rotary import Rope, Rotary, turn
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES, sinusoids

EPS, FINAL_EPS = 1e-5, 1e-6
PATCH = 2
ROPE_STEP = 6  # head widths are multiples: three axes share the pairs of a head


@dataclass(frozen=True)
class LuminaConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of a patch: four times the channels of the latent
    width: int
    head_width: int
    num_kv_heads: int
    mlp_width: int
    text_width: int
    time_width: int
    num_context_refiners: int
    num_noise_refiners: int
    num_layers: int

    @property
    def num_heads(self) -> int:
        return self.width // self.head_width

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """The number of values of a head that rotate with (text, row, column): 32 of 96 each."""
        return (self.head_width // 3,) * 3


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> LuminaConfig:
    """Read the configuration of a checkpoint from names and shapes, names without prefix. Raises UserError for a
    missing name and for invalid sizes."""
    read = ShapeReader("Lumina Image 2.0", shapes)
    shape, count = read.shape, read.count
    width, in_features = shape("x_embedder.weight")
    (head_width,) = shape("layers.0.attention.q_norm.weight")
    num_outputs = shape("layers.0.attention.qkv.weight")[0]
    num_kv_heads, rest = divmod(num_outputs - width, 2 * head_width)
    num_heads = width // head_width
    if width % head_width or head_width % ROPE_STEP or rest or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UserError(
            f"not a Lumina Image 2.0 model: width {width}, heads of {head_width}, {num_outputs} outputs of q, k and v"
        )
    return LuminaConfig(
        in_features=in_features,
        width=width,
        head_width=head_width,
        num_kv_heads=num_kv_heads,
        mlp_width=shape("layers.0.feed_forward.w1.weight")[0],
        text_width=shape("cap_embedder.1.weight")[1],
        time_width=shape("t_embedder.mlp.2.weight")[0],
        num_context_refiners=count("context_refiner"),
        num_noise_refiners=count("noise_refiner"),
        num_layers=count("layers"),
    )


class NextDiT(nn.Module):
    """The network from noisy latents, noise level and text to the velocity latent - noise: time runs from noise to
    image."""

    adapter_targets = TARGETS

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.rotary = Rotary(config.rope_axes)
        c = config
        self.t_embedder = TimestepEmbedder(c.time_width)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(c.text_width, eps=EPS), nn.Linear(c.text_width, c.width))
        self.context_refiner = nn.ModuleList(
            JointTransformerBlock(c, is_modulated=False) for _ in range(c.num_context_refiners)
        )
        self.x_embedder = nn.Linear(c.in_features, c.width)
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(c) for _ in range(c.num_noise_refiners))
        self.layers = nn.ModuleList(JointTransformerBlock(c) for _ in range(c.num_layers))
        self.final_layer = FinalLayer(c.width, c.time_width, c.in_features)

    def stacks(self) -> Stacks:
        """Return the blocks of the transformer itself; the few that refine text and noise before it are not
        offloaded."""
        return [[*self.layers]]

    def forward(self, latents_BCHW: Tensor, times_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Return the velocity, shape BCHW.

        `times_B` are 1 minus the share of noise: 0 is noise, 1 the image. `text_mask_BL` is true for the tokens of the
        caption, which precede its padding; padding is never attended to, and positions after the longest caption are
        not computed. Its length is read from the mask, which should therefore be on the host.
        """
        h, w = (side // PATCH for side in latents_BCHW.shape[-2:])
        dtype = self.x_embedder.weight.dtype
        num_text_B = text_mask_BL.sum(1).tolist()
        L = max(num_text_B)
        is_text_BL = send(text_mask_BL[:, :L].bool(), latents_BCHW.device)
        img_BIM = self.x_embedder(patchify(latents_BCHW, PATCH, channels_last=True).to(dtype))
        txt_BLM = self.cap_embedder(text_BLE[:, :L].to(dtype))
        time_BV = self.t_embedder(times_B, dtype)
        rope = self.rotary(positions(is_text_BL, h, w)[:, None], (L + 1, h, w))
        text_rope, image_rope = rope[:, :, :L], rope[:, :, L:]
        text_mask = mask = None  # attention has faster kernels without a mask
        if min(num_text_B) < L:
            text_mask, mask = is_text_BL[:, None, None], key_mask(is_text_BL, h * w)
        for block in self.context_refiner:
            txt_BLM = self.runner(block, txt_BLM, None, text_rope, text_mask)
        for block in self.noise_refiner:
            img_BIM = self.runner(block, img_BIM, time_BV, image_rope, None)
        x_BTM = torch.cat([txt_BLM, img_BIM], dim=1)
        for block in self.layers:
            x_BTM = self.runner(block, x_BTM, time_BV, rope, mask)
        return unpatchify(self.final_layer(x_BTM[:, L:], time_BV), h, w, PATCH, channels_last=True)


def key_mask(is_text_BL: Tensor, num_patches: int) -> Tensor:
    """Return the mask of tokens that may be attended to: the text's as given, the whole image; shape (B, 1, 1, T)."""
    image_BI = is_text_BL.new_ones((len(is_text_BL), num_patches))
    return torch.cat([is_text_BL, image_BI], dim=1)[:, None, None]


def positions(is_text_BL: Tensor, h: int, w: int) -> Tensor:
    """Return positions of tokens, shape (B, T, 3): token i of a caption at (i, 0, 0), row y and column x of the image
    at (n, y, x), where n is the number of tokens of its caption. Positions of padding are arbitrary."""
    B, L = is_text_BL.shape
    device = is_text_BL.device
    text_BL3 = torch.zeros(B, L, 3, dtype=torch.long, device=device)
    text_BL3[..., 0] = torch.arange(L, device=device)
    image_BI3 = torch.zeros(B, h * w, 3, dtype=torch.long, device=device)
    image_BI3[..., 0] = is_text_BL.sum(1, keepdim=True)
    image_BI3[..., 1] = torch.arange(h, device=device).repeat_interleave(w)
    image_BI3[..., 2] = torch.arange(w, device=device).repeat(h)
    return torch.cat([text_BL3, image_BI3], dim=1)


class TimestepEmbedder(nn.Module):
    """An embedding of the time as cosines and sines of decreasing frequencies, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding_BV: Tensor = self.mlp(sinusoids(times_B).to(dtype))
        return embedding_BV


class JointAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=EPS)
        self.k_norm = nn.RMSNorm(config.head_width, eps=EPS)

    def forward(self, x_BTM: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_BTM).unflatten(-1, (-1, self.head_width)).transpose(1, 2).split(self.heads, dim=1)
        # The norm saves its input for the backward pass; a view would keep queries, keys and values alive.
        norms = ((self.q_norm, q.contiguous()), (self.k_norm, k.contiguous()))
        q, k = (turn(norm(part), rope).to(v.dtype) for norm, part in norms)
        repeats = self.heads[0] // self.heads[1]
        k_BNTD, v_BNTD = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        attended = scaled_dot_product_attention(q, k_BNTD, v_BNTD, attn_mask=mask)
        y_BTM: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y_BTM


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.w2(silu(self.w1(x_BTM)) * self.w3(x_BTM))
        return y_BTM


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward layer, each between two norms. Network modules find the layers by this class name.

    If modulated, the noise level scales the inputs and gates the outputs.
    """

    def __init__(self, config: LuminaConfig, is_modulated: bool = True) -> None:
        super().__init__()
        self.is_modulated = is_modulated
        self.attention = JointAttention(config)
        self.feed_forward = FeedForward(config.width, config.mlp_width)
        self.attention_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.attention_norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm2 = nn.RMSNorm(config.width, eps=EPS)
        if is_modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_width, 4 * config.width))

    def forward(self, x_BTM: Tensor, time_BV: Tensor | None, rope: Rope, mask: Tensor | None) -> Tensor:
        scale_attention, gate_attention, scale_mlp, gate_mlp = self.modulation(time_BV)
        attended = self.attention(self.attention_norm1(x_BTM) * scale_attention, rope, mask)
        x_BTM = x_BTM + gate_attention * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x_BTM) * scale_mlp)
        after_BTM: Tensor = x_BTM + gate_mlp * self.ffn_norm2(fed)
        return after_BTM

    def modulation(self, time_BV: Tensor | None) -> tuple[Tensor | float, ...]:
        """Return scale and gate of attention, then of the feed-forward layer, each (B, 1, M), or 1 without
        modulation."""
        if not self.is_modulated:
            return (1.0,) * 4
        scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(time_BV)[:, None].chunk(4, dim=-1)
        return 1 + scale_1, gate_1.tanh(), 1 + scale_2, gate_2.tanh()


class FinalLayer(nn.Module):
    """The last layer, from tokens to patches of the velocity. Network modules find the layers by this class name."""

    def __init__(self, width: int, time_width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=FINAL_EPS)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width))

    def forward(self, x_BIM: Tensor, time_BV: Tensor) -> Tensor:
        scale_B1M = self.adaLN_modulation(time_BV)[:, None]
        patches_BIF: Tensor = self.linear(self.norm_final(x_BIM) * (1 + scale_B1M))
        return patches_BIF
