"""Shared layers of the NextDiT models (Qin et al. 2025), in the layout of the original checkpoints.

Letters: B samples, L text tokens, I image tokens, T tokens, N heads, M model width, V width of the noise level's
embedding, F features of a patch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from library.base.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.fused_kernels import fuses, owned
from library.models.fused_norms import gated_norm_sum, modulated_norm, rotated_norm, scaled_norm, silu_product
from library.models.layer_keys import LayerKeys, Layers, Stack, is_norm
from library.models.rotary import Rope, Rotary, apply_rope
from library.models.shapes import ShapeReader
from library.models.sinusoids import TimestepEmbedder
from library.types import Batch, Conditioning, Noised
from networks.core.targets.targets import Embedders

EPS = 1e-5
rotate_norm = rotated_norm(EPS)


@dataclass(frozen=True)
class NextDiTConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    in_features: int  # of a patch: four times the channels of the latent
    width: int
    head_width: int
    num_kv_heads: int
    mlp_width: int
    text_width: int
    time_width: int
    time_hidden: int  # width of the hidden layer that embeds the noise level
    num_context_refiners: int
    num_noise_refiners: int
    num_layers: int

    @property
    def num_heads(self) -> int:
        return self.width // self.head_width


ConfigT = TypeVar("ConfigT", bound=NextDiTConfig)
COUNT_FIELDS: Mapping[str, str] = {  # stack -> field that counts its blocks
    "context_refiner": "num_context_refiners",
    "noise_refiner": "num_noise_refiners",
    "layers": "num_layers",
}


TARGET_FIELDS: Mapping[str, Any] = {  # fields of `AdapterTargets`
    "ranks": {
        "attn_dim": r"\.attention\.",
        "mod_dim": r"\.adaLN_modulation\.",
        "refiner_dim": r"_refiner\.",
        "mlp_dim": r"\.feed_forward\.",
    },
    "embedders": Embedders("embedder_dims", (r"x_embedder", r"t_embedder", r"cap_embedder")),
    "block_choices": {"train_block_indices": r"^layers\.(\d+)\."},
}


def read_sizes(
    kind: type[ConfigT], title: str, shapes: Mapping[str, tuple[int, ...]], head_step: int, is_grouped: bool
) -> ConfigT:
    """Read the hyper-parameters from shapes, names without prefix.

    Head widths must be multiples of `head_step`. Without `is_grouped` there must be as many key heads as query heads.
    Raises UserError for a missing name and for invalid sizes.
    """
    read = ShapeReader(title, shapes)
    shape, count = read.shape, read.count
    width, in_features = shape("x_embedder.weight")
    (head_width,) = shape("layers.0.attention.q_norm.weight")
    num_outputs = shape("layers.0.attention.qkv.weight")[0]
    num_kv_heads, remainder = divmod(num_outputs - width, 2 * head_width)
    num_heads = width // head_width
    is_even = num_kv_heads >= 1 and (num_heads % num_kv_heads == 0 if is_grouped else num_heads == num_kv_heads)
    if width % head_width or head_width % head_step or remainder or not is_even:
        raise UserError(
            f"not a {title} model: width {width}, heads of {head_width}, {num_outputs} outputs of q, k and v"
        )
    return kind(
        in_features=in_features,
        width=width,
        head_width=head_width,
        num_kv_heads=num_kv_heads,
        mlp_width=shape("layers.0.feed_forward.w1.weight")[0],
        text_width=shape("cap_embedder.1.weight")[1],
        time_width=shape("t_embedder.mlp.2.weight")[0],
        time_hidden=shape("t_embedder.mlp.0.weight")[0],
        num_context_refiners=count("context_refiner"),
        num_noise_refiners=count("noise_refiner"),
        num_layers=count("layers"),
    )


def next_dit_keys(top: Mapping[str, str], block: Layers, context_norm: tuple[str, ...], **settings: Any) -> LayerKeys:
    """Build a base model's `LayerKeys` from the layers of a block and from other fields.

    The context refiner does not depend on the noise level, so it has no modulation; `context_norm` are diffusers' paths
    of the norm before its attention.
    """
    context_block = {name: theirs for name, theirs in block.items() if not name.startswith("adaLN")}
    context_block["attention_norm1"] = context_norm
    stacks = tuple(Stack(name, name, context_block if name == "context_refiner" else block) for name in COUNT_FIELDS)
    return LayerKeys(top, stacks, is_other=lambda path: is_norm(path) or path == "cap_embedder.0", **settings)


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, latent - noise, in the shape of the latents. These models take 1 - sigma as the time."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW, 1 - noised.sigmas_B, conditioning["hidden_state"], conditioning["attention_mask"]
    )
    return velocity_BCHW


class JointAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=EPS)
        self.k_norm = nn.RMSNorm(config.head_width, eps=EPS)

    def forward(self, x_BTM: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        widths = [number * self.head_width for number in self.heads]
        parts = self.qkv(x_BTM).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in parts)
        if fuses(q):
            q, k = rotate_norm(q, self.q_norm.weight, rope), rotate_norm(k, self.k_norm.weight, rope)
        else:
            # Norms save their inputs for the backward pass; a view would keep queries, keys and values alive.
            norms = ((self.q_norm, q.contiguous()), (self.k_norm, k.contiguous()))
            q, k = (apply_rope(norm(part), rope).to(v.dtype) for norm, part in norms)
        if (repeats := self.heads[0] // self.heads[1]) > 1:
            k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        else:
            v = owned(v)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y_BTM: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y_BTM


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM: Tensor = self.w2(silu_product(self.w1(x_BTM), self.w3(x_BTM)))
        return y_BTM


class JointTransformerBlock(nn.Module):
    """Attention and a feed-forward layer, each between two norms. Network modules find the layers by this class name.

    `modulation` maps the noise level's embedding, width V, to 4 M values that scale the inputs and gate the outputs.
    """

    def __init__(self, config: NextDiTConfig, modulation: nn.Sequential | None = None) -> None:
        super().__init__()
        self.attention = JointAttention(config)
        self.feed_forward = FeedForward(config.width, config.mlp_width)
        self.attention_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.attention_norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn_norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.adaLN_modulation = modulation

    def forward(self, x_BTM: Tensor, time_BV: Tensor | None, rope: Rope, mask: Tensor | None) -> Tensor:
        scale_attention, gate_attention, scale_mlp, gate_mlp = self.modulation(time_BV)
        attended = self.attention(scaled_norm(x_BTM, self.attention_norm1.weight, scale_attention), rope, mask)
        x_BTM = gated_norm_sum(x_BTM, gate_attention, attended, self.attention_norm2.weight)
        fed = self.feed_forward(scaled_norm(x_BTM, self.ffn_norm1.weight, scale_mlp))
        return gated_norm_sum(x_BTM, gate_mlp, fed, self.ffn_norm2.weight)

    def modulation(self, time_BV: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return scale and gate of attention, then of the feed-forward layer: each (B, 1, M), or None without
        modulation."""
        if self.adaLN_modulation is None:
            return (None,) * 4
        scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(time_BV)[:, None].chunk(4, dim=-1)
        return 1 + scale_1, gate_1.tanh(), 1 + scale_2, gate_2.tanh()


