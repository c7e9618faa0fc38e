"""The forms by the names that --base_format knows."""

from collections.abc import Mapping

import torch

from library.memory.formats.format import Form
from library.memory.formats.fp8 import Fp8Rows
from library.memory.formats.int8 import Int8Rows
from library.memory.formats.nf4 import Nf4
from library.memory.formats.plain import Plain

FORMS: Mapping[str, Form] = {
    "bf16": Plain(torch.bfloat16),
    "fp8": Fp8Rows(),
    "int8": Int8Rows(),
    "int8_rotated": Int8Rows(is_rotated=True),
    "nf4": Nf4(),
    "nf4_double": Nf4(is_double=True),
}
