"""The two functions of a network module, `create_network` and `create_network_from_weights`, for any adapter kind."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from library.base.errors import UserError, about, error_in, list_few, of_file
from networks.core.arguments.common import RankArguments, RateArguments, TargetArguments
from networks.core.arguments.network_arguments import NetworkArguments, NetworkSettings
from networks.core.changes.dora import DoraArguments, can_have_magnitudes
from networks.core.changes.init import InitArguments
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.qkv_pieces import group_by_rows
from networks.core.changes.tlora import NoiseLevels, TLoraArguments
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, open_adapter
from networks.core.files.file_spelling import FileSpelling, recognise_spelling
from networks.core.files.foreign_names import to_own_names
from networks.core.files.reading_writing import usable_modules
from networks.core.kinds import norm
from networks.core.network.members import AdaptedModel, MemberMaker, rates_alone
from networks.core.network.network import AdapterNetwork, Member
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.layouts import PIECES, list_layouts, recognise_layout
from networks.core.registry.parsing import WRAPPERS, list_arguments, list_ignored, parse_arguments
from networks.core.targets.rules import make_rules
from networks.core.targets.selection import Expressions, check_choices, list_targets
from networks.core.targets.targets import AdapterTargets, Filters, TargetModule, find_norms

logger = logging.getLogger(__name__)

DEFAULT_ALPHA = 1.0

TextEncoder = nn.Module | Sequence[nn.Module | None] | None
"""One model, a list if the base model has several, or None if text encoders are not loaded."""

Groups = Mapping[str, Mapping[str, Tensor]]
"""The tensors of an adapter file by module and parameter key."""

CreateNetwork = Callable[..., AdapterNetwork]
CreateFromWeights = Callable[..., tuple[AdapterNetwork, dict[str, Tensor]]]


def network_module(kind: AdapterKind) -> tuple[CreateNetwork, CreateFromWeights]:
    """Return `create_network` and `create_network_from_weights` for the network module of a kind."""
    return partial(create_network, kind), partial(create_network_from_weights, kind)


def create_network(
    kind: AdapterKind,
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
    """Make adapters of the given rank and alpha on every target module.

    `network_dim` defaults to the kind's rank and `network_alpha` to 1; an alpha of 0 means the rank. `unet` is the
    denoiser as network modules see it, with the attribute `adapter_targets`. Raises UserError for wrong network
    arguments, or if every module has rank 0.
    """
    targets = targets_of(unet)
    arguments = parse_arguments({**network_args, **kind.presets}, neuron_dropout, targets.known_arguments)
    check_arguments(kind, arguments)
    settings = resolve_settings(kind, network_dim, network_alpha, arguments)
    rank, arguments = settings.rank, settings.arguments
    check_choices(targets, arguments, unet)
    maker = MemberMaker(kind, targets, arguments, multiplier, NoiseLevels())
    members: list[Member] = []
    models = list(narrow_adapted_models(kind, targets, arguments, text_encoder, unet))
    for model in models:
        rules = make_rules(rank, settings.alpha, arguments, targets, is_denoiser=model.is_denoiser)
        members += maker.fresh(model, rules)
    if not members:
        raise error_in("--network_dim")(
            f"nothing to train: with --network_dim {rank} and these --network_args every module has the rank 0"
        )
    report_new_members(targets, arguments, members)
    report_without_magnitudes(arguments, members)
    warn_of_idle_patterns(models, targets, arguments)
    network = AdapterNetwork(members, targets, arguments, maker.noise)
    network.start_step = kind.prepare([member.adapter for member in members], arguments)
    return network


def create_network_from_weights(
    kind: AdapterKind,
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
    """Make adapters for the modules in a file, with its ranks and alphas. Return the file's tensors too.

    The weights are not loaded. Tucker cores, magnitudes and norms exist where the file has them. These network
    arguments apply: the dropouts, the LoRA+ ratios, use_scalar, dora_wd, wd_on_output, dora_constant_norm, split_qkv,
    network_reg_lrs and the *_lr_weight lists. Raises UserError if the file cannot be used.
    """
    targets = targets_of(unet)
    adapter_file = open_adapter(file, weights_sd)
    in_file = ("dora_wd",) if any(module.is_dora for module in adapter_file.modules.values()) else ()
    arguments = parse_arguments({**network_args, **kind.presets}, neuron_dropout, targets.known_arguments, in_file)
    check_arguments(kind, arguments)
    warn_of_ranks(arguments, in_file)
    renamed = to_own_names(adapter_file, targets.names, keeps_pieces=True)
    layouts = list_layouts() if for_inference else (*kind.layouts, norm.LAYOUT)
    modules = usable_modules(renamed, (*layouts, PIECES))
    groups = {name: module.tensors for name, module in modules.items()}
    spelling = None if for_inference else spelling_to_keep(kind, groups, adapter_file, targets)
    maker = MemberMaker(kind, targets, arguments, multiplier, NoiseLevels())
    members: list[Member] = []
    for model in list_adapted_models(targets, text_encoder, unet):
        rules = rates_alone(arguments, targets, is_denoiser=model.is_denoiser)
        members += maker.of_file(model, rules, groups, str(file), is_merged=for_inference)
    if not members:
        raise error_in(path=file, cause="does not fit")(
            f"{file}: none of its {len(groups)} modules is in this base model; was it made for another?"
        )
    network = AdapterNetwork(members, targets, arguments, maker.noise, str(file), spelling)
    if not for_inference:
        check_forms(kind, arguments, groups, str(file))
        report_without_magnitudes(arguments, members)
        target_modules = [member.adapter.target for member in members]
        warn_of_unmatched(targets, target_modules, "network_reg_lrs", arguments.of(RateArguments).network_reg_lrs or ())
        network.start_step = kind.prepare([member.adapter for member in members], arguments)
    network.train(not for_inference)
    return network, adapter_tensors(renamed)


def report_new_members(targets: AdapterTargets, arguments: NetworkArguments, members: Sequence[Member]) -> None:
    """Warn about arguments for layers that are not adapted. Log the modules (`verbose`) and an `init` from weights."""
    target_modules = [member.adapter.target for member in members]
    ranks, selection = arguments.of(RankArguments), arguments.of(TargetArguments)
    rates = arguments.of(RateArguments)
    if ranks.conv_dim is not None and not any(target.kind == "conv" for target in target_modules):
        if targets.denoiser.conv_blocks:
            logger.warning(
                "--network_args conv_dim=%s adapts no convolution larger than 1x1; the Linear layers and 1x1 "
                "convolutions of %s are adapted with it at network_dim: leave conv_dim out to adapt attention alone",
                ranks.conv_dim,
                ", ".join(targets.denoiser.conv_blocks),
            )
        else:
            logger.warning("--network_args conv_dim has no effect: no convolution larger than 1x1 is adapted here")
    if selection.train_norm and not any(target.kind == "norm" for target in target_modules):
        logger.warning("--network_args train_norm has no effect: the adapted blocks have no norms with weights")
    warn_of_unmatched(targets, target_modules, "network_reg_dims", ranks.network_reg_dims or ())
    warn_of_unmatched(targets, target_modules, "network_reg_lrs", rates.network_reg_lrs or ())
    tlora, denoiser_ranks = arguments.of(TLoraArguments), [m.settings.rank for m in members if m.text_encoder is None]
    if tlora.tlora and max(denoiser_ranks, default=0) <= tlora.tlora_min_rank:
        logger.warning(
            "--network_args tlora_min_rank=%d: no layer of the denoiser has more ranks, so all of them act at every "
            "noise level and T-LoRA has no effect; lower it, or raise --network_dim",
            tlora.tlora_min_rank,
        )
    if selection.verbose:
        for member in members:
            logger.info("%s: rank %d", member.adapter.target.name, member.settings.rank)
    if (init := arguments.of(InitArguments)).starts_at_weight:
        logger.info(
            "init=%s: factors start at a part of the weights; the saved LoRA takes it out again, at twice the rank",
            init.init,
        )


def report_without_magnitudes(arguments: NetworkArguments, members: Sequence[Member]) -> None:
    """Log the layers that DoRA leaves to the plain change of its kind."""
    adapters = [member.adapter for member in members if member.adapter.target.kind != "norm"]
    if not arguments.of(DoraArguments).dora_wd:
        return
    names = [a.target.name for a in adapters if not (can_have_magnitudes(a.target.module) or a.change.size.magnitudes)]
    if names:
        logger.info(
            "--network_args dora_wd: %s has one output and gets no magnitudes, which ComfyUI, Forge and A1111-style "
            "loaders would read differently",
            list_few(names),
        )


def warn_of_idle_patterns(models: Sequence[AdaptedModel], targets: AdapterTargets, arguments: NetworkArguments) -> None:
    """Warn about exclude_patterns and include_patterns that change nothing."""
    patterns = arguments.of(TargetArguments)
    if not (patterns.exclude_patterns or patterns.include_patterns or patterns.only_patterns):
        return
    excluded = Filters(patterns.exclude_patterns)
    candidates = [(model.part, target.path) for model in models for target in list_candidates(model, targets)]
    paths = [path for _, path in candidates]
    readmitted = [path for part, path in candidates if excluded.leave_out(part, path)]
    for argument, given, fitting, what in (
        ("exclude_patterns", patterns.exclude_patterns, paths, "no module"),
        ("include_patterns", patterns.include_patterns, readmitted, "no module that is left out"),
        ("include_patterns", patterns.only_patterns, paths, "no module"),
    ):
        idle = [pattern for pattern in given if not any(re.fullmatch(pattern, path) for path in fitting)]
        if idle:
            logger.warning(
                "--network_args %s: %s has the whole path %s (paths look like %s); this has no effect",
                argument, what, " or ".join(idle), paths[-1],
            )  # fmt: skip


def list_candidates(model: AdaptedModel, targets: AdapterTargets) -> list[TargetModule]:
    """Return every module of a part of the base model that any argument could adapt, norms included."""
    part, everything = model.part, Filters(include=(".*",))
    norms = find_norms(part, model.root, part.blocks + part.conv_blocks, everything)
    return [*norms, *list_targets(part, model.root, targets)]


def warn_of_unmatched(
    targets: AdapterTargets, adapted: Sequence[TargetModule], argument: str, entries: Sequence[tuple[str, float]]
) -> None:
    """Warn about entries of network_reg_dims or network_reg_lrs whose expression fits no adapted module."""
    fits = Expressions(tuple(entries), targets).fits
    unused = [text for text, value in entries if value and not any(fits(text, target) for target in adapted)]
    if unused:
        hint = f"; here an expression must fit a whole path, such as {adapted[-1].path}"
        logger.warning(
            "--network_args %s: nothing is adapted that %s fits%s",
            argument, " or ".join(unused), hint if targets.expressions == "path" else "",
        )  # fmt: skip


def check_arguments(kind: AdapterKind, arguments: NetworkArguments) -> None:
    """Raise UserError for an argument that this kind does not support; warn about arguments of other kinds."""
    for name, (conflict, reason) in list_refused(kind, arguments).items():
        if arguments.given.get(name):
            raise error_in(f"--network_args {name}", cause="does not fit")(
                f"--network_args {name} does not work with {conflict}: {reason}"
            )
    for owners, names in list_ignored(kind, arguments).items():
        logger.warning("--network_args %s has no effect; it belongs to %s", ", ".join(names), owners)


def list_refused(kind: AdapterKind, arguments: NetworkArguments) -> Mapping[str, tuple[str, str]]:
    """Return (conflicting part, reason) for each argument that does not work with this kind or the other arguments."""
    this_module = "this --network_module"
    refused = {
        n: (this_module, wrapper_type.made_for)
        for wrapper_type in WRAPPERS
        if wrapper_type not in kind.wrappers
        for n in wrapper_type.switches
    }
    for wrapper in (arguments.of(wrapper_type) for wrapper_type in WRAPPERS):
        if wrapper.is_on:
            refused |= {name: (wrapper.label, why) for name, why in wrapper.excludes.items()}
    return refused | {name: (this_module, why) for name, why in kind.refuses.items()}


def resolve_settings(
    kind: AdapterKind, network_dim: int | None, network_alpha: float | None, arguments: NetworkArguments
) -> NetworkSettings:
    """Return the rank, alpha and arguments in the core's terms. Raises UserError for a negative rank or alpha."""
    rank = kind.default_rank if network_dim is None else network_dim
    alpha = DEFAULT_ALPHA if network_alpha is None else float(network_alpha)
    settings = kind.resolve(NetworkSettings(rank, alpha, arguments, network_dim is not None))
    if settings.rank < 0 or settings.alpha < 0:
        raise about("--network_dim")(
            f"is {settings.rank} and --network_alpha {settings.alpha:g}; neither can be negative"
        )
    return settings


