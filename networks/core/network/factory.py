"""The two functions that --network_module must offer, made for one door."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from networks.core.arguments.parsing import NetworkArguments, parse_arguments
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.files.file_spelling import FileSpelling, spelling_of
from networks.core.files.foreign_names import in_own_names
from networks.core.files.reading_writing import group_by_module, read_adapters
from networks.core.kinds import norm
from networks.core.kinds.kind import FOR_FEW, Door
from networks.core.kinds.qkv_pieces import by_rows
from networks.core.kinds.table import KINDS, PIECES, kind_of
from networks.core.network.build_adapters import Place, fresh_members, members_of_file, rates_alone, starts_at_weight
from networks.core.network.network import AdapterNetwork, Member
from networks.core.targets.rules import make_rules
from networks.core.targets.selection import check_choices
from networks.core.targets.targets import AdapterTargets

logger = logging.getLogger(__name__)

DEFAULT_ALPHA = 1.0
RANK_ARGUMENTS = (
    "conv_dim",
    "conv_alpha",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "factor",
    "block_size",
)
FORM_ARGUMENTS = (
    "use_tucker",
    "decompose_both",
    "full_matrix",
    "block_share",
    "block_num",
    "enable_conv",
    "enable_all_linear",
    "train_norm",
    "rslora",
    "network_reg_dims",
    "exclude_patterns",
    "include_patterns",
)
OF_DOORS = {  # network modules -> arguments that no other has
    "networks.dylora": ("unit", "conv_unit", "train_all_ranks"),
    "networks.lokr": ("factor", "decompose_both", "full_matrix"),
    "networks.oft_v2": ("coft", "coft_eps", "block_share"),
    "networks.boft": ("block_num", "boft_n_butterfly_factor"),
    "networks.oft_v2 and networks.boft": ("block_size", "auto_adjust"),
    "networks.oft, networks.oft_v2 and networks.boft": ("enable_conv",),
    "networks.oft": ("enable_all_linear",),
}
ONE_WEIGHT = (
    "its magnitudes divide by the norm of one changed weight, but with T-LoRA every sample of a batch has its own"
)
WITH_INIT = {  # what a start of one's own cannot be combined with
    "use_tucker": "it is made for two factors, not three",
    "use_scalar": "a trained strength starts at zero, and where the change starts at zero too neither has a gradient",
    "split_qkv": "it is made for the weight of a layer as a whole",
}
WITH_GGPO = dict.fromkeys(
    ("init", "use_tucker", "split_qkv", "use_scalar", "dora_wd"),
    "the norms that its noise follows are those of two plain factors",
)
TLORA_ARGUMENTS = ("tlora_min_rank", "tlora_power")

TextEncoder = nn.Module | Sequence[nn.Module | None] | None
"""One model, a list where the base model has several, None where text encoders are not loaded."""

Groups = Mapping[str, Mapping[str, Tensor]]
"""The tensors of an adapter file by module."""

CreateNetwork = Callable[..., AdapterNetwork]
CreateFromWeights = Callable[..., tuple[AdapterNetwork, dict[str, Tensor]]]


def network_module(door: Door) -> tuple[CreateNetwork, CreateFromWeights]:
    """`create_network` and `create_network_from_weights` of one door, which gives them these names."""
    return partial(create_network, door), partial(create_network_from_weights, door)


def create_network(
    door: Door,
    /,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoder,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> AdapterNetwork:
    """Adapters of the given rank (unset: the kind's own) and alpha (default 1, 0 for the rank) on every target.

    `unet` is the denoiser as network modules see it; it carries `adapter_targets`. Raises UserError for wrong
    network arguments.
    """
    targets = targets_of(unet)
    arguments = arguments_of(door, parse_arguments(network_args, neuron_dropout, targets.known_arguments))
    rank, alpha, arguments = resolved(door, network_dim, network_alpha, arguments)
    check_choices(targets, arguments, unet)
    chosen = door if door.with_arguments is None else door.with_arguments(arguments)
    members: list[Member] = []
    for place in new_places(door, targets, arguments, text_encoder, unet):
        rules = make_rules(rank, alpha, arguments, targets, is_denoiser=place.text_encoder is None)
        members += fresh_members(chosen, targets, place, rules, arguments, multiplier)
    if not members:
        raise UserError(
            f"nothing to train: with --network_dim {rank} and these --network_args every module has the rank 0"
        )
    report_new_members(targets, arguments, members)
    network = AdapterNetwork(members, targets, arguments, chosen.start_step)
    if door.check is not None:
        door.check(network)
    return network


def create_network_from_weights(
    door: Door,
    /,
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
    the network arguments the dropouts, the LoRA+ ratios, use_scalar, dora_wd, wd_on_output, dora_constant_norm,
    split_qkv, network_reg_lrs and the *_lr_weight lists count. Raises UserError when the file cannot be used.
    """
    targets = targets_of(unet)
    arguments = arguments_of(door, parse_arguments(network_args, neuron_dropout, targets.known_arguments))
    warn_of_ranks(arguments)
    given = read_adapters(file) if weights_sd is None else weights_sd
    weights = dict(in_own_names(given, targets.names, file, keeps_pieces=True))
    kinds = KINDS if for_inference else (*door.kinds, norm.KIND)
    groups = group_by_module(weights, str(file), (*kinds, PIECES))
    spelling = None if for_inference else spelling_to_keep(door, groups, given, targets, file)
    chosen = door if door.with_arguments is None else door.with_arguments(arguments)
    members: list[Member] = []
    for place in places(targets, text_encoder, unet):
        rules = rates_alone(arguments, targets, is_denoiser=place.text_encoder is None)
        members += members_of_file(
            chosen, targets, place, rules, arguments, multiplier, groups, str(file), for_inference
        )
    if not members:
        raise UserError(f"{file}: none of its {len(groups)} modules is in this base model; was it made for another?")
    network = AdapterNetwork(members, targets, arguments, chosen.start_step, str(file), spelling)
    if not for_inference:
        check_forms(door, arguments, groups, str(file))
        if door.check is not None:
            door.check(network)
    network.train(not for_inference)
    return network, weights


def report_new_members(targets: AdapterTargets, arguments: NetworkArguments, members: Sequence[Member]) -> None:
    """Warn of arguments for layers that are not adapted, and log the modules with `verbose` and a start at weights."""
    target_modules = [member.adapter.target for member in members]
    if arguments.conv_dim is not None and not any(target.kind == "conv" for target in target_modules):
        if targets.denoiser.conv_blocks:
            logger.warning(
                "--network_args conv_dim=%s adapts no convolution larger than 1x1; the Linear layers and 1x1 "
                "convolutions of %s are adapted with it at network_dim: leave conv_dim out to adapt attention alone",
                arguments.conv_dim,
                ", ".join(targets.denoiser.conv_blocks),
            )
        else:
            logger.warning("--network_args conv_dim has no effect: no convolution larger than 1x1 is adapted here")
    if arguments.train_norm and not any(target.kind == "norm" for target in target_modules):
        logger.warning("--network_args train_norm has no effect: the adapted blocks have no norms with weights")
    places = [place for target in target_modules for place in (*targets.spelled(target.name), target.path)]
    for name in ("network_reg_dims", "network_reg_lrs"):
        entries = getattr(arguments, name) or ()
        unused = [e for e, value in entries if value and not any(re.search(e, place) for place in places)]
        if unused:
            logger.warning("--network_args %s: nothing is adapted that %s fits", name, " or ".join(unused))
    if arguments.verbose:
        for member in members:
            logger.info("%s: rank %d", member.adapter.target.name, member.settings.rank)
    if starts_at_weight(arguments):
        logger.info(
            "init=%s: factors start at a part of the weights; the saved LoRA takes it out again, at twice the rank",
            arguments.init,
        )


def arguments_of(door: Door, given: NetworkArguments) -> NetworkArguments:
    """The arguments with what the door stands for, held to what it supports (`check_arguments`)."""
    arguments = replace(given, tlora=True) if door.is_tlora else given
    check_arguments(door, arguments)
    return arguments


def check_arguments(door: Door, arguments: NetworkArguments) -> None:
    """Raise UserError for an argument that this kind does not support, warn of those that belong to another."""
    for name, reason in refused_by(door, arguments).items():
        if getattr(arguments, name):
            beside = "this --network_module"
            if arguments.init and name in WITH_INIT:
                beside = f"init={arguments.init}"
            elif arguments.perturbs and name in WITH_GGPO:
                beside = "ggpo_sigma and ggpo_beta"
            raise UserError(f"--network_args {name} does not work with {beside}: {reason}")
    idle = [name for name in TLORA_ARGUMENTS if getattr(arguments, name) != getattr(NetworkArguments, name)]
    if idle and not arguments.tlora:
        logger.warning("--network_args %s has no effect without tlora=True or networks.tlora", ", ".join(idle))
    for owners, names in OF_DOORS.items():
        given = [name for name in names if getattr(arguments, name) != getattr(NetworkArguments, name)]
        given = [name for name in given if name not in door.arguments]
        if given:
            logger.warning("--network_args %s has no effect; it belongs to %s", ", ".join(given), owners)


def resolved(
    door: Door, network_dim: int | None, network_alpha: float | None, arguments: NetworkArguments
) -> tuple[int, float, NetworkArguments]:
    """The rank, alpha and the arguments in the core's own terms."""
    rank = door.default_rank if network_dim is None else network_dim
    if door.resolve is not None:
        rank, arguments = door.resolve(network_dim, arguments, door.default_rank)
    alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
    if door.resolve_alpha is not None:
        alpha, arguments = door.resolve_alpha(alpha, arguments)
    if rank < 0 or alpha < 0:
        raise UserError(f"--network_dim is {rank} and --network_alpha {alpha:g}; neither can be negative")
    return rank, alpha, arguments


def refused_by(door: Door, arguments: NetworkArguments) -> Mapping[str, str]:
    """Network argument -> why it does not work with this kind of adapter."""
    few = {name: reason for name, reason in FOR_FEW.items() if name not in door.takes}
    with_tlora = {"dora_wd": ONE_WEIGHT} if arguments.tlora else {}
    with_init = WITH_INIT if arguments.init is not None else {}
    with_noise = WITH_GGPO if arguments.perturbs else {}
    return {**few, **with_noise, **with_tlora, **with_init, **door.refuses}


def check_forms(door: Door, arguments: NetworkArguments, groups: Groups, source: str) -> None:
    """Raise UserError where a file that is to be trained further has what this kind does not support."""
    parts = [own for group in groups.values() for own in (by_rows(group).values() or [group])]
    found = {
        "use_tucker": any(kind_of(own).has_core(own) for own in parts),
        "dora_wd": any(DORA_SCALE in own for own in parts),
    }
    refused = refused_by(door, arguments)
    for name, is_there in found.items():
        if is_there and name in refused:
            raise UserError(
                f"{source} was trained with {name}, which does not work with this --network_module: {refused[name]}"
            )


def spelling_to_keep(
    door: Door, groups: Groups, given: Mapping[str, Tensor], targets: AdapterTargets, file: str
) -> FileSpelling | None:
    """The names of a file that has parts of layers apart, to be saved under again; None for other files.

    Raises UserError where the door does not train such a part.
    """
    if not any(kind_of(group) is PIECES for group in groups.values()):
        return None
    check_pieces(door, groups, str(file))
    assert targets.names is not None
    return spelling_of(given, targets.names, file)


def check_pieces(door: Door, groups: Groups, source: str) -> None:
    """Raise UserError where a file has a part of a layer apart that this kind does not train as such."""
    for module, group in groups.items():
        for name, own in by_rows(group).items():
            kind = kind_of(own)
            if kind.is_low_rank and kind in door.kinds:
                continue
            way_out = f"use --network_module {kind.door}" if kind.is_low_rank else "merge it with --base_weights"
            raise UserError(
                f"{source} has {kind.words} of a part of {module} ({name.replace('_', ' ')}), which is one layer here; "
                f"this --network_module cannot train it further: {way_out}"
            )


def warn_of_ranks(arguments: NetworkArguments) -> None:
    """Say which arguments a file overrules."""
    given = [name for name in RANK_ARGUMENTS if getattr(arguments, name) is not None]
    given += [name for name in FORM_ARGUMENTS if getattr(arguments, name)]
    given += ["init"] if arguments.init and not starts_at_weight(arguments) else []
    given += [name for name, value in arguments.of_model.items() if value]
    if given:
        logger.warning(
            "--dim_from_weights takes ranks, alphas and forms from the file: %s has no effect", ", ".join(given)
        )


def targets_of(denoiser: nn.Module) -> AdapterTargets:
    """The declaration that a denoiser carries."""
    targets = getattr(denoiser, "adapter_targets", None)
    if not isinstance(targets, AdapterTargets):
        raise UserError(
            f"{type(denoiser).__name__} says nothing about what adapters may attach to: its attribute "
            "`adapter_targets` must be a networks.core.targets.targets.AdapterTargets, as the view of each "
            "architecture has it"
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


def new_places(
    door: Door, targets: AdapterTargets, arguments: NetworkArguments, text_encoder: TextEncoder, denoiser: nn.Module
) -> Iterator[Place]:
    """The parts of the base model that get new adapters with these arguments, narrowed to what the kind adapts."""
    for place in places(targets, text_encoder, denoiser):
        is_left_out = place.text_encoder is not None and door.denoiser_only
        if not is_left_out and (not place.part.needs or arguments.of_model.get(place.part.needs)):
            yield place if door.narrow is None else replace(place, part=door.narrow(place.part, arguments))
