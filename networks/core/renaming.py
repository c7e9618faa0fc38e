"""Adapter files from one naming to another, computing the same.

The generic and the diffusers naming have no alpha: the scale alpha / rank is multiplied into lora_B there. Read back,
such a file has the rank for alpha, so its scale is 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoints.adapter_names import BaseNames, FileNaming
from networks.core.adapter_file import AdapterFile
from networks.core.files import ALPHA, DOWN, UP
from networks.core.module_weights import B_NORM, DORA_SCALE, W_NORM, ModuleWeights

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
HELD: Mapping[FileNaming, frozenset[str] | None] = {  # leaves that a naming has a place for; None: all
    "kohya": None,
    "generic": frozenset((DOWN, UP, ALPHA, DORA_SCALE, W_NORM, B_NORM)),
    "diffusers": frozenset((DOWN, UP, ALPHA)),
}
SEPARABLE = frozenset((DORA_SCALE, W_NORM, B_NORM))  # without these the rest of a module still is an adapter


@dataclass(frozen=True)
class Renamed:
    """A file in another naming, and what that took."""

    file: AdapterFile
    dropped: tuple[str, ...]  # keys of the old file that the naming cannot hold
    widened: tuple[str, ...]  # modules whose factors became float32, so that the scale could be multiplied in


def rename(file: AdapterFile, names: BaseNames, to: FileNaming, drop_unsupported: bool = False) -> Renamed:
    """The file in the naming `to`.

    Raises ValueError naming the keys that `to` cannot hold, unless they are to be dropped, and for a file in which one
    module stands twice.
    """
    lost = list(unsupported_keys(file, names, to))
    if lost and not drop_unsupported:
        raise ValueError(
            f"{file.origin}: the {to} naming has no place for {some_keys(lost)}; --drop_unsupported leaves them out, "
            "which changes what the adapter does"
        )
    modules: dict[str, ModuleWeights] = {}
    widened = []
    for module in file.modules.values():
        found = names.find(module.name)
        kept = {leaf: tensor for leaf, tensor in module.tensors.items() if module.keys[leaf] not in lost}
        if found is None or not kept:
            continue
        name = found.in_naming(to)
        if name in modules:
            raise ValueError(f"{file.origin} has the module {name} twice, under different names; remove one of them")
        tensors = with_alpha_tensor(module, kept) if to == "kohya" else without_alpha(module, kept)
        modules[name] = ModuleWeights(name, tensors, {leaf: f"{name}.{ending(leaf, to)}" for leaf in tensors})
        if DOWN in kept and tensors[DOWN].dtype != kept[DOWN].dtype:
            widened.append(name)
    if not modules:
        raise ValueError(f"{file.origin}: the {to} naming can hold none of its {len(file.modules)} modules")
    renamed = file.with_modules(modules.values(), file.metadata)
    return Renamed(AdapterFile(file.origin, renamed.modules, renamed.metadata, {}), tuple(lost), tuple(widened))


def unsupported_keys(file: AdapterFile, names: BaseNames, to: FileNaming) -> Iterator[str]:
    """The keys that a naming has no place for: whole modules that make no sense without one, and single tensors."""
    held = HELD[to]
    for module in file.modules.values():
        if names.find(module.name) is None:
            yield from module.keys.values()
            continue
        foreign = [leaf for leaf in module.tensors if held is not None and leaf not in held]
        loses_all = any(leaf not in SEPARABLE for leaf in foreign)
        yield from (key for leaf, key in module.keys.items() if loses_all or leaf in foreign)
    yield from file.unknown


def with_alpha_tensor(module: ModuleWeights, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with an alpha of their own and the magnitudes of DoRA in the dimensions of the weight."""
    tensors = dict(kept)
    if module.is_low_rank and ALPHA not in tensors:
        tensors[ALPHA] = torch.tensor(module.alpha, dtype=torch.float32)
    if DORA_SCALE in tensors and DOWN in tensors and tensors[DORA_SCALE].dim() == 1:  # PEFT: one number per output
        tensors[DORA_SCALE] = tensors[DORA_SCALE].view(-1, *(1,) * (tensors[DOWN].dim() - 1))
    return tensors


def without_alpha(module: ModuleWeights, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the scale multiplied into lora_up."""
    tensors = {leaf: tensor for leaf, tensor in kept.items() if leaf != ALPHA}
    if module.is_low_rank:
        tensors[UP], tensors[DOWN] = fold_scale(tensors[UP], tensors[DOWN], module.scale)
    return tensors


def fold_scale(up: Tensor, down: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scale * up, down), in their dtype where that is exact and in float32 where it is not.

    A power of two is exact in every dtype unless the product becomes too small for it. In float32 every product of a
    float16 or bfloat16 number and a scale of up to 13 binary digits is exact, others are rounded to 24 digits. Both
    factors get the same dtype, since PEFT multiplies them as they are.
    """
    if scale == 1:
        return up, down
    exact = up.double() * scale
    for dtype in (up.dtype, torch.float32):
        folded = exact.to(dtype)
        if dtype == torch.float32 or torch.equal(folded.double(), exact):
            break
    is_wider = folded.dtype != up.dtype
    return (folded, down.float()) if is_wider else (folded, down)


def ending(leaf: str, naming: FileNaming) -> str:
    """The end of a key."""
    return leaf if naming == "kohya" else {DOWN: LORA_A, UP: LORA_B}.get(leaf, leaf)


def some_keys(keys: Iterable[str], most: int = 6) -> str:
    """Keys in a sentence, the first few of many."""
    keys = list(keys)
    shown = ", ".join(keys[:most])
    return shown if len(keys) <= most else f"{len(keys)} keys: {shown} and {len(keys) - most} more"