def check_forms(kind: AdapterKind, arguments: NetworkArguments, groups: Groups, source: str) -> None:
    """Raise UserError if a file to be trained further has features that this kind does not support."""
    parts = [part for group in groups.values() for part in (group_by_rows(group).values() or [group])]
    features = {
        "use_tucker": any(recognise_layout(part).has_core(part) for part in parts),
        "dora_wd": any(DORA_SCALE in part for part in parts),
    }
    refused = list_refused(kind, arguments)
    for name, is_present in features.items():
        if is_present and name in refused:
            raise of_file(source)(
                f"was trained with {name}, which does not work with this --network_module: {refused[name][1]}"
            )


def spelling_to_keep(
    kind: AdapterKind, groups: Groups, file: AdapterFile, targets: AdapterTargets
) -> FileSpelling | None:
    """Return the names of a file that splits layers, under which the network is saved again; None for other files.

    Raises UserError if the kind cannot train the parts of a layer.
    """
    if not any(recognise_layout(group) is PIECES for group in groups.values()):
        return None
    check_pieces(kind, groups, file.origin)
    assert targets.names is not None
    return recognise_spelling(file, targets.names)


def check_pieces(kind: AdapterKind, groups: Groups, source: str) -> None:
    """Raise UserError if a file has a separate part of a layer that this kind cannot train."""
    for module, group in groups.items():
        for name, piece in group_by_rows(group).items():
            layout = recognise_layout(piece)
            if layout.is_low_rank and layout in kind.layouts:
                continue
            fix = "merge it with --base_weights"
            if layout.is_low_rank:
                fix = f"use --network_module {layout.network_module}"
            raise of_file(source)(
                f"has {layout.words} of a part of {module} ({name.replace('_', ' ')}), which is one layer "
                f"here; this --network_module cannot train it further: {fix}"
            )


