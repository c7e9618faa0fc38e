"""Comparison of a denoiser with another library's class: code that the base models' `reference.py` share.

Each of these modules defines `outputs(denoiser, generator)`, which returns the outputs of both for the same random
inputs, in float32. Only the first and the last block of each stack are kept, so that models of any size fit in main
memory. `diffusers_config` returns the arguments of diffusers' class, `diffusers_state` our weights under its names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from library.checkpoints.fused_tensors import swap_halves
from library.models.double_stream import StreamConfig
from library.models.layer_keys import LayerKeys

SIDE, LENGTHS = 16, (40, 24)  # side of the latent; tokens of the two captions
ModelT = TypeVar("ModelT", bound=nn.Module)


class MissingClass(Exception):
    """The installed version of diffusers lacks a class; the message is its name."""


class Inputs(NamedTuple):
    """Random latents, noise levels, text features and the mask of captions of two lengths."""

    latents_BCHW: Tensor
    sigmas_B: Tensor
    text_BLE: Tensor
    mask_BL: Tensor


def random_inputs(generator: torch.Generator, channels: int, text_width: int) -> Inputs:
    latents_BCHW = torch.randn(2, channels, SIDE, SIDE, generator=generator)
    text_BLE = torch.randn(2, max(LENGTHS), text_width, generator=generator)
    mask_BL = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return Inputs(latents_BCHW, torch.tensor([0.125, 0.875]), text_BLE * mask_BL[..., None], mask_BL.long())


def diffusers_class(name: str) -> Any:
    """Return a class of diffusers. Raises MissingClass if the installed version lacks it."""
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError as error:
        raise MissingClass(name) from error


def shorten_model(denoiser: ModelT, count_fields: Mapping[str, str], **changes: Any) -> ModelT:
    """Return a copy in float32 with only the first and the last block of each stack.

    `count_fields` maps each stack to the field of `denoiser.config` that counts its blocks; `changes` are values of
    other fields.
    """
    state, counts = select_first_and_last(denoiser.state_dict(), list(count_fields))
    model: Any = denoiser
    config = replace(model.config, **dict(zip(count_fields.values(), counts, strict=True)), **changes)
    with torch.device("meta"):
        short: ModelT = type(model)(config)
    short.load_state_dict(state, assign=True)
    return short.requires_grad_(False).eval()


def select_first_and_last(state: Mapping[str, Tensor], stacks: Sequence[str]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the weights, float32, with only the first and the last block of each stack, renumbered, and the number
    of blocks that each stack then has."""
    numbers = {
        stack: sorted({int(name.split(".")[1]) for name in state if name.startswith(f"{stack}.")}) for stack in stacks
    }
    kept = {stack: list(dict.fromkeys((indices[0], indices[-1]))) for stack, indices in numbers.items()}
    selected: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack, _, rest = name.partition(".")
        if stack in kept:
            number, _, inner = rest.partition(".")
            if int(number) not in kept[stack]:
                continue
            name = f"{stack}.{kept[stack].index(int(number))}.{inner}"
        selected[name] = tensor.float()
    return selected, [len(kept[stack]) for stack in stacks]


def split_weights(
    state: Mapping[str, Tensor], source_keys: Callable[[str], Sequence[str]], rows: Sequence[int], swapped: str = ""
) -> dict[str, Tensor]:
    """Split each weight along its rows into the tensors that `source_keys` names.

    `rows` are the sizes of all parts but the last. The halves of weights below `swapped` are swapped first.
    """
    named_parts: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = source_keys(key)
        tensor = swap_halves(tensor) if swapped and key.startswith(swapped) else tensor
        first = rows[: len(names) - 1]
        parts = torch.split(tensor, [*first, len(tensor) - sum(first)])
        named_parts |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return named_parts


def split_stacked(keys: LayerKeys, num_equal: int, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the weights of a denoiser under diffusers' names; of what is stacked, the first `num_equal` parts have as
    many rows as the model is wide."""
    return split_weights(state, keys.source_keys, [config.width] * num_equal, keys.swapped or "")


def stream_arguments(config: StreamConfig) -> dict[str, Any]:
    """Return the arguments that diffusers' classes of transformers with double and single streams share."""
    return {
        "in_channels": config.in_features,
        "num_layers": config.num_double,
        "num_single_layers": config.num_single,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.width // config.head_width,
    }


def build_theirs(
    name: str,
    arguments: Callable[[Any], dict[str, Any]],
    rename: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]],
    denoiser: Any,
) -> Any:
    """Build diffusers' class of this name with the weights of `denoiser`, whose configuration gives its arguments."""
    config = denoiser.config
    return with_weights(diffusers_class(name)(**arguments(config)), rename(denoiser.state_dict(), config))


def with_weights(model: Any, state: Mapping[str, Tensor]) -> Any:
    """Load all weights into a model of another library, and return it frozen and in evaluation mode."""
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
