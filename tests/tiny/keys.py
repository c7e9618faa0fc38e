"""Keys and shapes of adapter files in the namings of several programs."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

Shapes = dict[str, tuple[int, ...]]


def kohya(path: str, width: int = 768, num_outputs: int = 320) -> Shapes:
    name = path.replace("text_encoder.", "lora_te.").replace("unet.", "lora_unet.").replace(".", "_")
    down, up = (4, width), (num_outputs, 4)
    return {f"{name}.alpha": (), f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def peft(path: str, width: int = 768, num_outputs: int = 320) -> Shapes:
    return {f"{path}.lora_A.weight": (4, width), f"{path}.lora_B.weight": (num_outputs, 4)}


def lora_of(model: nn.Module, paths: Iterable[str]) -> Mapping[str, Any]:
    """List a LoRA of rank 1 on these layers of a full-size model under Kohya names, without variants."""
    shapes: dict[str, list[int]] = {}
    for path in paths:
        rows, columns = model.get_submodule(path).weight.shape  # type: ignore[misc, union-attr]
        stem = f"lora_unet_{path.replace('.', '_')}"
        shapes |= {f"{stem}.lora_down.weight": [1, columns], f"{stem}.lora_up.weight": [rows, 1], f"{stem}.alpha": []}
    return {"default": shapes}
