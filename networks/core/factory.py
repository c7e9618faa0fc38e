"""The two functions that --network_module must offer, made for one kind of adapter."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from networks.core.adapter import Adapter, Dropout
from networks.core.arguments import NetworkArguments, parse_arguments
from networks.core.delta import Delta, Tucker
from networks.core.files import DORA_SCALE, MID, W_NORM, group_by_module, rank_and_alpha, read_adapters
from networks.core.join import Add, Decompose
from networks.core.network import AdapterNetwork, Member, StartStep
from networks.core.norms import NormAdapter
from networks.core.rules import Allotment, make_lr_factors, make_rules
from networks.core.targets import AdapterTargets, Part, Site, find_norms, find_sites

logger = logging.getLogger(__name__)

DEFAULT_RANK = 4
DEFAULT_ALPHA = 1.0
RANK_ARGUMENTS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
FORM_ARGUMENTS = ("use_tucker", "train_norm")
NESTED_ARGUMENTS = ("unit", "conv_unit", "train_all_ranks")

MakeDelta = Callable[[nn.Module, int], Delta]
"""(the layer, its rank) -> the change of its weight."""

TextEncoder = nn.Module | Sequence[nn.Module | None] | None
"""One model, a list where the base model has several, None where text encoders are not loaded."""

CreateNetwork = Callable[..., AdapterNetwork]
CreateFromWeights = Callable[..., tuple[AdapterNetwork, dict[str, Tensor]]]


@dataclass(frozen=True)
class Kind:
    """What is particular to the adapters of one door."""

    make_delta: MakeDelta
    check: Callable[[AdapterNetwork], None] | None = None  # tells what comes of the settings, or raises ValueError
    start_step: StartStep | None = None  # called before each batch of an optimizer step
    refuses: Mapping[str, str] = field(default_factory=dict)  # network argument -> why it cannot meet this kind


@dataclass(frozen=True)
class Form:
    """How the change of one module is stored and joined, beside what its kind says."""

    is_tucker: bool
    is_decomposed: bool


@dataclass(frozen=True)
class Place:
    """One part of the base model that adapters search."""

    part: Part
    root: nn.Module
    text_encoder: int | None  # index of the text encoder, None for the denoiser


def network_module(kind: Kind) -> tuple[CreateNetwork, CreateFromWeights]:
    """`create_network` and `create_network_from_weights` of one kind of adapter; a door gives them these names."""

    def create_network(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: TextEncoder,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> AdapterNetwork:
        """Adapters of the given rank (default 4) and alpha (default 1, 0 for the rank) on everything that is adapted.

        `unet` is the denoiser as network modules see it; it carries `adapter_targets`. Raises ValueError for wrong
        network arguments.
        """
        arguments = parse_arguments(network_args, neuron_dropout)
        check_arguments(kind, arguments)
        rank = DEFAULT_RANK if network_dim is None else network_dim
        alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
        if rank < 0 or alpha < 0:
            raise ValueError(f"--network_dim is {rank} and --network_alpha {alpha:g}; neither can be negative")
        targets = targets_of(unet)
        members = []
        for place in places(targets, text_encoder, unet):
            rules = make_rules(rank, alpha, arguments, targets.block_list, is_denoiser=place.text_encoder is None)
            for site in find_sites(place.part, place.root, rules.classes(place.part)):
                allotment = rules.allot(site)
                if allotment.rank:
                    is_tucker = arguments.use_tucker and site.kind == "conv"
                    form = Form(is_tucker, arguments.dora_wd)
                    members.append(make_member(kind, place, site, allotment, arguments, multiplier, form))
            if arguments.train_norm:
                for site in find_norms(place.part, place.root, rules.classes(place.part)):
                    if (norm_allotment := rules.allot_norm(site)) is not None:
                        members.append(Member(NormAdapter(site, multiplier), place.text_encoder, norm_allotment))
        if not members:
            raise ValueError(f"--network_dim {rank}: every module has rank 0, so there is nothing to train")
        network = AdapterNetwork(members, targets, arguments, kind.start_step)
        if kind.check is not None:
            kind.check(network)
        return network

    def create_network_from_weights(
        multiplier: float,
        file: str,
        vae: nn.Module | None,
        text_encoder: TextEncoder,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:
        """Adapters on the modules that a file names, with its ranks and alphas, and the file's tensors.

        The weights themselves are not loaded. Tucker cores, magnitudes and norms are there where the file has them. Of
        the network arguments the dropouts, the LoRA+ ratios, use_scalar, dora_wd and the *_lr_weight lists count.
        Raises ValueError when the file cannot be used.
        """
        arguments = parse_arguments(network_args, neuron_dropout)
        check_arguments(kind, arguments)
        warn_of_ranks(arguments)
        weights = dict(read_adapters(file) if weights_sd is None else weights_sd)
        groups = group_by_module(weights, str(file))
        targets = targets_of(unet)
        factors = make_lr_factors(arguments, targets.block_list)
        members = []
        for place in places(targets, text_encoder, unet):
            classes = place.part.blocks + place.part.conv_blocks
            for site in (*find_sites(place.part, place.root, classes), *find_norms(place.part, place.root, classes)):
                group = groups.get(site.name)
                if group is None or (W_NORM in group) != (site.kind == "norm"):
                    continue
                is_in_denoiser = place.text_encoder is None
                lr = factors.of(site.path) if factors is not None and is_in_denoiser else (1.0, None)
                if site.kind == "norm":
                    allotment = Allotment(0, 0.0, *lr)
                    members.append(Member(NormAdapter(site, multiplier), place.text_encoder, allotment))
                else:
                    allotment = Allotment(*rank_and_alpha(group), *lr)
                    form = Form(MID in group, DORA_SCALE in group or arguments.dora_wd)
                    members.append(make_member(kind, place, site, allotment, arguments, multiplier, form))
        if not members:
            raise ValueError(
                f"{file}: none of its {len(groups)} modules is in this base model; was it made for another?"
            )
        network = AdapterNetwork(members, targets, arguments, kind.start_step)
        if not for_inference:
            check_forms(kind, groups, str(file))
            if kind.check is not None:
                kind.check(network)
        network.train(not for_inference)
        return network, weights

    return create_network, create_network_from_weights


def check_arguments(kind: Kind, arguments: NetworkArguments) -> None:
    """Raise ValueError for an argument that this kind of adapter cannot meet, warn of those that belong to another."""
    for name, reason in kind.refuses.items():
        if getattr(arguments, name):
            raise ValueError(f"--network_args {name} does not work with this --network_module: {reason}")
    if kind.start_step is None:
        given = [name for name in NESTED_ARGUMENTS if getattr(arguments, name) != getattr(NetworkArguments, name)]
        if given:
            logger.warning("--network_args %s has no effect; it belongs to networks.dylora", ", ".join(given))


def check_forms(kind: Kind, groups: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Raise ValueError where a file that is to be trained further has what this kind of adapter cannot meet."""
    for leaf, name in ((MID, "use_tucker"), (DORA_SCALE, "dora_wd")):
        if name in kind.refuses and any(leaf in group for group in groups.values()):
            raise ValueError(
                f"{source} was trained with {name}, which does not work with this --network_module: "
                f"{kind.refuses[name]}"
            )


