"""The network: all adapters of one run."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError, error_in
from networks.core.arguments.common import LR_LISTS, RateArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Change, FollowsGradients, change_norms, get_weight
from networks.core.changes.dora import DoraArguments, add_magnitudes, are_per_output, can_have_magnitudes
from networks.core.changes.dropout import Dropout
from networks.core.changes.ggpo import GgpoArguments
from networks.core.changes.low_rank import LowRank
from networks.core.changes.parameter_keys import DORA_SCALE
from networks.core.changes.qkv_pieces import InRows, changes_in
from networks.core.changes.tlora import NoiseLevels
from networks.core.files.adapter_file import open_adapter, save_network, sort_tensors
from networks.core.files.file_spelling import FileSpelling
from networks.core.files.foreign_names import to_own_names
from networks.core.files.reading_writing import collect_saved_tensors, load_into, network_tensors
from networks.core.network.shared_inputs import list_shared
from networks.core.network.summary import describe_part, describe_rates
from networks.core.protocol import Merging
from networks.core.registry.adapter_kind import StartStep
from networks.core.targets.rules import TargetSettings
from networks.core.targets.targets import AdapterTargets, TargetModule

logger = logging.getLogger(__name__)

# The names under which sd-scripts logs learning rates.
DENOISER_LR_NAME = "unet"
TEXT_ENCODER_LR_NAME = "textencoder"
ROUNDING = 1e-6  # keeps norms that were scaled to the limit from being scaled again


@dataclass(frozen=True)
class Member:
    """One adapter with its settings and its part of the base model."""

    adapter: Adapter
    text_encoder: int | None  # index of the text encoder, None for the denoiser
    settings: TargetSettings


class AdapterNetwork(nn.Module):
    """The adapters of one base model by their names in files, as returned by `create_network`.

    It implements the network protocol (networks/core/protocol.py).
    """

    def __init__(
        self,
        members: Sequence[Member],
        targets: AdapterTargets,
        arguments: NetworkArguments,
        noise: NoiseLevels,
        file: str = "",
        spelling: FileSpelling | None = None,
    ) -> None:
        """`file` is the source of the network, for messages; `spelling` has its module names if they are not kohya's.

        Raises UserError if two modules have the same name.
        """
        super().__init__()
        self.spelling = spelling
        self.file = file
        self.members = list(members)
        self.targets = targets
        self.arguments = arguments
        self.noise = noise
        self.start_step: StartStep | None = None
        self._untrained: list[nn.Parameter] = []  # of groups without a learning rate
        for member in self.members:
            name = member.adapter.target.name
            if name in self._modules:
                raise UserError(f"two modules of the base model have the name {name} in files")
            self.add_module(name, as_module(member.adapter))

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, text encoders first."""
        return {member.adapter.target.name: member.adapter for member in self.members}

    def changes(self) -> Iterator[Change]:
        """Yield the changes of all layers, and each of them for a layer with changes of separate rows."""
        return (change for member in self.members for change in changes_in(member.adapter.change))

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, train_text_encoder: bool = True, train_unet: bool = True
    ) -> None:
        """Install the adapters of the denoiser, the text encoders or both. The others are removed and not saved.

        Raises UserError if no adapter is left.
        """
        kept = [m for m in self.members if (train_unet if m.text_encoder is None else train_text_encoder)]
        if not kept:
            raise error_in("--network_train_unet_only", cause="does not fit")(
                "the adapter has no module left to train: --network_train_unet_only and "
                "--network_train_text_encoder_only leave out every side that has some"
            )
        for member in self.members:
            if member not in kept:
                del self._modules[member.adapter.target.name]
        self.members = kept
        for member in kept:
            member.adapter.install()
        for line in describe(kept, self.targets):
            logger.info(line)

    def remove(self) -> None:
        """Restore the forward of every layer."""
        for member in reversed(self.members):
            member.adapter.remove()

    def merge_to(
        self,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Merge the changes in `weights_sd` into the base weights, computed in float32 and stored in `dtype`.

        The products are computed on `device`. The network itself is not installed.
        """
        for part in self.merging(weights_sd, device):
            weight = getattr(part.layer, part.parameter)
            assert isinstance(weight, nn.Parameter)
            with torch.no_grad():
                merged = part.merged(weight).to(weight.device, dtype or weight.dtype)
                if merged.dtype == weight.dtype:
                    weight.copy_(merged)  # in place, to keep the memory format and the order of sums
                else:
                    weight.data = merged

    def merging(self, weights_sd: Mapping[str, Tensor], device: torch.device | str | None = None) -> Iterator[Merging]:
        """Yield the merges of `merge_to` one parameter at a time, for callers that stream the base weights.

        The layers of this network may be on the meta device.
        """
        for member in self.members:
            make_room(as_module(member.adapter))
        file = sort_tensors(weights_sd, {}, f"--base_weights {self.file}".rstrip())
        for line in load_into(self.adapters, file).warnings():
            logger.warning(line)
        for member in self.members:
            if device is not None:
                as_module(member.adapter).to(device)
            for name in member.adapter.change.changed_parameters:
                merged = partial(member.adapter.merged_into, name=name)
                yield Merging(member.adapter.target.module, name, merged)

    def load_weights(self, file: str) -> str:
        """Load a file and return a sentence about it. Modules that it lacks keep their initial values.

        Raises UserError if nothing in the file matches or a rank differs.
        """
        has_pieces = any(isinstance(member.adapter.change, InRows) for member in self.members)
        adapter_file = to_own_names(open_adapter(file), self.targets.names, has_pieces)
        shapes = {f"{n}.{key}": t.shape for n, m in adapter_file.modules.items() for key, t in m.tensors.items()}
        self.prepare_for(shapes, file)
        report = load_into(self.adapters, adapter_file)
        for line in report.warnings():
            logger.warning(line)
        return report.summary()

    def prepare_for(self, shapes: Mapping[str, Sequence[int]], source: str) -> None:
        """Take the form of weights with these shapes, which are loaded later; call it before the optimizer is built.

        In files and states of earlier versions, layers with one output have magnitudes.
        """
        dora = self.arguments.of(DoraArguments)
        for name, adapter in self.adapters.items():
            shape, change = shapes.get(f"{name}.{DORA_SCALE}"), adapter.change
            if shape is None or not dora.dora_wd or can_have_magnitudes(adapter.target.module):
                continue
            if isinstance(change, ScaledDelta) and not change.size.magnitudes:
                adapter.change = add_magnitudes(change, dora.dora_constant_norm, are_per_output(shape))
                self.add_module(name, as_module(adapter))
                logger.warning(
                    "%s keeps the magnitudes (DoRA) that it has in %s; ComfyUI, Forge and A1111-style loaders read "
                    "them differently, because the layer has one output", name, source,
                )  # fmt: skip

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the adapters atomically: .safetensors with metadata and hashes, otherwise a pickled state dict."""
        if self.spelling is None:
            tensors = collect_saved_tensors(self.adapters, dtype, self.targets.names)
        else:
            tensors = self.spelling.restore(network_tensors(self.adapters, dtype))
        save_network(file, tensors, metadata)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the changes; 0 disables them."""
        for member in self.members:
            member.adapter.multiplier = multiplier

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: adapters keep only R channels and their layer's input, which is kept anyway."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names in logs. Parameters without a learning rate are frozen."""
        self._warn_of_idle_rates()
        rates = self._rates(text_encoder_lr, unet_lr, default_lr)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        trained: set[nn.Parameter] = set()
        for member in self.members:
            settings = member.settings
            rate = (rates(member) if settings.lr is None else settings.lr) * settings.lr_factor
            block = "" if settings.block is None else f"_block{settings.block}"
            block += "" if settings.expression is None else f" reg_lr_{settings.expression}"
            ratio = self._loraplus_ratio(member)
            for name, parameter in as_module(member.adapter).named_parameters():
                is_plus = ratio is not None and name in member.adapter.change.fast_keys
                lr = rate * ratio if is_plus and ratio is not None else rate
                if lr == 0:
                    continue
                key = (f"{_lr_name(member)}{block}{' plus' if is_plus else ''}", lr)
                groups.setdefault(key, []).append(parameter)
                trained.add(parameter)
        self._untrained = [p for p in self.parameters() if p not in trained]
        self._freeze_untrained()
        optimizer_groups = [{"params": params, "lr": lr} for (_, lr), params in groups.items()]
        names = _distinct([name for name, _ in groups])
        if optimizer_groups:
            logger.info(describe_rates(optimizer_groups, names))
        return optimizer_groups, names

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the parameter groups, with one learning rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """Enable gradients for all parameters with a learning rate."""
        self.requires_grad_(True)
        self._freeze_untrained()

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Set training mode, which enables dropout. Previews and validation disable it with eval()."""
        self.train()

    def on_optimizer_step_start(self, seed: int, step: int) -> None:
        """Prepare optimizer step `step` (from 0) of the run with this seed. It is called before each of its batches."""
        if self.start_step is not None:
            self.start_step([member.adapter for member in self.members], seed, step)

    def on_noise_levels(self, levels_B: Tensor | None) -> None:
        """Set the noise level, 0 to 1, of each sample of the next denoiser call; None for previews.

        With T-LoRA it determines which ranks act; with None all of them do.
        """
        self.noise.levels_B = levels_B

    def looks_at_gradients(self) -> bool:
        return any(isinstance(change, FollowsGradients) for change in self.changes())

    def draws_numbers(self) -> bool:
        return Dropout.of(self.arguments).is_on or self.arguments.of(GgpoArguments).is_on

    def on_gradients(self) -> None:
        """Pass the complete gradients of an optimizer step, before clipping, to the changes that use them."""
        for change in self.changes():
            if isinstance(change, FollowsGradients):
                change.note_gradients()

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates and whose gradient norm is clipped."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def apply_max_norm_regularization(self, limit: float, device: torch.device | str) -> tuple[int, float, float]:
        """Limit norms and return the three numbers of `limit_norms` on the host."""
        count, mean, maximum = self.limit_norms(limit).tolist()
        return int(count), mean, maximum

    @torch.no_grad()
    def limit_norms(self, limit: float) -> Tensor:
        """Scale changes with a Frobenius norm above `limit` down to it (`scale_weight_norms`).

        Return (number scaled, mean norm, maximum norm), with the norms after scaling. Norms are at multiplier 1 and
        before DoRA's magnitudes. Trained normalisation layers are not included.
        """
        changes = [m.adapter.change for m in self.members if m.adapter.target.kind != "norm"]
        if not changes:
            return torch.zeros(3)
        # Everything stays on the device, so that the host does not wait for the norms in each step.
        norms = torch.stack([change.norm() for change in changes])
        ratios = torch.where(norms > limit * (1 + ROUNDING), limit / norms, 1.0)
        for change, ratio in zip(changes, ratios, strict=True):
            change.scale_(ratio)
        scaled_norms = norms * ratios
        return torch.stack([(ratios < 1).sum().to(scaled_norms.dtype), scaled_norms.mean(), scaled_norms.max()])

    def change_norms(self) -> Iterator[tuple[float, float]]:
        """Yield the norms (of the change, of the base model's weight) of each adapted layer."""
        for member in self.members:
            change, module = member.adapter.change, as_module(member.adapter)
            if "weight" in change.changed_parameters:
                device = next(chain(module.parameters(), module.buffers())).device
                yield change_norms(change, get_weight(member.adapter.target.module).to(device))

    def cast_factors(self) -> Iterator[tuple[nn.Module, Sequence[nn.Module]]]:
        """Yield the layers with a plain LoRA, and the modules of its factors; other kinds compute with the factors."""
        for target, _, delta in self._plain_loras():
            yield target.module, delta.modules_of_factors()

    def joined_downs(self) -> Iterator[Sequence[nn.Module]]:
        """Yield the down factors of plain LoRAs without dropout whose layers may get one input."""
        loras = self._plain_loras()
        downs = {target.path: delta.modules_of_factors()[0] for target, drops, delta in loras if not drops.is_on}
        return list_shared({path: down for path, down in downs.items() if isinstance(down, nn.Linear)})

    def _plain_loras(self) -> Iterator[tuple[TargetModule, Dropout, LowRank]]:
        for member in self.members:
            change = member.adapter.change
            if type(change) is ScaledDelta and type(change.delta) is LowRank:
                yield member.adapter.target, change.drops, change.delta

    def _warn_of_idle_rates(self) -> None:
        """Warn about rates in the network arguments for a side of the base model that has no adapter."""
        given = self.arguments.given
        has_denoiser = any(member.text_encoder is None for member in self.members)
        has_encoder = any(member.text_encoder is not None for member in self.members)
        for side, names, has_adapter in (
            ("the denoiser", ("loraplus_unet_lr_ratio", *LR_LISTS), has_denoiser),
            ("a text encoder", ("loraplus_text_encoder_lr_ratio",), has_encoder),
        ):
            idle = [name for name in names if name in given]
            if idle and not has_adapter:
                logger.warning("--network_args %s has no effect: no layer of %s is adapted", ", ".join(idle), side)

    def _freeze_untrained(self) -> None:
        for parameter in self._untrained:
            parameter.requires_grad_(False)

    def _rates(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> Callable[[Member], float]:
        """Return a function from members to learning rates. The last value also applies to further text encoders."""
        encoder_rates = [text_encoder_lr] if isinstance(text_encoder_lr, (int, float)) else list(text_encoder_lr or [])
        num_encoders = len(self.targets.text_encoders)
        unused = encoder_rates[num_encoders:]
        if set(unused) - set(encoder_rates[:num_encoders][-1:]):  # front ends write one value twice for all base models
            logger.warning(
                "--text_encoder_lr has %d values, but the base model has %d text encoder(s); %s has no effect",
                len(encoder_rates), num_encoders, unused,
            )  # fmt: skip

        def rate(member: Member) -> float:
            if member.text_encoder is None:
                return float(default_lr or 0 if unet_lr is None else unet_lr)
            if not encoder_rates:
                return float(default_lr or 0)
            return float(encoder_rates[min(member.text_encoder, len(encoder_rates) - 1)])

        return rate

    def _loraplus_ratio(self, member: Member) -> float | None:
        """Return the LoRA+ ratio of a member, or None. A part's own ratio of 0 or None means the general one."""
        rates = self.arguments.of(RateArguments)
        part_ratio = rates.loraplus_unet_lr_ratio
        if member.text_encoder is not None:
            part_ratio = rates.loraplus_text_encoder_lr_ratio
        # sd-scripts takes a ratio of 0 for one that is not given.
        return part_ratio or rates.loraplus_lr_ratio or None


def as_module(adapter: Adapter) -> nn.Module:
    """Return the change of an adapter as an `nn.Module`."""
    assert isinstance(adapter.change, nn.Module)
    return adapter.change


def make_room(change: nn.Module) -> None:
    """Replace parameters on the meta device, such as magnitudes of a meta layer, by zeros on the CPU, for loading."""
    for name, parameter in change.named_parameters(recurse=False):
        if parameter.is_meta:
            setattr(change, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def describe(members: Sequence[Member], targets: AdapterTargets) -> Iterator[str]:
    """Yield log lines for each part of the base model: modules, ranks, alphas and number of parameters."""
    for index in dict.fromkeys(member.text_encoder for member in members):
        adapters = [member.adapter for member in members if member.text_encoder == index]
        part = "denoiser" if index is None else f"text encoder {index + 1}"
        yield from describe_part(part, adapters, targets.block_list if index is None else None)


def _lr_name(member: Member) -> str:
    return DENOISER_LR_NAME if member.text_encoder is None else TEXT_ENCODER_LR_NAME


def _distinct(names: list[str]) -> list[str]:
    """Make names unique by numbering repeats."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return distinct
