"""The denoiser of Lumina Image 2.0 (NextDiT, Qin et al. 2025), in the layout of the original checkpoints.

Module paths are the keys of the checkpoint and the names of adapters. Letters: B samples, C channels, H and W sides of
the latent, h and w sides in patches, L text tokens, I image tokens, T tokens, N heads, K heads of keys and values, D
head width, M model width, E text width, V width of the noise level's embedding, F features of a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.architectures.lumina.targets import TARGETS
from library.errors import UserError
from library.memory.blocks import BlockRunner, Stacks, plain
from library.memory.devices import send
from library.models.next_dit import EPS, FinalLayer, JointTransformerBlock, TimestepEmbedder, key_mask
from library.models.patches import patchify, unpatchify
from library.models.rotary import Rotary
from library.models.shapes import ShapeReader

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
        self.context_refiner = nn.ModuleList(JointTransformerBlock(c) for _ in range(c.num_context_refiners))
        self.x_embedder = nn.Linear(c.in_features, c.width)
        self.noise_refiner = nn.ModuleList(modulated_block(c) for _ in range(c.num_noise_refiners))
        self.layers = nn.ModuleList(modulated_block(c) for _ in range(c.num_layers))
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


def modulated_block(config: LuminaConfig) -> JointTransformerBlock:
    modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_width, 4 * config.width))
    return JointTransformerBlock(config, modulation)
