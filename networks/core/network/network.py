"""All adapters of one run."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.core.arguments.common import RateArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, FollowsGradients
from networks.core.changes.dropout import Dropout
from networks.core.changes.ggpo import GgpoArguments
from networks.core.changes.qkv_pieces import InRows, changes_in
from networks.core.changes.tlora import NoiseLevels
from networks.core.files.adapter_file import open_adapter, save_network, sort_tensors
from networks.core.files.file_spelling import FileSpelling
from networks.core.files.foreign_names import in_own_names
from networks.core.files.reading_writing import load_into, network_tensors, saved_tensors
from networks.core.network.multiplexer import AdapterMultiplexer
from networks.core.network.summary import describe_part, describe_rates
from networks.core.protocol import Merging
from networks.core.registry.adapter_kind import StartStep
from networks.core.targets.rules import TargetSettings
from networks.core.targets.targets import AdapterTargets

logger = logging.getLogger(__name__)

DENOISER_LR_NAME = "unet"
TEXT_ENCODER_LR_NAME = "textencoder"
ROUNDING = 1e-6  # a norm that was scaled to the limit is not above it


@dataclass(frozen=True)
class Member:
    """One adapter and where it belongs."""

    adapter: Adapter
    text_encoder: int | None  # index of the text encoder, None for the denoiser
    settings: TargetSettings


class AdapterNetwork(nn.Module):
    """The adapters of one base model, by the names they have in files: what `create_network` gives.

    Every method is part of the network protocol (networks/core/protocol.py).
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
        """`file` is the one that it was made of, for messages; `spelling` what its modules are called in files, where
        these are other names than kohya's."""
        super().__init__()
        self.spelling = spelling
        self.file = file
        self.members = list(members)
        self.targets = targets
        self.arguments = arguments
        self.noise = noise
        self.start_step: StartStep | None = None
        self._untrained: list[nn.Parameter] = []  # those of groups without a learning rate
        for member in self.members:
            name = member.adapter.target.name
            if name in self._modules:
                raise UserError(f"two modules of the base model have the name {name} in files")
            self.add_module(name, as_module(member.adapter))

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, text encoders first."""
        return {member.adapter.target.name: member.adapter for member in self.members}

    @property
    def draws(self) -> bool:
        """True if adapters leave something out at random, or add noise, while they train."""
        return Dropout.of(self.arguments).is_on or self.arguments.of(GgpoArguments).is_on

    def changes(self) -> Iterator[Change]:
        """Yield the changes of all layers; of a layer whose rows are changed apart, each."""
        return (change for member in self.members for change in changes_in(member.adapter.change))

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, train_text_encoder: bool = True, train_unet: bool = True
    ) -> None:
        """Install the adapters of the sides that are trained; the other side is dropped and will not be saved."""
        kept = [m for m in self.members if (train_unet if m.text_encoder is None else train_text_encoder)]
        if not kept:
            raise UserError(
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
        """Give every layer its own forward back."""
        for member in reversed(self.members):
            member.adapter.remove()

    def stack_with(self, others: Sequence["AdapterNetwork"]) -> AdapterMultiplexer:
        """Put this network and others, all of them installed, on the layers of one model: each acts on its own rows."""
        networks = [self, *others]
        for network in reversed(networks):
            network.remove()
        return AdapterMultiplexer([[m.adapter for m in n.members] for n in networks], [n.draws for n in networks])

    def merge_to(
        self,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the changes in `weights_sd` to the base weights, in float32, and keep those in `dtype`.

        The products are computed on `device`. The network itself is not installed.
        """
        for part in self.merging(weights_sd, device):
            weight = getattr(part.layer, part.parameter)
            assert isinstance(weight, nn.Parameter)
            with torch.no_grad():
                merged = part.merged(weight).to(weight.device, dtype or weight.dtype)
                if merged.dtype == weight.dtype:
                    weight.copy_(merged)  # in place: the memory format stays, and with it the order of the sums
                else:
                    weight.data = merged

    def merging(self, weights_sd: Mapping[str, Tensor], device: torch.device | str | None = None) -> Iterator[Merging]:
        """Yield what `merge_to` computes parameter by parameter, for who has the base model's values one at a time.

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
        """Load a file; modules it lacks keep their start. Return a sentence on what was loaded.

        Raises UserError when nothing in the file fits, or when a rank differs.
        """
        has_pieces = any(isinstance(member.adapter.change, InRows) for member in self.members)
        report = load_into(self.adapters, in_own_names(open_adapter(file), self.targets.names, has_pieces))
        for line in report.warnings():
            logger.warning(line)
        return report.summary()

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the adapters whole or not at all: .safetensors with metadata and hashes, else a pickled table."""
        if self.spelling is None:
            tensors = saved_tensors(self.adapters, dtype, self.targets.names, self.targets.saved_naming)
        else:
            tensors = self.spelling.restore(network_tensors(self.adapters, dtype))
        save_network(file, tensors, metadata)

    def set_multiplier(self, multiplier: float) -> None:
        """Set how strongly the changes act: 0 is the base model."""
        for member in self.members:
            member.adapter.multiplier = multiplier

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: adapters keep only what their layer's input already is, and R channels."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names for the charts; those without a learning rate are frozen."""
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
        made = [{"params": params, "lr": lr} for (_, lr), params in groups.items()]
        names = _distinct([name for name, _ in groups])
        if made:
            logger.info(describe_rates(made, names))
        return made, names

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the groups with one learning rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoder: Any, unet: nn.Module) -> None:
        """Switch gradients on for everything that has a learning rate."""
        self.requires_grad_(True)
        self._freeze_untrained()

    def on_epoch_start(self, text_encoder: Any, unet: nn.Module) -> None:
        """Switch dropout on; previews and validation switch it off with eval()."""
        self.train()

    def on_optimizer_step_start(self, seed: int, step: int) -> None:
        """Take up optimizer step `step` (from 0) of the run with this seed; called before each of its batches."""
        if self.start_step is not None:
            self.start_step([member.adapter for member in self.members], seed, step)

    def on_noise_levels(self, levels_B: Tensor | None) -> None:
        """Take the share of noise in each sample, 0 to 1, that the denoiser runs next; None for images.

        With T-LoRA it decides which ranks act; without a level all of them do.
        """
        self.noise.levels_B = levels_B

    def looks_at_gradients(self) -> bool:
        """Return True if a change does something in `on_gradients`."""
        return any(isinstance(change, FollowsGradients) for change in self.changes())

    def on_gradients(self) -> None:
        """Look at the gradients of an optimizer step, all batches and processes together, before they are clipped."""
        for change in self.changes():
            if isinstance(change, FollowsGradients):
                change.note_gradients()

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return what the optimizer changes: the set whose gradient norm is limited."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def apply_max_norm_regularization(self, limit: float, device: torch.device | str) -> tuple[int, float, float]:
        """Limit norms and return the numbers of `limit_norms` on the host."""
        count, mean, maximum = self.limit_norms(limit).tolist()
        return int(count), mean, maximum

    @torch.no_grad()
    def limit_norms(self, limit: float) -> Tensor:
        """Scale changes whose Frobenius norm is above `limit` down to it (`scale_weight_norms`).

        Return how many were scaled, and mean and maximum of the norms that all have afterwards. Norms of changes are at
        multiplier 1, before DoRA's magnitudes; trained normalisation layers have none.
        """
        changes = [m.adapter.change for m in self.members if m.adapter.target.kind != "norm"]
        if not changes:
            return torch.zeros(3)
        norms = torch.stack([change.norm() for change in changes])
        ratios = torch.where(norms > limit * (1 + ROUNDING), limit / norms, 1.0)
        for change, ratio in zip(changes, ratios, strict=True):
            change.scale_(ratio)
        after = norms * ratios
        return torch.stack([(ratios < 1).sum().to(after.dtype), after.mean(), after.max()])

    def _freeze_untrained(self) -> None:
        for parameter in self._untrained:
            parameter.requires_grad_(False)

    def _rates(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> Callable[[Member], float]:
        """Return the learning rate of a member; a list that is too short is continued with its last value."""
        listed = [text_encoder_lr] if isinstance(text_encoder_lr, (int, float)) else list(text_encoder_lr or [])
        num_encoders = len(self.targets.text_encoders)
        lost = listed[num_encoders:]
        if set(lost) - set(listed[:num_encoders][-1:]):  # front ends write one value twice for all base models
            logger.warning(
                "--text_encoder_lr has %d values, but the base model has %d text encoder(s); %s has no effect",
                len(listed), num_encoders, lost,
            )  # fmt: skip

        def rate(member: Member) -> float:
            if member.text_encoder is None:
                return float(default_lr or 0 if unet_lr is None else unet_lr)
            if not listed:
                return float(default_lr or 0)
            return float(listed[min(member.text_encoder, len(listed) - 1)])

        return rate

    def _loraplus_ratio(self, member: Member) -> float | None:
        """Return how much faster up factors are trained; 0 and nothing both leave it to the general ratio."""
        rates = self.arguments.of(RateArguments)
        own = rates.loraplus_unet_lr_ratio
        if member.text_encoder is not None:
            own = rates.loraplus_text_encoder_lr_ratio
        return own or rates.loraplus_lr_ratio or None


def as_module(adapter: Adapter) -> nn.Module:
    """Return the change as the module that it is."""
    assert isinstance(adapter.change, nn.Module)
    return adapter.change


def make_room(change: nn.Module) -> None:
    """Give parameters that came without values memory for those of a file: magnitudes of a layer that has none."""
    for name, parameter in change.named_parameters(recurse=False):
        if parameter.is_meta:
            setattr(change, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def describe(members: Sequence[Member], targets: AdapterTargets) -> Iterator[str]:
    """Yield lines for each part of the base model: modules, ranks, alphas and how many numbers are trained."""
    for index in dict.fromkeys(member.text_encoder for member in members):
        adapters = [member.adapter for member in members if member.text_encoder == index]
        part = "denoiser" if index is None else f"text encoder {index + 1}"
        yield from describe_part(part, adapters, targets.block_list if index is None else None)


def _lr_name(member: Member) -> str:
    return DENOISER_LR_NAME if member.text_encoder is None else TEXT_ENCODER_LR_NAME


def _distinct(names: list[str]) -> list[str]:
    """Make names of which none stands twice: the second of two equal ones gets a number."""
    seen: dict[str, int] = {}
    distinct = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        distinct.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return distinct
