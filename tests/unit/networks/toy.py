"""A base model of a few layers, with one of everything that adapters meet."""

import torch
from torch import Tensor, nn

from networks.core.targets.targets import AdapterTargets, BlockList, Part

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("Transformer2DModel",), conv_blocks=("ResnetBlock2D",)),
    text_encoders=(Part("lora_te", blocks=("CLIPAttention",)),),
    block_list=BlockList(("", r"^down\.0\.", r"^mid\.", r"^up\.0\."), down=2, mid=1, up=1),
)


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.proj_in = nn.Conv2d(6, 8, 1)
        self.to_q = nn.Linear(8, 6, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.proj_in(self.norm(x_BCHW)).permute(0, 2, 3, 1)
        return x_BCHW + self.to_q(x_BHWC).permute(0, 3, 1, 2)


class ResnetBlock2D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.time_emb_proj = nn.Linear(5, 6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        time_B5 = x_BCHW.mean((1, 2, 3))[:, None].expand(-1, 5)
        return x_BCHW + self.conv1(torch.tanh(x_BCHW)) + self.time_emb_proj(time_B5)[:, :, None, None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D()
        self.attention = Transformer2DModel()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(self.resnet(x_BCHW))


class Denoiser(nn.Module):
    """x_BCHW with 6 channels to the same shape."""

    adapter_targets = TARGETS

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(6, 6, 3, padding=1)
        self.down = nn.ModuleList([Block()])
        self.mid = Block()
        self.up = nn.ModuleList([Block()])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.up[0](self.mid(self.down[0](self.conv_in(x_BCHW))))


class CLIPAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(7, 7)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.q_proj(x_BTC)


class TextEncoder(nn.Module):
    """x_BTC with 7 channels to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPAttention(), CLIPAttention()])
        self.norm = nn.LayerNorm(7)

    def forward(self, x_BTC: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTC = layer(x_BTC)
        return self.norm(x_BTC)


def toy_models(seed: int) -> tuple[TextEncoder, Denoiser]:
    """Return frozen models with random weights."""
    torch.manual_seed(seed)
    return TextEncoder().requires_grad_(False), Denoiser().requires_grad_(False)


def randomize(network: nn.Module, seed: int) -> None:
    """Fill a network with random weights, as after training: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