class FinalLayer(nn.Module):
    """The last layer: tokens to patches of the velocity. Network modules find its layers by this class name."""

    def __init__(self, width: int, time_width: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width))

    def forward(self, x_BIM: Tensor, time_BV: Tensor) -> Tensor:
        scale_B1M = self.adaLN_modulation(time_BV)[:, None]
        patches_BIF: Tensor = self.linear(modulated_norm(x_BIM, None, scale_B1M))
        return patches_BIF


class JointTransformer(nn.Module):
    """The layers of a denoiser and the loop over its blocks. Subclasses fill, place and mask the tokens."""

    def __init__(self, config: NextDiTConfig, rotary: Rotary, build_modulation: Callable[[], nn.Sequential]) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        self.rotary = rotary
        c = config
        self.t_embedder = TimestepEmbedder(c.time_width, c.time_hidden)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(c.text_width, eps=EPS), nn.Linear(c.text_width, c.width))
        self.context_refiner = nn.ModuleList(JointTransformerBlock(c) for _ in range(c.num_context_refiners))
        self.x_embedder = nn.Linear(c.in_features, c.width)
        self.noise_refiner, self.layers = (
            nn.ModuleList(JointTransformerBlock(c, build_modulation()) for _ in range(count))
            for count in (c.num_noise_refiners, c.num_layers)
        )
        self.final_layer = FinalLayer(c.width, c.time_width, c.in_features)

    def stacks(self) -> Stacks:
        """Return the main blocks; the few that refine text and noise before them are not offloaded."""
        return [[*self.layers]]

    def run_blocks(
        self,
        txt_BLM: Tensor,
        img_BIM: Tensor,
        time_BV: Tensor,
        rope: Rope,
        text_mask: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Refine text and image tokens separately, run the main blocks on both; return the image's, (B, I, M)."""
        L = txt_BLM.shape[1]
        text_rope, image_rope = rope[:, :, :L], rope[:, :, L:]
        for block in self.context_refiner:
            txt_BLM = self.runner(block, txt_BLM, None, text_rope, text_mask)
        for block in self.noise_refiner:
            img_BIM = self.runner(block, img_BIM, time_BV, image_rope, None)
        x_BTM = torch.cat([txt_BLM, img_BIM], dim=1)
        for block in self.layers:
            x_BTM = self.runner(block, x_BTM, time_BV, rope, mask)
        return x_BTM[:, L:]
