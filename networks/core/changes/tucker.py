"""LoRA of larger kernels with a Tucker core between the factors (use_tucker).

Letters: O output channels, I input channels, R rank, h w kernel, N = I * h * w.
"""

import math

import torch
from torch import Tensor, nn

from networks.core.changes.low_rank import add_product, narrow_like, run_down, start_up_moving
from networks.core.changes.parameter_keys import UP

MID = "lora_mid.weight"


class Tucker(nn.Module):
    """LoRA of a larger kernel in Tucker form: dW[o,i,h,w] = sum over p and q of up[o,p] mid[p,q,h,w] down[q,i].

    `lora_down.weight` is (R, I, 1, 1), `lora_mid.weight` (R, R, h, w) with the layer's stride and padding,
    `lora_up.weight` (O, R, 1, 1). Down and mid start kaiming uniform with a = sqrt(5), up at zero. All are float32.
    """

    has_core = True
    is_whole = False
    fast_key = UP

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d)
        self.rank = rank
        self.lora_down = nn.Conv2d(layer.in_channels, rank, 1, bias=False, dtype=torch.float32)
        self.lora_mid = narrow_like(layer, rank, in_channels=rank)
        self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, dtype=torch.float32)
        for module in (self.lora_down, self.lora_mid):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def start_moving(self) -> None:
        start_up_moving(self.lora_up)

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.lora_mid(run_down(self.lora_down, x, columns))
        return hidden

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        return add_product(base, hidden, self.lora_up.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN), the core multiplied into down."""
        up_OR, down_RI = self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)
        return up_OR, torch.einsum("pqhw,qi->pihw", self.lora_mid.weight, down_RI).flatten(1)

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        return (up_OR @ down_RN).reshape(-1, self.lora_down.in_channels, *self.lora_mid.weight.shape[2:])
