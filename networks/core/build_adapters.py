"""The adapters of one part of the base model: fresh ones, or those that a file has weights for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from networks.core.adapter import Adapter, Dropout
from networks.core.arguments import NetworkArguments
from networks.core.files.reading_writing import DORA_SCALE, MID, UP, W_NORM, rank_and_alpha
from networks.core.kinds.joins import Add, Decompose
from networks.core.kinds.lora import Delta, Tucker
from networks.core.kinds.norm import NormAdapter
from networks.core.kinds.split import SplitRank, fold
from networks.core.network import AdapterNetwork, Member, StartStep
from networks.core.sites.rules import Allotment, Rules, make_rules
from networks.core.sites.site_selection import all_sites, chosen_sites, extra_classes
from networks.core.sites.targets import AdapterTargets, Filters, Part, Site, find_norms

MakeDelta = Callable[[nn.Module, int], Delta]
"""(the layer, its rank) -> the change of its weight."""

MakeSplit = Callable[[nn.Linear, int, tuple[int, ...]], Delta]
"""(a fused layer, the rank of each projection, the outputs of each) -> the change of its weight."""


@dataclass(frozen=True)
class Kind:
    """What is particular to the adapters of one door."""

    make_delta: MakeDelta
    make_split: MakeSplit = SplitRank  # with split_qkv
    check: Callable[[AdapterNetwork], None] | None = None  # tells what comes of the settings, or raises ValueError
    start_step: StartStep | None = None  # called before each batch of an optimizer step
    refuses: Mapping[str, str] = field(default_factory=dict)  # network argument -> why it cannot meet this kind


@dataclass(frozen=True)
class Form:
    """How the change of one module is stored and joined, beside what its kind says."""

    is_tucker: bool = False
    is_decomposed: bool = False
    widths: tuple[int, ...] | None = None  # outputs of each projection that is adapted apart


@dataclass(frozen=True)
class Place:
    """One part of the base model that adapters search."""

    part: Part
    root: nn.Module
    text_encoder: int | None  # index of the text encoder, None for the denoiser


def fresh_members(
    kind: Kind, targets: AdapterTargets, place: Place, rules: Rules, arguments: NetworkArguments, multiplier: float
) -> Iterator[Member]:
    """The adapters of one part of the base model that the arguments ask for."""
    classes = rules.classes(place.part)
    for site in chosen_sites(place.part, place.root, targets, arguments, classes):
        allotment = rules.allot(site)
        if allotment.rank:
            form = Form(
                is_tucker=arguments.use_tucker and site.kind == "conv",
                is_decomposed=arguments.dora_wd,
                widths=split_widths(targets, place, site, arguments),
            )
            yield make_member(kind, place, site, allotment, arguments, multiplier, form)
    if arguments.train_norm:
        filters = Filters(arguments.exclude_patterns, arguments.include_patterns)
        classes += extra_classes(place.part, arguments)
        for site in find_norms(place.part, place.root, classes, filters):
            if (norm_allotment := rules.allot_norm(site)) is not None:
                yield Member(NormAdapter(site, multiplier), place.text_encoder, norm_allotment)


def members_of_file(
    kind: Kind,
    targets: AdapterTargets,
    place: Place,
    rules: Rules,
    arguments: NetworkArguments,
    multiplier: float,
    groups: Mapping[str, Mapping[str, Tensor]],
    source: str,
) -> Iterator[Member]:
    """The adapters of one part of the base model that a file has weights for."""
    part = place.part
    norms = find_norms(part, place.root, part.blocks + part.conv_blocks, Filters(include=(".*",)))
    for site in (*all_sites(part, place.root, targets), *norms):
        group = groups.get(site.name)
        if group is None or (W_NORM in group) != (site.kind == "norm"):
            continue
        if site.kind == "norm":
            yield Member(NormAdapter(site, multiplier), place.text_encoder, rules.with_rate(site, 0, 0.0))
            continue
        rank, alpha = rank_and_alpha(group)
        widths = split_widths(targets, place, site, arguments)
        if widths is not None:
            if fold(group[UP], widths) is None:
                raise ValueError(
                    f"--network_args split_qkv: {site.name} is one adapter for all projections of its layer in "
                    f"{source}; leave split_qkv out to train it further as it is"
                )
            rank, alpha = rank // len(widths), alpha / len(widths)
        form = Form(MID in group, DORA_SCALE in group or arguments.dora_wd, widths)
        yield make_member(kind, place, site, rules.with_rate(site, rank, alpha), arguments, multiplier, form)


def rates_alone(arguments: NetworkArguments, targets: AdapterTargets, is_denoiser: bool) -> Rules:
    """Rules that give learning rates where a file gives ranks."""
    without = replace(arguments, block_dims=None, block_alphas=None, conv_block_dims=None, conv_block_alphas=None)
    return make_rules(0, 0.0, without, targets, is_denoiser)


def split_widths(
    targets: AdapterTargets, place: Place, site: Site, arguments: NetworkArguments
) -> tuple[int, ...] | None:
    """The outputs of each projection of a layer whose projections are adapted apart."""
    if not arguments.split_qkv or place.text_encoder is not None:
        return None
    return targets.widths_of(site.path, site.module)


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
    if form.widths is not None:
        assert isinstance(site.module, nn.Linear)
        delta = kind.make_split(site.module, allotment.rank, form.widths)
    else:
        delta = (Tucker if form.is_tucker else kind.make_delta)(site.module, allotment.rank)
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    join = Decompose(weight, arguments.dora_constant_norm) if form.is_decomposed else Add()
    adapter = Adapter(site, delta, join, allotment.alpha, dropout, multiplier, arguments.use_scalar)
    return Member(adapter, place.text_encoder, allotment)