def warn_of_ranks(arguments: NetworkArguments, in_file: Sequence[str]) -> None:
    """Warn about arguments that a file overrides; `in_file` names those whose feature it has."""
    init, known = arguments.of(InitArguments), list_arguments()
    overridden = [name for name in arguments.given if name in known and known[name].is_fixed_by_file]
    dora = arguments.of(DoraArguments)
    # With dora_wd, modules that have no magnitudes in the file get new ones, in this form.
    overridden += ["wd_on_output"] if dora.wd_on_output and not dora.dora_wd and "dora_wd" in in_file else []
    overridden += ["init"] if init.is_on and not init.starts_at_weight else []
    overridden += [name for name, value in arguments.of_model.items() if value]
    if overridden:
        logger.warning(
            "--dim_from_weights takes ranks, alphas and forms from the file: %s has no effect", ", ".join(overridden)
        )


def targets_of(denoiser: nn.Module) -> AdapterTargets:
    """Return the target declaration of a denoiser. Raises UserError if it has none."""
    targets = getattr(denoiser, "adapter_targets", None)
    if not isinstance(targets, AdapterTargets):
        raise UserError(
            f"{type(denoiser).__name__} says nothing about what adapters may attach to: its attribute "
            "`adapter_targets` must be a networks.core.targets.targets.AdapterTargets, as the view of each "
            "architecture has it"
        )
    return targets


def list_adapted_models(targets: AdapterTargets, text_encoder: TextEncoder, denoiser: nn.Module) -> list[AdaptedModel]:
    """Return the parts of the base model in file order, text encoders first."""
    encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or [])
    adapted_encoders = [
        AdaptedModel(part, encoder, index)
        for index, (part, encoder) in enumerate(zip(targets.text_encoders, encoders, strict=False))
        if encoder is not None
    ]
    return [*adapted_encoders, AdaptedModel(targets.denoiser, denoiser, None)]


def narrow_adapted_models(
    kind: AdapterKind, targets: AdapterTargets, arguments: NetworkArguments, text_encoder: TextEncoder,
    denoiser: nn.Module,
) -> Iterator[AdaptedModel]:  # fmt: skip
    """Yield the parts of the base model that get new adapters, narrowed to the modules that the kind adapts."""
    for model in list_adapted_models(targets, text_encoder, denoiser):
        part = kind.narrow(model.part, model.is_denoiser, arguments)
        if part is not None and (not model.part.needs or arguments.of_model.get(model.part.needs)):
            yield replace(model, part=part)
