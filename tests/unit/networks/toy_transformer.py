"""A denoiser of blocks with fused layers, as in transformer models: width 12, inner width 20."""

import torch
from torch import Tensor, nn

from networks.core.targets.targets import AdapterTargets, Embedders, Part, qkv_and_rest, thirds

TARGETS = AdapterTargets(
    denoiser=Part(
        "lora_unet",
        blocks=("DoubleBlock", "SingleBlock"),
        extra_blocks={"train_llm_adapter": ("ExtraBlock",)},
        exclude=(r".*\.mod",),
    ),
    text_encoders=(Part("lora_te1", ("CLIPAttention",)), Part("lora_te3", ("CLIPAttention",), needs="train_t5xxl")),
    ranks={"img_attn_dim": r"attn", "single_dim": r"single\.\d+\.linear"},
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"patch")),
    block_choices={
        "train_double_block_indices": r"^doubles\.(\d+)\.",
        "train_single_block_indices": r"^single\.(\d+)\.",
    },
    subsets={"double": r"^doubles\.", "single": r"^single\."},
    fused={r"qkv$": thirds, r"linear1$": qkv_and_rest},
    elsewhere=lambda: {"emb_dims": "ranks"},
)


class DoubleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_qkv = nn.Linear(12, 36)
        self.attn_proj = nn.Linear(12, 12)
        self.mod = nn.Linear(12, 12)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.attn_qkv(x_BTC).chunk(3, -1)
        return x_BTC + self.attn_proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v) * self.mod(x_BTC.mean(1, True))


class SingleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(12, 56)
        self.linear2 = nn.Linear(32, 12)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v, mlp = self.linear1(x_BTC).split([12, 12, 12, 20], -1)
        attended = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return x_BTC + self.linear2(torch.cat([attended, torch.tanh(mlp)], -1))


class ExtraBlock(SingleBlock):
    pass


class ToyTransformer(nn.Module):
    """x_BTC with 12 channels to the same shape."""

    adapter_targets = TARGETS

    def __init__(self) -> None:
        super().__init__()
        self.img_in = nn.Linear(12, 12)
        self.time_in = nn.ModuleDict({"in_layer": nn.Linear(12, 12), "out_layer": nn.Linear(12, 12)})
        self.patch = nn.Conv2d(1, 1, 2)
        self.doubles = nn.ModuleList([DoubleBlock(), DoubleBlock()])
        self.single = nn.ModuleList([SingleBlock(), SingleBlock(), SingleBlock()])
        self.extra = ExtraBlock()

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.time_in["out_layer"](self.time_in["in_layer"](self.img_in(x_BTC)))
        for block in (*self.doubles, *self.single, self.extra):
            x_BTC = block(x_BTC)
        return x_BTC


def toy_transformer(seed: int) -> ToyTransformer:
    """Return a frozen model with random weights."""
    torch.manual_seed(seed)
    return ToyTransformer().requires_grad_(False)
