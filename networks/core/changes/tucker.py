"""LoRA of convolutions larger than 1x1 with a Tucker core between the factors (use_tucker).

Letters: O output channels, I input channels, R rank, h w kernel, N = I * h * w.
"""

import torch
from torch import Tensor, nn

from networks.core.changes.change import get_weight
from networks.core.changes.low_rank import TwoFactors, narrow_like

MID = "lora_mid.weight"


class Tucker(TwoFactors):
    """LoRA of a larger kernel in Tucker form: dW[o,i,h,w] = sum over p and q of up[o,p] mid[p,q,h,w] down[q,i].

    `lora_down.weight` is (R, I, 1, 1), `lora_mid.weight` (R, R, h, w) with the layer's stride and padding,
    `lora_up.weight` (O, R, 1, 1). Down and mid start kaiming uniform with a = sqrt(5), up at zero. All are float32.
    """

    has_core = True

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d)
        self.rank = rank
        self.lora_down = nn.Conv2d(layer.in_channels, rank, 1, bias=False, dtype=torch.float32)
        self.lora_mid = narrow_like(layer, rank, in_channels=rank)
        self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, dtype=torch.float32)
        self.draw(self.lora_down, self.lora_mid)

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.lora_mid(super().down(x, columns))
        return hidden

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN), with the core multiplied into down."""
        up_OR, down_RI = super().factors()
        return up_OR, torch.einsum("pqhw,qi->pihw", self.lora_mid.weight, down_RI).flatten(1)

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        num_inputs, kernel = get_weight(self.lora_down).shape[1], self.lora_mid.weight.shape[2:]
        return (up_OR @ down_RN).reshape(-1, num_inputs, *kernel)
