"""Target modules of adapters: a declaration per base model, and the search that applies it.

A denoiser carries its declaration as `adapter_targets`, so this package does not import architectures. Paths are those
of the model as network modules see it. With underscores instead of dots they are the names in files.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model_spec import ArgumentForm

TargetKind = Literal["plain", "conv", "norm"]


@dataclass(frozen=True)
class Part:
    """One model (denoiser or text encoder) and the blocks in which target modules are searched."""

    prefix: str  # prefix of all names saved for this part: "lora_unet", "lora_te1"
    blocks: tuple[str, ...]  # class names; every Linear and Conv2d below them is a candidate
    attention: tuple[str, ...] = ()  # classes of attention inside the blocks, for kinds that adapt attention only
    conv_blocks: tuple[str, ...] = ()  # also searched if kernels larger than 1x1 are adapted
    exclude: tuple[str, ...] = ()  # patterns of whole paths that are excluded, unless include_patterns match them
    needs: str = ""  # network argument that enables this part, such as train_t5xxl
    extra_blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # argument -> additional block classes


@dataclass(frozen=True)
class BlockList:
    """The numbered blocks of a U-Net, to which block_dims, block_alphas and the *_lr_weight lists refer.

    `patterns[i]` matches the paths of block i; an empty pattern marks an entry without adapters. `down`, `mid` and `up`
    are the lengths of down_lr_weight, mid_lr_weight and up_lr_weight. `padding` entries at either end belong to none of
    these lists.
    """

    patterns: tuple[str, ...]
    down: int
    mid: int
    up: int
    padding: int = 0

    def index_of(self, path: str) -> int | None:
        """Return the index of the block that contains a path, or None if none does."""
        return next((i for i, p in enumerate(self.patterns) if p and re.search(p, path)), None)


@dataclass(frozen=True)
class Embedders:
    """Layers outside the blocks, adapted only if one argument gives them ranks.

    Entry i of the argument is the rank of modules at or below paths that match `patterns[i]`.
    """

    argument: str  # "in_dims"
    patterns: tuple[str, ...]

    def index_of(self, path: str) -> int | None:
        """Return the index of the entry that a path belongs to, or None if it belongs to none."""
        return next((i for i, p in enumerate(self.patterns) if re.match(rf"(?:{p})(?:\.|$)", path)), None)


Widths = Callable[[int, int], tuple[int, ...]]
"""(input features, output features) of a fused layer -> outputs of each projection, in order."""


def thirds(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """Return the widths of q, k and v, a third of the outputs each."""
    return (num_outputs // 3,) * 3


def qkv_and_rest(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """Return the widths of q, k and v, each as wide as the input, and of the remaining outputs."""
    return (*(num_inputs,) * 3, num_outputs - 3 * num_inputs)


@dataclass(frozen=True)
class AdapterTargets:
    """Declaration of one base model for the adapter core.

    All patterns are regular expressions. Unless stated otherwise they are searched for in the path of a module.
    """

    denoiser: Part
    text_encoders: tuple[Part, ...] = ()
    block_list: BlockList | None = None  # None: no block_dims and *_lr_weight lists for this model
    ranks: Mapping[str, str] = field(default_factory=dict)  # argument -> pattern; the first given match decides
    embedders: Embedders | None = None
    block_choices: Mapping[str, str] = field(default_factory=dict)  # argument -> pattern with the block number as group
    subsets: Mapping[str, str] = field(
        default_factory=dict
    )  # value of train_blocks except "all" -> pattern of the modules that are adapted
    fused: Mapping[str, Widths] = field(default_factory=dict)  # pattern of fused layers -> widths of their projections
    names: BaseNames | None = None  # module names of other programs, to train their files further
    expressions: Literal["name", "path"] = "name"  # network_reg_* match parts of names and whole paths, or paths only
    elsewhere: Callable[[], Mapping[str, ArgumentForm]] = dict  # network arguments of all base models

    @property
    def arguments(self) -> Mapping[str, ArgumentForm]:
        """Network arguments that this declaration defines, and the form of their values."""
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
        """Network arguments of this and of other base models. The latter cause a warning instead of an error."""
        return {**self.elsewhere(), **self.arguments}

    def spelled(self, name: str) -> tuple[str, ...]:
        """Return a module's name in files, and its aliases in other programs that use kohya's naming."""
        module = self.names.find(name) if self.names else None
        prefixes = tuple(f"{part.prefix}_" for part in (self.denoiser, *self.text_encoders))
        return (name, *(alias for alias in (module.aliases if module else ()) if alias.startswith(prefixes)))

    def widths_of(self, path: str, module: nn.Module) -> tuple[int, ...] | None:
        """Return the outputs of each projection of a fused layer, or None for other layers."""
        widths = next((widths for pattern, widths in self.fused.items() if re.search(pattern, path)), None)
        if widths is None or not isinstance(module, nn.Linear):
            return None
        return widths(module.in_features, module.out_features)


@dataclass(frozen=True)
class TargetModule:
    """One module that an adapter can wrap."""

    name: str  # "lora_unet_double_blocks_0_img_attn_qkv"
    path: str  # "double_blocks.0.img_attn.qkv"
    module: nn.Module
    kind: TargetKind  # plain: Linear and 1x1 convolution; conv: larger kernels; norm: a normalisation layer


@dataclass(frozen=True)
class Filters:
    """A user's patterns of whole paths: excluded in addition to those of each part, and readmitted."""

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # adapts exactly the matching modules, even if they are excluded

    def leave_out(self, part: Part, path: str) -> bool:
        if self.only:
            return not any(re.fullmatch(p, path) for p in self.only)
        is_excluded = any(re.fullmatch(p, path) for p in (*part.exclude, *self.exclude))
        return is_excluded and not any(re.fullmatch(p, path) for p in self.include)


