"""Conversion of PEFT's AdaLoRA files to LoRA: the singular values are multiplied into the down factor.

`lora_A` (R, I), `lora_E` (R, 1) and `lora_B` (O, R) have no `.weight` suffix. R differs by module, since AdaLoRA prunes
ranks, and can be 0.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.base.errors import UserError

KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[ABE])(?:\.(?!weight$)[\w-]+)?")
KEYS = ("A", "B", "E")
INITIAL_RANK = "init_r"  # PEFT divides alpha by it even after pruning
EPSILON = 1e-5  # added to that divisor by PEFT


def alpha_of(alpha: float, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the alpha of a module with `rank` remaining ranks. PEFT divides alpha by the rank before pruning."""
    return alpha * rank / (settings[INITIAL_RANK] + EPSILON) if INITIAL_RANK in settings else alpha


def to_lora(tensors: Mapping[str, Tensor], origin: str) -> Mapping[str, Tensor]:
    """Replace the three tensors of each AdaLoRA module in a file by `lora_A.weight` and `lora_B.weight`.

    Modules with rank 0 are dropped. Files without AdaLoRA are returned unchanged. Raises UserError if a module lacks
    one of the three tensors or their shapes do not fit together.
    """
    matches = {key: match for key in tensors if (match := KEY.fullmatch(key)) is not None}
    if not any(match["factor"] == "E" for match in matches.values()):
        return tensors
    modules: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        modules.setdefault(match["module"], {})[match["factor"]] = tensors[key]
    converted = {key: tensor for key, tensor in tensors.items() if key not in matches}
    for name, factors in modules.items():
        missing = [parameter_key for parameter_key in KEYS if parameter_key not in factors]
        if missing:
            raise UserError(f"{origin} has {name} without its lora_{missing[0]}; the file is incomplete")
        a_RI, b_OR, e_R = factors["A"], factors["B"], factors["E"].flatten()
        if not len(a_RI) == b_OR.shape[-1] == len(e_R):
            shapes = ", ".join(str(list(factors[parameter_key].shape)) for parameter_key in KEYS)
            raise UserError(f"{origin}: lora_A, lora_B and lora_E of {name} do not fit together: {shapes}")
        # PEFT saves modules of which pruning left no rank. They change nothing.
        if len(e_R):
            # In float32 the product is rounded to the dtype of the file only once.
            converted[f"{name}.lora_A.weight"] = (e_R.float()[:, None] * a_RI.float()).to(a_RI.dtype)
            converted[f"{name}.lora_B.weight"] = b_OR
    return converted
