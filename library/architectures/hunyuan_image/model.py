"""The denoiser of HunyuanImage 2.1 (Tencent 2025), in the layout of the original checkpoint.

Module paths are the keys of the checkpoint. Letters: B samples, C channels, H and W sides of the latent (a patch is one
latent pixel), L text tokens, G glyph tokens, T all tokens (the image in row order, then glyphs and text), N heads, D
head width, M model width, E width of the text encoder, F frequencies.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention, silu

from library.architectures.hunyuan_image.targets import TARGETS
from library.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.models.rotary import Rope, Rotary, turn
from library.models.shapes import ShapeReader
from library.models.sinusoids import FREQUENCIES, sinusoids

ROPE_BASE = 256
EPS = 1e-6
NUM_AXES = 2  # rows and columns share the pairs of a head


@dataclass(frozen=True)
class HunyuanImageConfig:
    """The hyper-parameters, inferred from the shapes of a checkpoint."""

    channels: int
    width: int
    head_width: int
    mlp_width: int
    text_width: int
    glyph_width: int
    glyph_mlp_width: int
    num_double: int
    num_single: int
    num_refiners: int
    refiner_mlp_width: int


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> HunyuanImageConfig:
    """Read the configuration of a checkpoint from names and shapes, names without prefix. Raises UserError for a
    missing name, invalid sizes and unsupported variants."""
    read = ShapeReader("HunyuanImage 2.1", shapes)
    shape, count = read.shape, read.count
    refuse_variants(shapes)
    width, channels = shape("img_in.proj.weight")[:2]
    head_width = shape("double_blocks.0.img_attn_q_norm.weight")[0]
    if width % head_width or head_width % (2 * NUM_AXES):
        raise UserError(f"not a HunyuanImage 2.1 model: width {width} with heads of {head_width}")
    refiners = "txt_in.individual_token_refiner.blocks"
    return HunyuanImageConfig(
        channels=channels,
        width=width,
        head_width=head_width,
        mlp_width=shape("double_blocks.0.img_mlp.fc1.weight")[0],
        text_width=shape("txt_in.input_embedder.weight")[1],
        glyph_width=shape("byt5_in.fc1.weight")[1],
        glyph_mlp_width=shape("byt5_in.fc1.weight")[0],
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        num_refiners=count(refiners),
        refiner_mlp_width=shape(f"{refiners}.0.mlp.fc1.weight")[0],
    )


def refuse_variants(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError for variants of the base model that are not trained to predict a flow's velocity."""
    marks = [stem for stem in ("guidance_in", "time_r_in") if any(name.startswith(f"{stem}.") for name in shapes)]
    if marks:
        raise UserError(
            f"this is a distilled HunyuanImage 2.1 (it has {' and '.join(marks)}): training would undo its few-step "
            "distillation. Train on hunyuanimage2.1.safetensors; the adapter works with both"
        )
    if len(shapes.get("img_in.proj.weight", ())) == 5:
        raise UserError("this is the refiner of HunyuanImage 2.1, which cannot be trained; use the base model")


class HunyuanImage(nn.Module):
    """The network from noisy latents, noise level and text to the velocity noise - latent."""

    adapter_targets = TARGETS

    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        self.config = config
        self.runner: BlockRunner = plain
        # Half of a head rotates with the row, half with the column.
        self.rotary = Rotary([config.head_width // NUM_AXES] * NUM_AXES, ROPE_BASE)
        c = config
        self.byt5_in = GlyphMapper(c.glyph_width, c.glyph_mlp_width, c.width)
        self.img_in = PatchEmbed(c.channels, c.width)
        self.txt_in = TokenRefiner(c)
        self.time_in = TimestepEmbedder(c.width)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(c) for _ in range(c.num_double))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(c) for _ in range(c.num_single))
        self.final_layer = FinalLayer(c.width, c.channels)

    def stacks(self) -> Stacks:
        """Return the blocks that run through the runner: the double ones, then the single ones."""
        return [[*self.double_blocks], [*self.single_blocks]]

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
        dtype = self.img_in.proj.weight.dtype
        img_BTM = self.img_in(latents_BCHW.to(dtype))
        vec_BM = self.time_in(timesteps_B)
        text_BLM = self.txt_in(text_BLE.to(dtype), timesteps_B, text_mask_BL.bool())
        txt_BLM = torch.cat([self.byt5_in(glyphs_BGE.to(dtype)), text_BLM], dim=1)
        rope = self.rotary(positions(H, W, img_BTM.device), (H, W))
        mask = key_mask(torch.cat([glyph_mask_BG, text_mask_BL], dim=1), H * W)
        for block in self.double_blocks:
            img_BTM, txt_BLM = self.runner(block, img_BTM, txt_BLM, vec_BM, rope, mask)
        x_BTM = torch.cat([img_BTM, txt_BLM], dim=1)
        for block in self.single_blocks:
            x_BTM = self.runner(block, x_BTM, vec_BM, rope, mask)
        out_BTC: Tensor = self.final_layer(x_BTM[:, : H * W], vec_BM)
        return out_BTC.transpose(1, 2).unflatten(2, (H, W))  # type: ignore[no-untyped-call,no-any-return]


