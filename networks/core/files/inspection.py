"""Content of an adapter file for reports: ranks, alphas and norms by block, and problems."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoints.adapter_keys import to_underscores
from networks.core.files.module_weights import ModuleWeights

PREFIX = re.compile(
    r"^(lora_unet|lora_te\d?|lycoris|diffusion_model|unet|transformer|text_encoder(_\d)?|text_encoders_.*?transformer)_"
)
BLOCK = re.compile(r"(?:^|_)((?:single_)?(?:[a-z]+_)?(?:blocks?|layers|refiner)(?:_\d+)?)(?=_|$)")


@dataclass(frozen=True)
class ModuleSummary:
    """Properties of one module. Norms are Frobenius norms in float64."""

    name: str
    part: str  # "denoiser" or "text encoder ..."
    block: str
    kind: str
    rank: int | None
    alpha: float | None
    down_norm: float | None
    up_norm: float | None
    update_norm: float | None  # of the change at strength 1; None for kinds that are only recognised


@dataclass(frozen=True)
class BlockSummary:
    """Properties of the modules of one block. A norm is the root of the sum of squares."""

    part: str
    block: str
    num_modules: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    down_norm: float
    up_norm: float
    update_norm: float


def structure_problem(module: ModuleWeights) -> str | None:
    """Return why the tensors of a module do not fit together, or None if they do."""
    try:
        module.check("the file")
    except ValueError as error:
        return str(error)
    return None


def summarise_module(module: ModuleWeights) -> ModuleSummary:
    """Return the size and strength of a module whose tensors fit together."""
    part, block = locate_module(module.name)
    layout = module.layout
    has_rank = layout.rank_of is not None
    down, up = (norm(module.tensors[key]) for key in layout.ends) if layout.ends else (None, None)
    return ModuleSummary(
        name=module.name,
        part=part,
        block=block,
        kind=name_form(module),
        rank=module.rank if has_rank else None,
        alpha=module.alpha if layout.has_alpha else None,
        down_norm=down,
        up_norm=up,
        update_norm=None if layout.read is None else float(module.change(torch.float64).norm()),
    )


def name_form(module: ModuleWeights) -> str:
    """Return the kind's name in reports."""
    if not module.is_dora:
        return module.form
    return "DoRA per output" if module.is_dora_per_output else "DoRA"


def norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def locate_module(name: str) -> tuple[str, str]:
    """Return (part, block) of a module from its name in any naming."""
    flat = to_underscores(name)
    prefix = PREFIX.match(flat)
    path = flat[prefix.end() :] if prefix else flat
    match = BLOCK.search(path)
    return name_model(flat), match[1] if match else "outside blocks"


def name_model(flat: str) -> str:
    """Return the name of the model that contains a module; text encoders keep their prefix."""
    match = re.match(r"(lora_te\d?|text_encoders_.*?(?=_transformer)|text_encoder(_\d)?)_", flat)
    return f"text encoder ({match[1]})" if match else "denoiser"


def group_by_block(modules: Sequence[ModuleSummary]) -> list[BlockSummary]:
    """Return one entry per part and block: parts in file order, blocks sorted by name and number."""
    groups: dict[tuple[str, str], list[ModuleSummary]] = {}
    for module in modules:
        groups.setdefault((module.part, module.block), []).append(module)
    parts = list(dict.fromkeys(module.part for module in modules))
    return [
        BlockSummary(
            part=part,
            block=block,
            num_modules=len(group),
            ranks=tuple(sorted({m.rank for m in group if m.rank is not None})),
            alphas=tuple(sorted({m.alpha for m in group if m.alpha is not None})),
            down_norm=math.hypot(*(m.down_norm for m in group if m.down_norm is not None)),
            up_norm=math.hypot(*(m.up_norm for m in group if m.up_norm is not None)),
            update_norm=math.hypot(*(m.update_norm for m in group if m.update_norm is not None)),
        )
        for (part, block), group in sorted(
            groups.items(), key=lambda item: (parts.index(item[0][0]), order(item[0][1]))
        )
    ]


def order(block: str) -> list[tuple[str, int]]:
    """Return a key that sorts blocks by name and number: layers_2 before layers_10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", block)]


def count_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Count tensors by dtype, most common first."""
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return dict(counts.most_common())
