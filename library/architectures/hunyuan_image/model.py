"""The denoiser of HunyuanImage 2.1 (Tencent 2025): FLUX.1's streams, with a refiner of text tokens and with glyph
tokens.

Module paths are those of ComfyUI's model and of adapters in files; `from_original` in layers.py renames the
original checkpoint's. Letters: B samples, C channels, H and W sides of the latent (a patch is one latent pixel), L text
tokens, G glyph tokens, T all tokens (glyphs, text, then the image in row order), M model width, E width of the text
encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from library.architectures.hunyuan_image.layers import TARGETS
from library.base.errors import UserError
from library.models.double_stream import (
    DoubleStreamBlock,
    LastLayer,
    LastModulation,
    Modulation,
    SingleStreamBlock,
    StreamConfig,
    StreamTransformer,
)
from library.models.patches import key_mask, patchify, unpatchify
from library.models.rotary import Rotary
from library.models.shapes import ShapeReader
from library.models.sinusoids import TimestepEmbedder

ROPE_BASE = 256
EPS = 1e-6
NUM_AXES = 2  # rows and columns share the pairs of a head


@dataclass(frozen=True)
class HunyuanImageConfig(StreamConfig):
    """The hyper-parameters. Guidance-distilled models cannot be trained."""

    glyph_width: int
    glyph_mlp_width: int
    num_refiners: int
    refiner_mlp_width: int


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> HunyuanImageConfig:
    """Read the configuration from the shapes in a checkpoint, names in its original layout, without prefix.

    Raises UserError for a missing name, invalid sizes and unsupported variants.
    """
    read = ShapeReader("HunyuanImage 2.1", shapes)
    shape, count = read.shape, read.count
    refuse_variants(shapes)
    width, channels = shape("img_in.proj.weight")[:2]
    head_width = shape("double_blocks.0.img_attn_q_norm.weight")[0]
    if width % head_width or head_width % (2 * NUM_AXES):
        raise UserError(f"not a HunyuanImage 2.1 model: width {width} with heads of {head_width}")
    refiners = "txt_in.individual_token_refiner.blocks"
    return HunyuanImageConfig(
        in_features=channels,
        width=width,
        head_width=head_width,
        mlp_width=shape("double_blocks.0.img_mlp.fc1.weight")[0],
        text_width=shape("txt_in.input_embedder.weight")[1],
        glyph_width=shape("byt5_in.fc1.weight")[1],
        glyph_mlp_width=shape("byt5_in.fc1.weight")[0],
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        has_guidance=False,
        num_refiners=count(refiners),
        refiner_mlp_width=shape(f"{refiners}.0.mlp.fc1.weight")[0],
    )


def refuse_variants(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError for variants that cannot be trained: distilled models and the refiner."""
    marks = [stem for stem in ("guidance_in", "time_r_in") if any(name.startswith(f"{stem}.") for name in shapes)]
    if marks:
        raise UserError(
            f"this is a distilled HunyuanImage 2.1 (it has {' and '.join(marks)}): training would undo its few-step "
            "distillation. Train on hunyuanimage2.1.safetensors; the adapter works with both"
        )
    # The refiner's first layer is a convolution over frames too, so its weight has a fifth axis.
    if len(shapes.get("img_in.proj.weight", ())) == 5:
        raise UserError("this is the refiner of HunyuanImage 2.1, which cannot be trained", "use the base model")


class MMDoubleStreamBlock(DoubleStreamBlock):
    """FLUX.1's double block. Network modules find the layers by this class name."""


class MMSingleStreamBlock(SingleStreamBlock):
    """FLUX.1's single block. Network modules find the layers by this class name."""


