"""Adapters of one part of the base model: new ones, or those for which a file has weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

from torch import nn

from networks.core.arguments.common import RankArguments, StructureArguments, TargetArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.changes import qkv_pieces
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, ModuleTensors
from networks.core.changes.dora import DoraArguments, are_per_output, can_have_magnitudes
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.request import ChangeRequest
from networks.core.changes.tlora import NoiseLevels
from networks.core.kinds import norm
from networks.core.network.network import Member
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.layouts import PIECES, make_change, recognise_layout
from networks.core.targets.rules import Rules, TargetSettings, make_rules
from networks.core.targets.selection import build_filters, extra_classes, list_targets, select_targets
from networks.core.targets.targets import AdapterTargets, Filters, Part, TargetModule, find_norms


@dataclass(frozen=True)
class AdaptedModel:
    """A denoiser or text encoder in which target modules are searched."""

    part: Part
    root: nn.Module
    text_encoder: int | None  # index of the text encoder, None for the denoiser

    @property
    def is_denoiser(self) -> bool:
        return self.text_encoder is None


@dataclass(frozen=True)
class MemberMaker:
    """Factory of the adapters of one network. They are not installed yet."""

    kind: AdapterKind
    targets: AdapterTargets
    arguments: NetworkArguments
    multiplier: float
    noise: NoiseLevels

    def fresh(self, model: AdaptedModel, rules: Rules) -> Iterator[Member]:
        """Yield the new adapters of one part of the base model, as the arguments request."""
        arguments, dora = self.arguments, self.arguments.of(DoraArguments)
        classes = rules.classes(model.part)
        for target in select_targets(model.part, model.root, self.targets, arguments, classes):
            settings = rules.resolve_settings(target)
            if not settings.rank:
                continue
            if arguments.of(RankArguments).rslora:
                # alpha sqrt(rank) / rank = alpha / sqrt(rank): with this alpha the file is a plain LoRA for every
                # program.
                settings = replace(settings, alpha=(settings.alpha or settings.rank) * sqrt(settings.rank))
            request = replace(
                self.request(model, target, settings.rank, settings.alpha),
                has_core=arguments.of(StructureArguments).use_tucker and target.kind == "conv",
                is_decomposed=dora.dora_wd and can_have_magnitudes(target.module),
                is_per_output=dora.wd_on_output,
            )
            yield self.member(model, target, self.change(request), settings)
        if arguments.of(TargetArguments).train_norm:
            classes += extra_classes(model.part, arguments)
            for target in find_norms(model.part, model.root, classes, build_filters(arguments)):
                if (norm_settings := rules.resolve_norm_settings(target)) is not None:
                    yield self.member(model, target, norm.make_fresh_norm(target.module), norm_settings)

    def of_file(
        self, model: AdaptedModel, rules: Rules, groups: Mapping[str, ModuleTensors], source: str, is_merged: bool
    ) -> Iterator[Member]:
        """Yield the adapters of one part of the base model for which a file has weights.

        Modules with a layout that the kind does not train get changes for merging only. With `is_merged` so do layers
        that the file splits into several modules.
        """
        part = model.part
        # The file decides what is adapted, so exclusions do not apply.
        norms = find_norms(part, model.root, part.blocks + part.conv_blocks, Filters(include=(".*",)))
        for target in (*list_targets(part, model.root, self.targets), *norms):
            group = groups.get(target.name)
            if group is None or target.kind not in (layout := recognise_layout(group)).targets:
                continue
            if layout is norm.LAYOUT:
                yield self.member(model, target, norm.make_fresh_norm(target.module), rules.with_rate(target, 0, 0.0))
                continue
            assert layout.rank_of is not None
            settings = rules.with_rate(target, layout.rank_of(group), layout.alpha_of(group))
            if layout is PIECES and not is_merged:
                change = self.change_in_rows(model, target, group, source)
                settings = rules.with_rate(target, 0, 0.0)
            elif layout not in self.kind.layouts:
                change = make_change(group, target.module)
            else:
                change = self.change(self.request_of_file(model, target, group, source))
            yield self.member(model, target, change, settings)

    def change_in_rows(self, model: AdaptedModel, target: TargetModule, tensors: ModuleTensors, source: str) -> Change:
        """Make the change of a layer for which a file has several changes of separate rows."""
        layer, changes = target.module, {}
        assert isinstance(layer, nn.Linear)
        for name, piece in qkv_pieces.group_by_rows(tensors).items():
            part = replace(target, module=qkv_pieces.LinearRows(layer, qkv_pieces.rows_of(name, layer.out_features)))
            request = self.request_of_file(model, part, piece, source)
            # A part of a fused layer is one projection already.
            changes[name] = self.change(replace(request, qkv_widths=None))
        return qkv_pieces.InRows(changes)

    def request(self, model: AdaptedModel, target: TargetModule, rank: int, alpha: float) -> ChangeRequest:
        widths = self.targets.widths_of(target.path, target.module) if model.is_denoiser else None
        return ChangeRequest(target, rank, alpha, self.arguments, self.noise, model.is_denoiser, widths)

    def request_of_file(
        self, model: AdaptedModel, target: TargetModule, tensors: ModuleTensors, source: str
    ) -> ChangeRequest:
        """Return the request for a change in the form of a module in a file. Magnitudes can be new."""
        layout, dora = recognise_layout(tensors), self.arguments.of(DoraArguments)
        assert layout.rank_of is not None
        has_magnitudes = DORA_SCALE in tensors
        return replace(
            self.request(model, target, layout.rank_of(tensors), layout.alpha_of(tensors)),
            tensors=tensors,
            source=source,
            has_core=layout.has_core(tensors),
            is_decomposed=has_magnitudes or (dora.dora_wd and can_have_magnitudes(target.module)),
            is_per_output=are_per_output(tensors[DORA_SCALE].shape) if has_magnitudes else dora.wd_on_output,
        )

    def change(self, request: ChangeRequest) -> Change:
        assert self.kind.make is not None
        return self.kind.make(request)

    def member(self, model: AdaptedModel, target: TargetModule, change: Change, settings: TargetSettings) -> Member:
        return Member(Adapter(target, change, self.multiplier), model.text_encoder, settings)


def rates_alone(arguments: NetworkArguments, targets: AdapterTargets, is_denoiser: bool) -> Rules:
    """Make rules for learning rates only, because the file sets the ranks."""
    without_ranks = arguments.replace(
        RankArguments, block_dims=None, block_alphas=None, conv_block_dims=None, conv_block_alphas=None
    )
    return make_rules(0, 0.0, without_ranks, targets, is_denoiser)
