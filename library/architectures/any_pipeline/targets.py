"""The layers of a pipeline's denoiser that adapters target: all inside its repeated blocks, by diffusers' paths."""

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, name_by_path
from library.memory.blocks import BlockRunner, Stacks, run_library_blocks_with
from networks.core.targets.targets import AdapterTargets, Part, adaptation_kind

BASE = "any_pipeline"
MOST_STACKS = 2  # that can be offloaded
TARGETS = AdapterTargets(denoiser=Part("lora_unet", blocks=()), expressions="path", elsewhere=list_network_arguments)
"""Each denoiser adds its blocks and the names of its layers."""
NamesOf = Callable[[Collection[str]], BaseNames | None]


def block_lists(denoiser: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of repeated blocks that are in no other such list, in the order of declaration.

    The model names the classes of its blocks; else every list of several modules of one class counts.
    """
    named = {*(getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ())}
    lists = {path: part for path, part in denoiser.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    chosen = {path: part for path, part in lists.items() if type(part[0]).__name__ in named}
    if not chosen:
        chosen = {p: part for p, part in lists.items() if len(part) > 1 and len({type(block) for block in part}) == 1}
    return [part for path, part in chosen.items() if not any(path.startswith(f"{other}.") for other in chosen)]


def stacks(denoiser: nn.Module) -> Stacks:
    """Return the blocks that can be offloaded: those of the longest lists."""
    lists = block_lists(denoiser)
    longest = sorted(lists, key=len, reverse=True)[:MOST_STACKS]
    return [list(blocks) for blocks in lists if blocks in longest]


def run_blocks_with(denoiser: nn.Module, runner: BlockRunner) -> None:
    run_library_blocks_with((block for blocks in block_lists(denoiser) for block in blocks), runner)


def with_targets(denoiser: nn.Module, component: str, published: NamesOf = lambda paths: None) -> nn.Module:
    """Declare the targets of a denoiser, which network modules read. `component` is its name in the pipeline, and
    `published` maps the layers to the names that the model's publisher gives them."""
    paths = [path for path, part in denoiser.named_modules() if adaptation_kind(part) is not None]
    layers = tuple(name_by_path(component, path) for path in paths)
    names = BaseNames(BASE, layers, saved_naming="diffusers", published=published(paths))
    classes = sorted({type(block).__name__ for blocks in block_lists(denoiser) for block in blocks})
    part = replace(TARGETS.denoiser, blocks=tuple(classes))
    denoiser.adapter_targets = replace(TARGETS, denoiser=part, names=names)  # type: ignore[assignment]
    return denoiser
