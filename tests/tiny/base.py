"""The facts of a base model that the suites need. Each module of this folder lists its own as BASES."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model_spec import BaseModelSpec
from library.memory.blocks import BlockRunner, Stacks, run_blocks_with, stacks_of
from library.protocols import AdapterView
from tests.tiny.init import fixed_init
from tests.tiny.keys import Shapes

TEXT_CACHE = ["--network_train_unet_only", "--cache_text_encoder_outputs_to_disk", "--cache_latents"]
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Deep:
    """A denoiser with enough blocks for swapping, its inputs, and access to its blocks."""

    build: Callable[[], nn.Module]
    values: Callable[[], Values]
    view: AdapterView
    most_graphs: int
    """Compiled graphs: at most two per kind of block, as the first block's input has no gradient; U-Nets have many
    widths."""
    stacks: Callable[[nn.Module], Stacks] = stacks_of
    run_blocks_with: Callable[[nn.Module, BlockRunner], None] = run_blocks_with

    def frozen(self, seed: int) -> nn.Module:
        """Build the frozen denoiser with random weights; convolutions are channels-last, as in runs."""
        model = self.build()
        model.load_state_dict(fixed_init(model, seed))
        return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def seen(self, model: nn.Module) -> nn.Module:
        """Return the denoiser as adapters see it."""
        return self.view([], model)[1]

    def loss(self, model: nn.Module, device: torch.device) -> Tensor:
        """Return a scalar that depends on every value of the output."""
        output = model(*(value.to(device) for value in self.values()))
        output = getattr(output, "sample", output)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(41)).to(device)
        return (output.float() * weights).mean()


@dataclass(frozen=True)
class Pair:
    """A denoiser of ours and diffusers', with the same weights."""

    names: BaseNames
    seen: nn.Module  # ours, with the paths of adapter files
    theirs: Mapping[str, Any]  # by the prefix of their names
    predict: Callable[[], Tensor]
    their_prediction: Callable[[], Tensor]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Return our named Linear layers and convolutions by Kohya name."""
        named_modules = {module.kohya for module in self.names.modules}
        by_kohya_name = {f"lora_unet_{path.replace('.', '_')}": module for path, module in layers_of(self.seen)}
        return {name: module for name, module in by_kohya_name.items() if name in named_modules}

    @property
    def their_layers(self) -> dict[str, nn.Module]:
        """Return the layers of diffusers by its names."""
        layers = {f"{prefix}.{path}": m for prefix, part in self.theirs.items() for path, m in layers_of(part)}
        return {name: module for name, module in layers.items() if self.names.find(name) is not None}


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def pair_of(
    names: BaseNames, ours: nn.Module, theirs: nn.Module, values: Sequence[Any], run_theirs: Callable[..., Tensor]
) -> Pair:
    """Pair two transformers; `run_theirs` takes diffusers' model and our inputs."""
    detached = [value.detach() for value in values]
    return Pair(names, ours, {"transformer": theirs}, lambda: ours(*detached), lambda: run_theirs(theirs, *detached))


@dataclass(frozen=True)
class Compared:
    """A tiny denoiser with outputs and gradients equal to those of diffusers' model."""

    model: Callable[[], Any]
    theirs: Callable[[Any], Any]
    inputs: Mapping[str, Callable[[], Values]]  # by name; gradients are compared of those that require one
    run_theirs: Callable[..., Tensor]
    run: Callable[..., Tensor] = lambda model, *values: model(*values)
    least: float = 0.1  # every compared tensor has a larger value


@dataclass(frozen=True)
class InDiffusers:
    """How diffusers loads the adapter files of a full-size model."""

    models: Callable[[], dict[str, nn.Module]]  # built on the meta device
    mixin: str
    variants: tuple[str, ...] = ("default",)  # of `Base.listing`
    clip_widths: tuple[int, ...] = ()  # of the CLIPs whose adapters it loads


def training_command(files: str, sampling: str, module: str) -> str:
    """Return musubi-tuner's documented command for training, with {paths}."""
    return (
        f"{files} --dataset_config {{data}} --sdpa --mixed_precision bf16 {sampling} --weighting_scheme none "
        "--optimizer_type AdamW --learning_rate 1e-4 --gradient_checkpointing --max_data_loader_n_workers 2 "
        f"--persistent_data_loader_workers --network_module {module} --network_dim 32 --max_train_epochs 1 "
        "--save_every_n_epochs 1 --seed 42 --output_dir {out} --output_name name-of-lora"
    )


@dataclass(frozen=True)
class Dit:
    """A transformer whose LoRA is saved in names that other programs read, with options of musubi-tuner."""

    build: Callable[..., list[str]]  # folder, seed, layout
    stored_layer: str  # a layer to store as fp8 codes with one scale
    mark: str  # a token of the text encoder's template
    encoder: str  # hub name of the text encoder
    names: BaseNames
    model: Callable[[], Any]  # a tiny transformer
    values: Callable[[], list[Tensor]]
    theirs: Callable[[Any], Any]  # diffusers' transformer with the same weights
    run_theirs: Callable[..., Tensor]
    pipeline: str
    layer: tuple[str, str]  # a layer that every network adapts: Kohya name and name in saved files
    blocks: tuple[str, ...]  # path prefixes of the layers other trainers adapt, ours and diffusers'
    own: Sequence[Mapping[str, str]]  # arguments of its network module; the last set adapts more layers
    plain: Mapping[str, str]  # arguments of networks.lora
    trainers: Sequence[tuple[str, bool]]  # (trainer, True if it uses diffusers paths)
    converted: tuple[str, str, str]  # the first key of a file in the namings of kohya, ComfyUI and diffusers
    architectures: Mapping[str, str]  # layout -> modelspec.architecture of a merged file
    trained: Mapping[str, Callable[[Path], list[str]]]  # release, if there are several -> its tiny model
    training: str  # musubi-tuner's command, with {paths}
    num_adapted: int  # layers that it adapts
    saved: tuple[str, int]  # the name of one in the file, and its inputs
    theirs_in_file: Mapping[str, tuple[int, int]]  # underscored layers of a musubi-tuner file -> rows and columns
    continued_ranks: Mapping[str, int]  # saved layer -> rank, after training from that file of rank 2
    full_size: Mapping[str, tuple[Any, int]]  # release -> its sizes and number of parameters
    adapted: tuple[str, str]  # patterns of the paths that are adapted by default, and with the last of `own`
    embedders: str  # pattern of the paths whose rank that sets to 2
    encoder_in_8_bits: str = "--fp8_text_encoder"
    prefix: str = "diffusion_model"  # prefix in saved files
    other_kinds: str = ""  # prefix in files of other kinds than LoRA; Kohya names if empty