def warn_of_ranks(arguments: NetworkArguments) -> None:
    """Say which arguments a file overrules."""
    given = [name for name in RANK_ARGUMENTS if getattr(arguments, name) is not None]
    given += [name for name in FORM_ARGUMENTS if getattr(arguments, name)]
    if given:
        logger.warning(
            "--dim_from_weights takes ranks, alphas and forms from the file: %s has no effect", ", ".join(given)
        )


def targets_of(denoiser: nn.Module) -> AdapterTargets:
    """The declaration that a denoiser carries."""
    targets = getattr(denoiser, "adapter_targets", None)
    if not isinstance(targets, AdapterTargets):
        raise ValueError(
            f"{type(denoiser).__name__} says nothing about what adapters may attach to: its attribute "
            "`adapter_targets` must be a networks.core.targets.AdapterTargets, as the view of each architecture has it"
        )
    return targets


def places(targets: AdapterTargets, text_encoder: TextEncoder, denoiser: nn.Module) -> list[Place]:
    """The parts of the base model in the order of files: text encoders first."""
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or [])
    found = [
        Place(part, encoder, index)
        for index, (part, encoder) in enumerate(zip(targets.text_encoders, encoders, strict=False))
        if encoder is not None
    ]
    return [*found, Place(targets.denoiser, denoiser, None)]


def make_member(
    kind: Kind,
    place: Place,
    site: Site,
    allotment: Allotment,
    arguments: NetworkArguments,
    multiplier: float,
    form: Form,
) -> Member:
    """One adapter, not installed yet."""
    dropout = Dropout(arguments.neuron_dropout, arguments.rank_dropout, arguments.module_dropout)
    delta = (Tucker if form.is_tucker else kind.make_delta)(site.module, allotment.rank)
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    join = Decompose(weight, arguments.dora_constant_norm) if form.is_decomposed else Add()
    adapter = Adapter(site, delta, join, allotment.alpha, dropout, multiplier, arguments.use_scalar)
    return Member(adapter, place.text_encoder, allotment)
