"""Weights of one module in an adapter file of any trainer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from library.base.errors import UserError
from networks.core.changes import qkv_rows
from networks.core.changes.change import Change, Misfit, change_norms
from networks.core.changes.dora import are_per_output
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE
from networks.core.kinds import lora
from networks.core.registry.key_layout import KeyLayout
from networks.core.registry.layouts import PIECES, make_change, recognise_layout


@dataclass(frozen=True)
class ModuleWeights:
    """One module of an adapter file.

    `tensors` are the file's tensors by our parameter keys, which are `needs`, `core` and `may_have` of each layout.
    Tensors of unknown layouts keep their names. `keys` holds the full key in the file for each of them.
    """

    name: str  # as in the file, without the parameter key: "lora_unet_mid_block_..." or "unet.mid_block...."
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    alpha_elsewhere: float | None = None  # recorded outside the tensors: in the metadata or in adapter_config.json
    origin: str = ""  # the file, for messages

    @classmethod
    def with_kohyas_keys(cls, name: str, tensors: Mapping[str, Tensor]) -> "ModuleWeights":
        """Return a new module whose keys in the file are `<name>.<parameter key>`."""
        return cls(name, tensors, {key: f"{name}.{key}" for key in tensors})

    @property
    def layout(self) -> KeyLayout:
        """The layout in which the change is stored."""
        return recognise_layout(self.tensors)

    @property
    def form(self) -> str:
        """The kind's name in reports; LoRA of kernels larger than 1x1 is called conv."""
        layout = self.layout
        return "conv" if layout is lora.LAYOUT and prod(self.shape[2:]) > 1 else layout.name

    @property
    def unexpected_key(self) -> str | None:
        """A parameter key that the layout does not know, such as a bias change in a LoRA, or None."""
        if self.layout is PIECES:  # each was checked before it became a part of the layer
            return None
        return next((key for key in self.tensors if key not in self.layout.keys and key != ALPHA), None)

    @property
    def is_low_rank(self) -> bool:
        """True if the change is scale * up @ down."""
        return self.layout.is_low_rank

    @property
    def is_dora(self) -> bool:
        return DORA_SCALE in self.tensors

    @property
    def is_dora_per_output(self) -> bool:
        """True if magnitudes are per output, as in PEFT."""
        return self.is_dora and self.layout.shape_of is not None and are_per_output(self.magnitudes.shape)

    @property
    def is_larger_kernel(self) -> bool:
        """True if it changes a convolution with a kernel larger than 1x1."""
        return prod(self.shape[2:]) > 1

    @property
    def rank(self) -> int:
        rank_of = self.layout.rank_of
        assert rank_of is not None
        return rank_of(self.tensors)

    @property
    def alpha(self) -> float:
        """The recorded alpha; the rank if none is recorded or no factor has a rank."""
        if ALPHA in self.tensors and not self.layout.is_whole:
            return float(self.tensors[ALPHA])
        return float(self.rank) if self.alpha_elsewhere is None or self.layout.is_whole else self.alpha_elsewhere

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight: (O, I), or (O, I, h, w) for a convolution."""
        shape_of = self.layout.shape_of
        assert shape_of is not None
        return shape_of(self.name, self.tensors)

    @property
    def magnitudes(self) -> Tensor:
        """The magnitudes of DoRA: (O, 1), (1, I), (O, 1, 1, 1) or (1, I, 1, 1)."""
        stored = self.tensors[DORA_SCALE]
        if f".{qkv_rows.PEFT_MAGNITUDES}" in self.keys.get(DORA_SCALE, "") or stored.dim() == 1:
            return qkv_rows.peft_magnitudes(stored, len(self.shape))
        return stored

    def change(self, dtype: torch.dtype | None = torch.float32) -> Change:
        """Make the change of the module's layer, in `dtype` or with None in the dtypes of the file.

        Raises UserError for kinds that are only recognised.
        """
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in self.tensors.items()}
        if self.layout.has_alpha:
            # Python's float is float64: alpha keeps all digits, whatever dtype the change is computed in.
            tensors[ALPHA] = torch.tensor(self.alpha, dtype=torch.float64)
        if self.is_dora and self.layout.shape_of is not None:
            tensors[DORA_SCALE] = self.magnitudes.to(dtype or self.magnitudes.dtype)
        try:
            return make_change(tensors)
        except ValueError as error:
            raise UserError(f"{self._place}: {error}") from None

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the tensor that is added to the layer's weight, in its shape; for DoRA before magnitudes."""
        change: Any = self.change(dtype)
        weight: Tensor = change.weight()
        return weight

    def factors(self, dtype: torch.dtype | None = torch.float32) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN); the change is scale * up @ down. For low-rank kinds only."""
        change: Any = self.change(dtype)
        factors: tuple[Tensor, Tensor] = change.factors()
        return factors

    def changes(self, parameter: str) -> bool:
        """Return True if the module changes a parameter of the layer, "weight" or "bias"."""
        return parameter in self.change().changed_parameters

    def merged(
        self, base: Tensor, strength: float, dtype: torch.dtype = torch.float32, parameter: str = "weight"
    ) -> Tensor:
        """Return `base`, a parameter of the layer, with the adapter merged in, in `dtype`.

        Raises UserError if the change has another size than `base`.
        """
        try:
            return self.change(dtype).merged(base.to(dtype), strength, parameter)
        except Misfit as misfit:
            raise UserError(self._describe(misfit)) from None

    def change_norms(self, base: Tensor) -> tuple[float, float]:
        """Return the Frobenius norms (of what it adds to `base`, of `base`). Raises UserError for another size."""
        try:
            return change_norms(self.change(), base)
        except Misfit as misfit:
            raise UserError(self._describe(misfit)) from None

    def with_factors(self, up_OR: Tensor, down_RN: Tensor, scale: float) -> "ModuleWeights":
        """Return the module as a plain LoRA with these factors; its change is scale * up @ down.

        If the module has no alpha tensor, the scale is multiplied into the up factor. Both factors are stored in the
        dtype of the old tensors. Magnitudes are kept.
        """
        layout, dtype = self.layout, self.tensors[self.layout.needs[0]].dtype
        if ALPHA not in self.tensors:
            up_OR = up_OR * scale
        replaced = {*layout.needs, *layout.core}
        kept = {
            parameter_key: tensor for parameter_key, tensor in self.tensors.items() if parameter_key not in replaced
        }
        new = {parameter_key: t.to(dtype) for parameter_key, t in lora.make_tensors(up_OR, down_RN, self.shape).items()}
        # New factors keep the positions of the old ones, so that the order of keys does not change.
        order = [parameter_key for parameter_key in self.tensors if parameter_key in kept or parameter_key in new]
        tensors = {parameter_key: {**kept, **new}[parameter_key] for parameter_key in dict.fromkeys((*order, *new))}
        if ALPHA in tensors:
            tensors[ALPHA] = alpha_tensor(scale * down_RN.shape[0], like=tensors[ALPHA])
        keys = {parameter_key: key for parameter_key, key in self.keys.items() if parameter_key in tensors}
        return replace(self, tensors=tensors, keys=keys, alpha_elsewhere=None)

    def check(self, origin: str) -> None:
        """Raise UserError if tensors are missing, do not fit together, or cannot be computed with."""
        layout = self.layout
        if (unusable := next(self._unusable(), None)) is not None:
            raise UserError(f"{origin} has {unusable}")
        fault = layout.fault(self.name, self.tensors, self.keys) if layout.fault is not None else None
        if fault is not None:
            raise UserError(f"{origin}{'' if fault.startswith(':') else ' '}{fault}")
        missing = [key for key in layout.needs if key not in self.tensors] if layout.rank_of is not None else []
        if missing:
            present_key = next(self.keys[key] for key in self.tensors if key != ALPHA)
            raise UserError(f"{origin} has {present_key} without its {missing[0]}; the file is incomplete")

    def check_values(self, origin: str) -> None:
        """Raise UserError if values are not finite."""
        if (problem := next(value_problems(self), None)) is not None:
            raise UserError(f"{origin}: {problem}; the file is damaged, take another one or one of an earlier step")

    def _unusable(self) -> Iterator[str]:
        """Yield a phrase for each tensor that no kind of adapter can use."""
        floating = self.layout.keys - {ALPHA, *self.layout.switches}
        for parameter_key, tensor in self.tensors.items():
            key, shape = self.keys.get(parameter_key, f"{self.name}.{parameter_key}"), list(tensor.shape)
            if tensor.numel() == 0:
                yield f"{key} of the shape {shape}, which is empty; the file is incomplete"
            elif parameter_key == ALPHA and tensor.numel() != 1:
                yield f"{key} of the shape {shape}; it needs one number"
            elif parameter_key in floating and not tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield f"{key} as {dtype}, whole numbers whose scale it does not say; use a file in fp32, bf16 or fp16"

    @property
    def _place(self) -> str:
        """The file, if known, and the module, for messages."""
        return f"{self.origin}: {self.name}" if self.origin else self.name

    def _describe(self, misfit: Misfit) -> str:
        if misfit.key:
            sizes = prod(misfit.change), prod(misfit.base)
            return f"{self._place}.{misfit.key} has {sizes[0]} values, the base model's layer {sizes[1]}"
        return (
            f"{self._place} changes a weight of the shape {list(misfit.change)}, but the base model's is "
            f"{list(misfit.base)}; the adapter was made for another base model"
        )


def alpha_tensor(alpha: float, like: Tensor) -> Tensor:
    """Return alpha in the dtype of `like` if that holds it exactly, else in float32."""
    exact = torch.tensor(alpha, dtype=torch.float32)
    rounded = exact.to(like.dtype)
    return rounded if like.is_floating_point() and float(rounded) == float(exact) else exact


def make_name_error(origin: str, name: str) -> UserError:
    """Return the error for a file that contains a module under two names."""
    return UserError(f"{origin} has the module {name} twice, under different names", "remove one of them")


def value_problems(module: ModuleWeights) -> Iterator[str]:
    """Yield a sentence for each tensor of a module with infinite or NaN values."""
    for key, tensor in module.tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:  # meta tensors have no values
            continue
        num_bad = int((~torch.isfinite(tensor.float())).sum())
        if num_bad:
            yield f"{module.keys[key]} has {num_bad} of {tensor.numel()} values that are not finite"