@dataclass(frozen=True)
class Base:
    """A tiny model of one base model, and what the suites expect of it."""

    name: str
    script: str
    module: str  # its network module
    build: Callable[[Path], list[str]]  # writes the model into a folder and returns the options that select it
    spec_name: str = ""  # of its BaseModelSpec; `name` if empty
    adapts_text_encoders: bool = False
    unused: str = r"(?!)"  # pattern of adapted layers whose output the model does not use
    everything: Mapping[str, str] = field(default_factory=dict)  # network arguments that adapt most layers
    written: tuple[str, str] = ("", "")  # ss_base_model_version and modelspec.architecture of its files

    # --- runs ---
    runs: Mapping[str, list[str]] = field(default_factory=lambda: {"text_cache": TEXT_CACHE})  # of tests.behaviour
    deeper: Mapping[str, int] = field(
        default_factory=dict
    )  # changes of the module's CONFIG: enough blocks for swapping
    blocks_to_swap: str = "2"  # that the model with more blocks allows
    needs_newer: str = ""  # the package of kohya_ss' environment that is too old for it
    draws_without_guidance: bool = False  # of its own, as when its guidance is distilled
    math_attention: str = r"(?!)"  # pattern of attention calls that no fused kernel supports
    other_options: tuple[str, ...] = ()  # of other programs, for which its script names a replacement

    releases: tuple[tuple[str, ...], ...] = ()  # options that select further releases

    # --- the objective of flow models ---
    is_velocity_reversed: bool = False  # points to the image
    default_shift: float | None = None  # of its default noise levels at 1024 px, if these are logit-normal
    offset_words: tuple[str, ...] = ("--sigmoid_scale", "0.7")  # noise levels from a normal variate
    offset_factor: float = 0.7  # applied to the normal variate

    # --- the denoiser ---
    compared: Mapping[str, Compared] = field(default_factory=dict)
    deep: Deep | None = None
    pairs: Mapping[str, Callable[[], Pair]] = field(default_factory=dict)
    unnamed: str = r"(?!)"  # pattern of layers that no argument adapts; files with them are rejected
    verified: Mapping[str, Callable[[], nn.Module]] = field(
        default_factory=dict
    )  # most with more blocks than are compared
    count_share: float = 0.03  # by which the counted memory of a step may differ from the allocated
    count_shape: tuple[int, int, int] = (2, 256, 192)  # batch size, width and height of that step
    merged: tuple[str, Mapping[str, str]] | None = None  # network module and arguments of merged files

    # --- files ---
    full_size: Mapping[str, tuple[int, Callable[[Path], list[str]]]] = field(default_factory=dict)
    """Title -> (side of the usual images in pixels, function that writes headers and returns the arguments)."""
    readers: tuple[tuple[str, str, Shapes], ...] = ()
    """(Title, one letter for each program: A if it uses all keys, S some, N none; keys of a file)."""
    listing: Callable[[], Mapping[str, Any]] | None = None  # keys and shapes of its adapter files, and their variants
    in_diffusers: InDiffusers | None = None
    in_comfyui: str = ""  # variant of `listing` to compare with the names that ComfyUI looks up; none if empty
    dit: Dit | None = None
    in_layouts: Callable[..., list[str]] | None = None  # as `Dit.build`, for models without `dit`

    @property
    def layouts(self) -> Callable[..., list[str]] | None:
        """Write a model into a folder from a seed in a layout: "files", "whole" or "diffusers"."""
        return self.in_layouts if self.dit is None else self.dit.build

    @property
    def spec(self) -> BaseModelSpec:
        return next(spec for spec in list_specs() if spec.name == (self.spec_name or self.name))

    @property
    def package(self) -> str:
        """The folder in library/architectures."""
        return self.spec.build.__module__.split(".")[2]

    @property
    def assembly(self) -> ModuleType:
        return import_module(self.spec.build.__module__)

    @property
    def caches_text(self) -> bool:
        """False if its captions are encoded in every step."""
        return "cache_text_encoder_outputs" in self.spec.options.defaults()

    @property
    def is_flow(self) -> bool:
        return self.spec.objective is not None

    def build_deep(self, folder: Path) -> list[str]:
        """Write a model with enough blocks that some can be swapped besides the two that must stay."""
        module = sys.modules[self.build.__module__]
        with pytest.MonkeyPatch.context() as patch:
            if self.deeper:
                patch.setattr(module, "CONFIG", replace(vars(module)["CONFIG"], **self.deeper))
            return self.build(folder)


def path_argument(path: Path, *more: str) -> list[str]:
    return ["--pretrained_model_name_or_path", str(path), *more]
