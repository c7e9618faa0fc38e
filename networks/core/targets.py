"""What an adapter may attach to: a declaration per base model, and the search that applies it.

A base model's denoiser carries its declaration as `adapter_targets`, so this package imports no architecture. Paths are
those of the model as network modules see it; with dots turned into underscores they are the names in files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["plain", "conv", "norm"]


@dataclass(frozen=True)
class Part:
    """One model (denoiser or text encoder) and the blocks inside it that adapters search."""

    prefix: str  # of every weight name saved for this part: "lora_unet", "lora_te1"
    blocks: tuple[str, ...]  # class names; every Linear and Conv2d below them is a candidate
    conv_blocks: tuple[str, ...] = ()  # searched too when kernels larger than 1x1 are adapted
    exclude: tuple[str, ...] = ()  # patterns of whole paths that are left out


@dataclass(frozen=True)
class BlockList:
    """The numbered blocks of a U-Net that block_dims, block_alphas and the *_lr_weight lists speak of.

    Entry i of `patterns` is found in the paths of block i; an empty pattern stands for an entry without adapters. The
    three counts say how many entries the lists down_lr_weight, mid_lr_weight and up_lr_weight have; `padding` entries
    at either end are in none of them.
    """

    patterns: tuple[str, ...]
    down: int
    mid: int
    up: int
    padding: int = 0

    def index_of(self, path: str) -> int | None:
        """The block that a path lies in, None for a path outside all of them."""
        return next((i for i, p in enumerate(self.patterns) if p and re.search(p, path)), None)


@dataclass(frozen=True)
class AdapterTargets:
    """Everything the adapter core must know about one base model."""

    denoiser: Part
    text_encoders: tuple[Part, ...] = ()
    block_list: BlockList | None = None  # None: block_dims and the *_lr_weight lists do not exist for this model


@dataclass(frozen=True)
class Site:
    """One module that an adapter may wrap."""

    name: str  # "lora_unet_double_blocks_0_img_attn_qkv"
    path: str  # "double_blocks.0.img_attn.qkv"
    module: nn.Module
    kind: Kind  # plain: Linear and 1x1 convolution; conv: larger kernels; norm: a normalisation layer


def kind_of(module: nn.Module) -> Kind | None:
    """How a module is adapted, None for a module that is not."""
    if isinstance(module, nn.Linear):
        return "plain"
    if isinstance(module, nn.Conv2d):
        return "plain" if module.kernel_size == (1, 1) else "conv"
    return None


def site_name(part: Part, path: str) -> str:
    """The name of a module in files: prefix, then the path with underscores."""
    return f"{part.prefix}.{path}".replace(".", "_")


def find_sites(part: Part, root: nn.Module, classes: Sequence[str]) -> list[Site]:
    """Every Linear and Conv2d below a block of the given classes, once each, in the order the modules are declared."""
    return [
        Site(site_name(part, path), path, module, kind)
        for path, module in _walk(root, classes)
        if (kind := kind_of(module)) is not None and not any(re.fullmatch(p, path) for p in part.exclude)
    ]


def find_norms(part: Part, root: nn.Module, classes: Sequence[str]) -> list[Site]:
    """Every LayerNorm and GroupNorm with a learnable weight below a block of the given classes, once each."""
    return [
        Site(site_name(part, path), path, module, "norm")
        for path, module in _walk(root, classes)
        if type(module) in (nn.LayerNorm, nn.GroupNorm)
        and module.weight is not None
        and not any(re.fullmatch(p, path) for p in part.exclude)
    ]


def _walk(root: nn.Module, classes: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything inside the blocks."""
    seen: set[str] = set()
    for block_path, block in root.named_modules():
        if type(block).__name__ not in classes:
            continue
        for child_path, child in block.named_modules():
            path = ".".join(p for p in (block_path, child_path) if p)
            if path not in seen:
                seen.add(path)
                yield path, child