UNFILTERED = Filters()


def adaptation_kind(module: nn.Module) -> TargetKind | None:
    """Return how a module is adapted, or None if it is not."""
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
    """Return every Linear and Conv2d below a block of the given classes, once each, in the order of declaration."""
    return [
        TargetModule(target_name(part, path), path, module, kind)
        for path, module in _walk(root, classes)
        if (kind := adaptation_kind(module)) is not None and not filters.leave_out(part, path)
    ]


def find_embedders(
    part: Part, root: nn.Module, embedders: Embedders, blocks: Sequence[TargetModule]
) -> list[TargetModule]:
    """Return every Linear and Conv2d of the embedders, in the order of declaration, without those found in blocks."""
    block_paths = {target.path for target in blocks}
    return [
        TargetModule(target_name(part, path), path, module, kind)
        for path, module in root.named_modules()
        if (kind := adaptation_kind(module)) is not None
        and path not in block_paths
        and embedders.index_of(path) is not None
    ]


def count_blocks(root: nn.Module, pattern: str) -> int:
    """Return the number of blocks of a model. The group of `pattern` matches the number of a block."""
    matches = (re.search(pattern, path) for path, _ in root.named_modules())
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def find_norms(
    part: Part, root: nn.Module, classes: Sequence[str], filters: Filters = UNFILTERED
) -> list[TargetModule]:
    """Return every LayerNorm and GroupNorm with a weight below a block of the given classes, once each."""
    return [
        TargetModule(target_name(part, path), path, module, "norm")
        for path, module in _walk(root, classes)
        if type(module) in (nn.LayerNorm, nn.GroupNorm)
        and module.weight is not None
        and not filters.leave_out(part, path)
    ]


def _walk(root: nn.Module, classes: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of everything inside the blocks, once each."""
    seen: set[str] = set()
    for block_path, block in root.named_modules():
        if type(block).__name__ not in classes:
            continue
        for child_path, child in block.named_modules():
            path = ".".join(p for p in (block_path, child_path) if p)
            # Blocks can contain blocks of another given class.
            if path not in seen:
                seen.add(path)
                yield path, child