def positions(H: int, W: int, device: torch.device) -> Tensor:
    """Return the positions of the image's tokens, shape (T, 2): row and column."""
    rows = torch.arange(H, device=device).repeat_interleave(W)
    columns = torch.arange(W, device=device).repeat(H)
    return torch.stack([rows, columns], dim=-1)


def turn_image(x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Rotate the image's tokens; text, which comes last, has no position."""
    num_patches = len(rope)
    return torch.cat([turn(x_BNTD[:, :, :num_patches], rope), x_BNTD[:, :, num_patches:]], dim=2)


def key_mask(text_mask_BL: Tensor, num_patches: int) -> Tensor:
    """Return the mask of tokens that may be attended to: the whole image, the text as given; shape (B, 1, 1, T)."""
    image = text_mask_BL.new_ones((len(text_mask_BL), num_patches), dtype=torch.bool)
    return torch.cat([image, text_mask_BL.bool()], dim=1)[:, None, None]


def split_heads(qkv_BTM: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split queries, keys and values that are concatenated on the last axis; each BNTD."""
    q, k, v = qkv_BTM.unflatten(-1, (3, -1, head_width)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
    return q, k, v


def attend(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, mask: Tensor) -> Tensor:
    """Return attention, shape BTM."""
    return scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, attn_mask=mask).transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # autograd saves it, and with a view the whole base tensor
        return rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.weight.to(x.dtype)


class PatchEmbed(nn.Module):
    """The embedding of each latent pixel as a token."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        tokens_BMT: Tensor = self.proj(latents_BCHW).flatten(2)
        return tokens_BMT.transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps_B: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        vec_BM: Tensor = self.mlp(sinusoids(timesteps_B).to(dtype))
        return vec_BM


class TextProjection(nn.Module):
    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text_BE: Tensor) -> Tensor:
        vec_BM: Tensor = self.linear_2(silu(self.linear_1(text_BE)))
        return vec_BM


class GlyphMapper(nn.Module):
    """The mapping of ByT5's states, which encode text to be rendered in the image, to tokens."""

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
    """Two linear layers without activation, which the caller applies: blocks use GELU, text refiners SiLU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)


class RefinerBlock(nn.Module):
    """Self-attention of text tokens, gated by noise level and mean text."""

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
        qkv = split_heads(self.self_attn_qkv(self.norm1(x_BLM)), self.head_width)
        x_BLM = x_BLM + gate * self.self_attn_proj(attend(*qkv, mask))
        after_BLM: Tensor = x_BLM + mlp_gate * self.mlp.fc2(silu(self.mlp.fc1(self.norm2(x_BLM))))
        return after_BLM


class RefinerBlocks(nn.Module):
    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        sizes = (config.width, config.head_width, config.refiner_mlp_width)
        self.blocks = nn.ModuleList(RefinerBlock(*sizes) for _ in range(config.num_refiners))


class TokenRefiner(nn.Module):
    """The mapping of the text encoder's states to tokens of the denoiser."""

    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_width, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.c_embedder = TextProjection(config.text_width, config.width)
        self.individual_token_refiner = RefinerBlocks(config)

    def forward(self, text_BLE: Tensor, timesteps_B: Tensor, mask_BL: Tensor) -> Tensor:
        """Refine the tokens; those with a false mask are ignored, and their outputs are undefined."""
        weights_BL1 = mask_BL.float()[..., None]
        mean_BE = (text_BLE * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
        vec_BM = self.t_embedder(timesteps_B) + self.c_embedder(mean_BE.to(text_BLE.dtype))
        x_BLM: Tensor = self.input_embedder(text_BLE)
        for block in self.individual_token_refiner.blocks:
            x_BLM = block(x_BLM, vec_BM, mask_BL[:, None, None])
        return x_BLM


class Modulation(nn.Module):
    """Shift, scale and gate for each of several parts of a block."""

    def __init__(self, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.linear = nn.Linear(width, 3 * num_parts * width)

    def forward(self, vec_BM: Tensor) -> tuple[Tensor, ...]:
        """Return tensors of shape (B, 1, M)."""
        return self.linear(silu(vec_BM))[:, None].chunk(3 * self.num_parts, dim=-1)  # type: ignore[no-any-return]


def modulate(x_BTM: Tensor, shift_B1M: Tensor, scale_B1M: Tensor) -> Tensor:
    return x_BTM * (1 + scale_B1M) + shift_B1M


def make_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=EPS)


class MMDoubleStreamBlock(nn.Module):
    """Image and text streams with their own weights, attending to both. Network modules find the layers by this class
    name."""

    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.img_mod = Modulation(width, 2)
        self.img_norm1 = make_norm(width)
        self.img_attn_qkv = nn.Linear(width, 3 * width)
        self.img_attn_q_norm = RMSNorm(config.head_width)
        self.img_attn_k_norm = RMSNorm(config.head_width)
        self.img_attn_proj = nn.Linear(width, width)
        self.img_norm2 = make_norm(width)
        self.img_mlp = Mlp(width, config.mlp_width)
        self.txt_mod = Modulation(width, 2)
        self.txt_norm1 = make_norm(width)
        self.txt_attn_qkv = nn.Linear(width, 3 * width)
        self.txt_attn_q_norm = RMSNorm(config.head_width)
        self.txt_attn_k_norm = RMSNorm(config.head_width)
        self.txt_attn_proj = nn.Linear(width, width)
        self.txt_norm2 = make_norm(width)
        self.txt_mlp = Mlp(width, config.mlp_width)

    def forward(
        self, img_BTM: Tensor, txt_BLM: Tensor, vec_BM: Tensor, rope: Rope, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(vec_BM), self.txt_mod(vec_BM)
        img_qkv = self.img_attn_qkv(modulate(self.img_norm1(img_BTM), *img_mod[:2]))
        txt_qkv = self.txt_attn_qkv(modulate(self.txt_norm1(txt_BLM), *txt_mod[:2]))
        img_q, img_k, img_v = split_heads(img_qkv, self.head_width)
        txt_q, txt_k, txt_v = split_heads(txt_qkv, self.head_width)
        q = torch.cat([self.img_attn_q_norm(img_q), self.txt_attn_q_norm(txt_q)], dim=2)
        k = torch.cat([self.img_attn_k_norm(img_k), self.txt_attn_k_norm(txt_k)], dim=2)
        attended_BTM = attend(turn_image(q, rope), turn_image(k, rope), torch.cat([img_v, txt_v], dim=2), mask)
        num_patches = img_BTM.shape[1]
        img_BTM = img_BTM + img_mod[2] * self.img_attn_proj(attended_BTM[:, :num_patches])
        img_hidden = self.img_mlp.fc1(modulate(self.img_norm2(img_BTM), *img_mod[3:5]))
        img_BTM = img_BTM + img_mod[5] * self.img_mlp.fc2(gelu(img_hidden, approximate="tanh"))
        txt_BLM = txt_BLM + txt_mod[2] * self.txt_attn_proj(attended_BTM[:, num_patches:])
        txt_hidden = self.txt_mlp.fc1(modulate(self.txt_norm2(txt_BLM), *txt_mod[3:5]))
        txt_BLM = txt_BLM + txt_mod[5] * self.txt_mlp.fc2(gelu(txt_hidden, approximate="tanh"))
        return img_BTM, txt_BLM


class MMSingleStreamBlock(nn.Module):
    """Parallel attention and MLP over all tokens. Network modules find the layers by this class name."""

    def __init__(self, config: HunyuanImageConfig) -> None:
        super().__init__()
        self.widths = [3 * config.width, config.mlp_width]
        self.head_width = config.head_width
        self.linear1 = nn.Linear(config.width, sum(self.widths))
        self.linear2 = nn.Linear(config.width + config.mlp_width, config.width)
        self.q_norm = RMSNorm(config.head_width)
        self.k_norm = RMSNorm(config.head_width)
        self.pre_norm = make_norm(config.width)
        self.modulation = Modulation(config.width, 1)

    def forward(self, x_BTM: Tensor, vec_BM: Tensor, rope: Rope, mask: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(vec_BM)
        mlp, q, k, v = self.parts(modulate(self.pre_norm(x_BTM), shift, scale))
        attended_BTM = attend(turn_image(q, rope), turn_image(k, rope), v, mask)
        del q, k, v  # their rotated copies are kept
        y_BTM: Tensor = self.linear2(torch.cat([attended_BTM, gelu(mlp, approximate="tanh")], dim=-1))
        after_BTM: Tensor = x_BTM + gate * y_BTM
        return after_BTM

    def parts(self, x_BTM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the MLP's input, queries, keys and values, as copies: a view would keep the whole tensor alive."""
        qkv, mlp = self.linear1(x_BTM).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, self.head_width)
        return mlp.contiguous(), self.q_norm(q), self.k_norm(k), v.contiguous()


class FinalLayer(nn.Module):
    """The last layer, from tokens to latent pixels of the velocity."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = make_norm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BTM: Tensor, vec_BM: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec_BM)[:, None].chunk(2, dim=-1)
        latents_BTC: Tensor = self.linear(modulate(self.norm_final(x_BTM), shift, scale))
        return latents_BTC