class HunyuanImage(StreamTransformer):
    """The denoiser, which predicts the velocity noise - latent from noisy latents, timesteps, text and glyphs."""

    adapter_targets = TARGETS

    def __init__(self, config: HunyuanImageConfig) -> None:
        # Half of a head rotates with the row, half with the column.
        super().__init__(config, Rotary([config.head_width // NUM_AXES] * NUM_AXES, ROPE_BASE))
        self.config = c = config
        self.byt5_in = GlyphMapper(c.glyph_width, c.glyph_mlp_width, c.width)
        self.txt_in = TokenRefiner(c)
        self.time_in = TimestepEmbedder(c.width, c.width)

        def make_modulation(num_parts: int, first_row: int) -> nn.Module:
            return Modulation(c.width, num_parts)

        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(c, make_modulation) for _ in range(c.num_double))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(c, make_modulation) for _ in range(c.num_single))
        self.final_layer = LastLayer(c, LastModulation(c.width))

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLE: Tensor,
        text_mask_BL: Tensor,
        glyphs_BGE: Tensor,
        glyph_mask_BG: Tensor,
    ) -> Tensor:
        """Return the velocity, shape BCHW.

        `timesteps_B` are 0..1000. The masks are true for tokens that may be attended to; each sample needs at least one
        such text token, but no glyph token.
        """
        H, W = latents_BCHW.shape[-2:]
        dtype = self.img_in.weight.dtype
        patches_BTC = patchify(latents_BCHW, 1).to(dtype)
        text = (glyphs_BGE.to(dtype), text_BLE.to(dtype), timesteps_B, text_mask_BL.bool())
        is_text_BL = torch.cat([glyph_mask_BG, text_mask_BL], dim=1).bool()
        rope = self.rotary(positions(is_text_BL.shape[1], H, W, patches_BTC.device), (H, W))
        vecs = repeat(self.time_in(timesteps_B, dtype))
        velocity_BTC = self.run_blocks(patches_BTC, text, vecs, rope, key_mask(is_text_BL, H * W), H * W)
        return unpatchify(velocity_BTC, H, W, 1)

    def embed_text(self, *text: Tensor) -> Tensor:
        """Embed glyphs, then text, as tokens, BLM."""
        glyphs_BGE, *text_inputs = text
        return torch.cat([self.byt5_in(glyphs_BGE), self.txt_in(*text_inputs)], dim=1)


def positions(num_text: int, H: int, W: int, device: torch.device) -> Tensor:
    """Return positions of tokens, shape (T, 2): text at (0, 0), which is not rotated, image at (row, column)."""
    ids_T2 = torch.zeros(num_text + H * W, NUM_AXES, dtype=torch.long, device=device)
    ids_T2[num_text:, 0] = torch.arange(H, device=device).repeat_interleave(W)
    ids_T2[num_text:, 1] = torch.arange(W, device=device).repeat(H)
    return ids_T2


class TextProjection(nn.Module):
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text_BE: Tensor) -> Tensor:
        vec_BM: Tensor = self.linear_2(silu(self.linear_1(text_BE)))
        return vec_BM


class GlyphMapper(nn.Module):
    """The layers that map ByT5's states, which encode text to be rendered in the image, to tokens."""

    def __init__(self, glyph_width: int, mlp_width: int, width: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(glyph_width)
        self.fc1 = nn.Linear(glyph_width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, mlp_width)
        self.fc3 = nn.Linear(mlp_width, width)

    def forward(self, glyphs_BGE: Tensor) -> Tensor:
        tokens_BGM: Tensor = self.fc3(gelu(self.fc2(gelu(self.fc1(self.layernorm(glyphs_BGE))))))
        return tokens_BGM


class Mlp(nn.Module):
    """Two linear layers with SiLU in between."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x_BLM: Tensor) -> Tensor:
        y_BLM: Tensor = self.fc2(silu(self.fc1(x_BLM)))
        return y_BLM


class RefinerBlock(nn.Module):
    """Self-attention among text tokens, gated by the noise level and the mean text state."""

    def __init__(self, width: int, head_width: int, mlp_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLM: Tensor, vec_BM: Tensor, mask: Tensor) -> Tensor:
        gate, mlp_gate = self.adaLN_modulation(vec_BM)[:, None].chunk(2, dim=-1)
        q, k, v = self.self_attn_qkv(self.norm1(x_BLM)).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        attended_BLM = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x_BLM = x_BLM + gate * self.self_attn_proj(attended_BLM)
        after_BLM: Tensor = x_BLM + mlp_gate * self.mlp(self.norm2(x_BLM))
        return after_BLM


class RefinerBlocks(nn.Module):
    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        sizes = (config.width, config.head_width, config.refiner_mlp_width)
        self.blocks = nn.ModuleList(RefinerBlock(*sizes) for _ in range(config.num_refiners))


class TokenRefiner(nn.Module):
    """The layers that map the text encoder's states to tokens of the denoiser."""

    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_width, config.width)
        self.t_embedder = TimestepEmbedder(config.width, config.width)
        self.c_embedder = TextProjection(config.text_width, config.width)
        self.individual_token_refiner = RefinerBlocks(config)

    def forward(self, text_BLE: Tensor, timesteps_B: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the refined tokens, BLM. Those with a false mask are not attended to; their outputs are undefined."""
        # The sums over up to a thousand tokens are taken in float32.
        weights_BL1 = mask_BL.float()[..., None]
        mean_BE = (text_BLE * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
        vec_BM = self.t_embedder(timesteps_B, text_BLE.dtype) + self.c_embedder(mean_BE.to(text_BLE.dtype))
        x_BLM: Tensor = self.input_embedder(text_BLE)
        for block in self.individual_token_refiner.blocks:
            x_BLM = block(x_BLM, vec_BM, mask_BL[:, None, None])
        return x_BLM
