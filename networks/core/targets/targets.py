"""The modules that an adapter may attach to: a declaration per base model, and the search that applies it.

A base model's denoiser carries its declaration as `adapter_targets`, so this package imports no architecture. Paths are
those of the model as network modules see it; with dots turned into underscores they are the names in files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from library.checkpoints.adapter_names import BaseNames, FileNaming
from library.checkpoints.base_model_spec import ArgumentForm

TargetKind = Literal["plain", "conv", "norm"]


@dataclass(frozen=True)
class Part:
    """One model (denoiser or text encoder) and the blocks inside it that adapters search."""

    prefix: str  # of every weight name saved for this part: "lora_unet", "lora_te1"
    blocks: tuple[str, ...]  # class names; every Linear and Conv2d below them is a candidate
    attention: tuple[str, ...] = ()  # classes of attention inside the blocks, for kinds that adapt nothing else
    conv_blocks: tuple[str, ...] = ()  # searched too when kernels larger than 1x1 are adapted
    exclude: tuple[str, ...] = ()  # patterns of whole paths that are left out, unless include_patterns readmits them
    needs: str = ""  # the network argument, such as train_t5xxl, without which this part is left alone
    extra_blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # argument that asks for more -> classes


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
        """Return the block that a path lies in, None for a path outside all of them."""
        return next((i for i, p in enumerate(self.patterns) if p and re.search(p, path)), None)


@dataclass(frozen=True)
class Embedders:
    """Layers outside the blocks, adapted only when one argument gives them ranks.

    Entry i of the argument is the rank of what lies at or below paths that begin with entry i of `patterns`.
    """

    argument: str  # "in_dims"
    patterns: tuple[str, ...]

    def index_of(self, path: str) -> int | None:
        """Return the entry that a path belongs to, None for a path of none."""
        return next((i for i, p in enumerate(self.patterns) if re.match(rf"(?:{p})(?:\.|$)", path)), None)


Widths = Callable[[int, int], tuple[int, ...]]
"""(input features, output features) of a fused layer -> the outputs of each of its projections, in order."""


def thirds(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """q, k and v of equal width."""
    return (num_outputs // 3,) * 3


def qkv_and_rest(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """q, k and v as wide as the input, and what remains."""
    return (*(num_inputs,) * 3, num_outputs - 3 * num_inputs)


@dataclass(frozen=True)
class AdapterTargets:
    """Everything the adapter core must know about one base model.

    All patterns are regular expressions; unless said otherwise they are searched for in the path of a module.
    """

    denoiser: Part
    text_encoders: tuple[Part, ...] = ()
    block_list: BlockList | None = None  # None: block_dims and the *_lr_weight lists do not exist for this model
    ranks: Mapping[str, str] = field(default_factory=dict)  # argument -> pattern; the first given one that fits decides
    embedders: Embedders | None = None
    block_choices: Mapping[str, str] = field(default_factory=dict)  # argument -> pattern with the number as its group
    subsets: Mapping[str, str] = field(
        default_factory=dict
    )  # value of train_blocks beside "all" -> pattern of the rest
    fused: Mapping[str, Widths] = field(default_factory=dict)  # pattern of what split_qkv splits -> how
    names: BaseNames | None = None  # what other programs call the modules, so that their files can be trained further
    saved_naming: FileNaming = "kohya"  # of files with LoRA alone; other kinds mostly have kohya's names
    expressions: Literal["name", "path"] = "name"  # network_reg_*: a part of the name or the whole path, or that alone
    elsewhere: Callable[[], Mapping[str, ArgumentForm]] = dict  # network arguments of all base models

    @property
    def arguments(self) -> Mapping[str, ArgumentForm]:
        """The network arguments that this declaration gives a meaning to, and how their values are written."""
        parts = (self.denoiser, *self.text_encoders)
        flags = [*(part.needs for part in parts if part.needs), *(name for part in parts for name in part.extra_blocks)]
        return {
            **dict.fromkeys(self.ranks, "rank"),
            **dict.fromkeys([self.embedders.argument] if self.embedders else [], "ranks"),
            **dict.fromkeys(self.block_choices, "blocks"),
            **dict.fromkeys(["train_blocks"] if self.subsets else [], "word"),
            **dict.fromkeys(flags, "flag"),
        }

    @property
    def known_arguments(self) -> Mapping[str, ArgumentForm]:
        """Those, and the arguments of other base models: one of theirs gets a warning here and no error."""
        return {**self.elsewhere(), **self.arguments}

    def spelled(self, name: str) -> tuple[str, ...]:
        """Return a module's name in files, and what other programs of kohya's naming call it."""
        module = self.names.find(name) if self.names else None
        prefixes = tuple(f"{part.prefix}_" for part in (self.denoiser, *self.text_encoders))
        return (name, *(other for other in (module.aliases if module else ()) if other.startswith(prefixes)))

    def widths_of(self, path: str, module: nn.Module) -> tuple[int, ...] | None:
        """Return the outputs of each projection of a fused layer, None for a layer that is none."""
        split = next((split for pattern, split in self.fused.items() if re.search(pattern, path)), None)
        if split is None or not isinstance(module, nn.Linear):
            return None
        return split(module.in_features, module.out_features)


@dataclass(frozen=True)
class TargetModule:
    """One module that an adapter may wrap."""

    name: str  # "lora_unet_double_blocks_0_img_attn_qkv"
    path: str  # "double_blocks.0.img_attn.qkv"
    module: nn.Module
    kind: TargetKind  # plain: Linear and 1x1 convolution; conv: larger kernels; norm: a normalisation layer


@dataclass(frozen=True)
class Filters:
    """Patterns of a user: whole paths that are left out beside what each part excludes, and that are readmitted."""

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # nothing else is adapted, and what fits is, even if it is excluded

    def leave_out(self, part: Part, path: str) -> bool:
        if self.only:
            return not any(re.fullmatch(p, path) for p in self.only)
        is_excluded = any(re.fullmatch(p, path) for p in (*part.exclude, *self.exclude))
        return is_excluded and not any(re.fullmatch(p, path) for p in self.include)


UNFILTERED = Filters()


def adaptation_kind(module: nn.Module) -> TargetKind | None:
    """Return how a module is adapted, None for a module that is not."""
    if isinstance(module, nn.Linear):
        return "plain"
    if isinstance(module, nn.Conv2d):
        return "plain" if module.kernel_size == (1, 1) else "conv"
    return None


def target_name(part: Part, path: str) -> str:
    """Return the name of a module in files: prefix, then the path with underscores."""
    return f"{part.prefix}.{path}".replace(".", "_")


def find_target_modules(
    part: Part, root: nn.Module, classes: Sequence[str], filters: Filters = UNFILTERED
) -> list[TargetModule]:
    """Find every Linear and Conv2d below a block of the given classes, once each, in the order the modules are
    declared."""
    return [
        TargetModule(target_name(part, path), path, module, kind)
        for path, module in _walk(root, classes)
        if (kind := adaptation_kind(module)) is not None and not filters.leave_out(part, path)
    ]


def find_embedders(
    part: Part, root: nn.Module, embedders: Embedders, blocks: Sequence[TargetModule]
) -> list[TargetModule]:
    """Find every Linear and Conv2d of the embedders, in the order they are declared, without those found in blocks."""
    taken = {target.path for target in blocks}
    return [
        TargetModule(target_name(part, path), path, module, kind)
        for path, module in root.named_modules()
        if (kind := adaptation_kind(module)) is not None and path not in taken and embedders.index_of(path) is not None
    ]


def count_blocks(root: nn.Module, pattern: str) -> int:
    """Count the blocks of a model whose number is the group of a pattern."""
    found = (re.search(pattern, path) for path, _ in root.named_modules())
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def find_norms(
    part: Part, root: nn.Module, classes: Sequence[str], filters: Filters = UNFILTERED
) -> list[TargetModule]:
    """Find every LayerNorm and GroupNorm with a learnable weight below a block of the given classes, once each."""
    return [
        TargetModule(target_name(part, path), path, module, "norm")
        for path, module in _walk(root, classes)
        if type(module) in (nn.LayerNorm, nn.GroupNorm)
        and module.weight is not None
        and not filters.leave_out(part, path)
    ]


def _walk(root: nn.Module, classes: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of everything inside the blocks."""
    seen: set[str] = set()
    for block_path, block in root.named_modules():
        if type(block).__name__ not in classes:
            continue
        for child_path, child in block.named_modules():
            path = ".".join(p for p in (block_path, child_path) if p)
            if path not in seen:
                seen.add(path)
                yield path, child
