"""What this version does not do yet. A feature that arrives takes its lines out of this file."""

from collections.abc import Mapping
from dataclasses import fields

from library.options.base import Options
from library.options.distributed import DistributedOptions
from library.options.rules import asks, is_set


def names_of(kind: type[Options]) -> list[str]:
    return [f.name for f in fields(kind)]  # type: ignore[arg-type]


DDP = ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph")
DEEPSPEED = tuple(name for name in names_of(DistributedOptions) if name not in DDP)

NOT_YET: Mapping[str, str] = {
    "deepspeed": "train on one card without it",
}


def unsupported(options: Options) -> list[str]:
    """A line for every option that asks for what this version cannot do."""
    values, defaults = options.flat(), type(options).defaults()
    lines = [f"--{name} is not supported yet: {why}" for name, why in NOT_YET.items() if asks(values.get(name))]
    if values["deepspeed"]:
        others = [name for name in DEEPSPEED if name != "deepspeed" and is_set(values[name], defaults[name])]
        lines += [f"--{name} is not supported yet: {NOT_YET['deepspeed']}" for name in others]
    return lines
