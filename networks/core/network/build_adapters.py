"""The adapters of one part of the base model: fresh ones, or those that a file has weights for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

from torch import Tensor, nn

from library.errors import UserError
from networks.core.arguments.parsing import NetworkArguments
from networks.core.arguments.values import ORTHOGONAL
from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import Dropout, ScaledDelta
from networks.core.changes.change import Change, Leaves
from networks.core.changes.dora import Add, Decompose, Join, are_per_output
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.qkv_split import are_apart
from networks.core.changes.tlora import TLoraRanks
from networks.core.kinds import full, norm, qkv_pieces
from networks.core.kinds.init import FromStart, starting_delta
from networks.core.kinds.kind import Door, Kind
from networks.core.kinds.table import PIECES, change_of, kind_of
from networks.core.network.network import Member
from networks.core.targets.rules import Rules, TargetSettings, make_rules
from networks.core.targets.selection import all_targets, chosen_targets, extra_classes, filters_of
from networks.core.targets.targets import AdapterTargets, Filters, Part, TargetModule, find_norms


@dataclass(frozen=True)
class Form:
    """How the change of one module is stored and joined, beside what its kind says."""

    has_core: bool = False
    is_decomposed: bool = False
    is_per_output: bool = False  # of magnitudes, where it is decomposed
    widths: tuple[int, ...] | None = None  # outputs of each projection that is adapted apart


@dataclass(frozen=True)
class Place:
    """One part of the base model that adapters search."""

    part: Part
    root: nn.Module
    text_encoder: int | None  # index of the text encoder, None for the denoiser


def fresh_members(
    door: Door, targets: AdapterTargets, place: Place, rules: Rules, arguments: NetworkArguments, multiplier: float
) -> Iterator[Member]:
    """The adapters of one part of the base model that the arguments ask for."""
    classes = rules.classes(place.part)
    for target in chosen_targets(place.part, place.root, targets, arguments, classes):
        settings = rules.resolve_settings(target)
        if settings.rank:
            if arguments.rslora:
                alpha = (settings.alpha or settings.rank) * sqrt(settings.rank)
                settings = replace(settings, alpha=alpha)
            form = Form(
                has_core=arguments.use_tucker and target.kind == "conv",
                is_decomposed=arguments.dora_wd,
                is_per_output=arguments.wd_on_output,
                widths=targets.widths_of(target.path, target.module)
                if door.make_fresh is not None
                else split_widths(targets, place, target, arguments),
            )
            yield make_member(door, place, target, settings, arguments, multiplier, form)
    if arguments.train_norm:
        classes += extra_classes(place.part, arguments)
        for target in find_norms(place.part, place.root, classes, filters_of(arguments)):
            if (norm_settings := rules.resolve_norm_settings(target)) is not None:
                yield norm_member(place, target, norm_settings, multiplier)


def members_of_file(
    door: Door,
    targets: AdapterTargets,
    place: Place,
    rules: Rules,
    arguments: NetworkArguments,
    multiplier: float,
    groups: Mapping[str, Mapping[str, Tensor]],
    source: str,
    is_merged: bool,
) -> Iterator[Member]:
    """The adapters of one part of the base model that a file has weights for.

    Modules of a kind that the door does not train are read as they are, and of a file that `is_merged` those whose rows
    are several.
    """
    part = place.part
    norms = find_norms(part, place.root, part.blocks + part.conv_blocks, Filters(include=(".*",)))
    for target in (*all_targets(part, place.root, targets), *norms):
        group = groups.get(target.name)
        if group is None or not fits_target(kind := kind_of(group), target):
            continue
        if kind is norm.KIND:
            yield norm_member(place, target, rules.with_rate(target, 0, 0.0), multiplier)
            continue
        assert kind.rank_of is not None
        rank = kind.rank_of(group)
        alpha = kind.alpha_of(group)
        if kind is PIECES and not is_merged:
            yield member_in_rows(door, place, target, rules, arguments, multiplier, group)
            continue
        if kind not in door.kinds:
            adapter = Adapter(target, change_of(group, target.module), multiplier)
            yield Member(adapter, place.text_encoder, rules.with_rate(target, rank, alpha))
            continue
        widths = split_widths(targets, place, target, arguments)
        if widths is not None:
            if not are_apart(group, widths):
                raise UserError(
                    f"--network_args split_qkv: {target.name} is one adapter for all projections of its layer in "
                    f"{source}; leave split_qkv out to train it further as it is"
                )
            rank, alpha = rank // len(widths), alpha / len(widths)
        if starts_at_weight(arguments):
            if rank % 2:
                raise UserError(
                    f"--network_args init={arguments.init}: {target.name} has rank {rank} in {source}, but files "
                    "trained with it have even ranks; leave init out to train it further as it is"
                )
            rank, alpha = rank // 2, alpha / 2
        form = replace(form_of_file(group, arguments), widths=widths)
        yield make_member(door, place, target, rules.with_rate(target, rank, alpha), arguments, multiplier, form, group)


def form_of_file(leaves: Leaves, arguments: NetworkArguments) -> Form:
    """The form that a module of a file has; magnitudes can be new."""
    has_magnitudes = DORA_SCALE in leaves
    is_per_output = are_per_output(leaves[DORA_SCALE]) if has_magnitudes else arguments.wd_on_output
    return Form(kind_of(leaves).has_core(leaves), has_magnitudes or arguments.dora_wd, is_per_output)


def member_in_rows(
    door: Door,
    place: Place,
    target: TargetModule,
    rules: Rules,
    arguments: NetworkArguments,
    multiplier: float,
    leaves: Leaves,
) -> Member:
    """The adapter of a layer of which a file has several changes, each of its own rows; not installed yet."""
    layer, changes = target.module, {}
    assert isinstance(layer, nn.Linear)
    for name, own in qkv_pieces.by_rows(leaves).items():
        kind = kind_of(own)
        assert kind.rank_of is not None
        part = replace(target, module=qkv_pieces.LinearRows(layer, qkv_pieces.rows_of(name, layer.out_features)))
        settings = rules.with_rate(target, kind.rank_of(own), kind.alpha_of(own))
        changes[name] = make_change(door, place, part, settings, arguments, form_of_file(own, arguments), own)
    return Member(
        Adapter(target, qkv_pieces.InRows(changes), multiplier), place.text_encoder, rules.with_rate(target, 0, 0.0)
    )


def fits_target(kind: Kind, target: TargetModule) -> bool:
    """Whether a kind changes layers of this sort: norms have one of their own, and whole weights change anything."""
    return kind is full.KIND or (kind is norm.KIND) == (target.kind == "norm")


def rates_alone(arguments: NetworkArguments, targets: AdapterTargets, is_denoiser: bool) -> Rules:
    """Rules that give learning rates where a file gives ranks."""
    without = replace(arguments, block_dims=None, block_alphas=None, conv_block_dims=None, conv_block_alphas=None)
    return make_rules(0, 0.0, without, targets, is_denoiser)


def split_widths(
    targets: AdapterTargets, place: Place, target: TargetModule, arguments: NetworkArguments
) -> tuple[int, ...] | None:
    """The outputs of each projection of a layer whose projections are adapted apart."""
    if not arguments.split_qkv or place.text_encoder is not None:
        return None
    return targets.widths_of(target.path, target.module)


def make_member(
    door: Door,
    place: Place,
    target: TargetModule,
    settings: TargetSettings,
    arguments: NetworkArguments,
    multiplier: float,
    form: Form,
    leaves: Leaves | None = None,
) -> Member:
    """One adapter, not installed yet; in the form of `leaves`, where those of a file are given."""
    change = make_change(door, place, target, settings, arguments, form, leaves)
    return Member(Adapter(target, change, multiplier), place.text_encoder, settings)


def make_change(
    door: Door,
    place: Place,
    target: TargetModule,
    settings: TargetSettings,
    arguments: NetworkArguments,
    form: Form,
    leaves: Leaves | None,
) -> Change:
    """The change of one layer."""
    drops = Dropout(arguments.neuron_dropout, arguments.rank_dropout, arguments.module_dropout)
    if door.make_fresh is not None and leaves is None:
        alpha = 0.0 if settings.alpha is None else settings.alpha
        return door.make_fresh(target.module, target.path, settings.rank, alpha, drops, form.widths)
    if door.make_change is not None:
        return door.make_change(target.module, settings.rank, drops, arguments.use_scalar, leaves)
    if form.widths is not None:
        assert isinstance(target.module, nn.Linear) and door.make_split is not None
        delta = door.make_split(target.module, settings.rank, form.widths)
    elif starts_at_weight(arguments) and leaves is not None:
        delta = FromStart(target.module, settings.rank)  # where it started is in the file
    elif arguments.init is not None and leaves is None:
        delta = starting_delta(
            arguments.init, target.module, settings.rank, (settings.alpha or settings.rank) / settings.rank
        )
    elif leaves is not None and door.like is not None:
        delta = door.like(target.module, leaves)
    else:
        make = door.make_core if form.has_core else door.make_delta
        assert make is not None
        delta = make(target.module, settings.rank)
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    join: Join = Add()
    if form.is_decomposed:
        join = Decompose(weight, arguments.dora_constant_norm, form.is_per_output)
    change = ScaledDelta(target.module, delta, join, settings.alpha, drops, arguments.use_scalar)
    if arguments.perturbs:
        change.perturb(arguments.ggpo_sigma or 0.0, arguments.ggpo_beta or 0.0)
    if arguments.tlora and place.text_encoder is None:  # captions are encoded once for all noise levels
        change.tlora_ranks = TLoraRanks(arguments.tlora_min_rank, arguments.tlora_power)
    return change


def starts_at_weight(arguments: NetworkArguments) -> bool:
    """Whether factors start at a part of the base weight, which the file takes back out at twice the rank."""
    return arguments.init not in (None, ORTHOGONAL)


def norm_member(place: Place, target: TargetModule, settings: TargetSettings, multiplier: float) -> Member:
    """One trained normalisation layer, not installed yet."""
    return Member(Adapter(target, norm.fresh_norm(target.module), multiplier), place.text_encoder, settings)
