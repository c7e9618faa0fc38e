"""Options that are read and refused, each with what does its work here."""

from collections.abc import Mapping
from dataclasses import fields

from library.options.base import Options
from library.options.machine.distributed import DistributedOptions
from library.options.no_effect import asks, is_set


def names_of(kind: type[Options]) -> list[str]:
    return [f.name for f in fields(kind)]  # type: ignore[arg-type]


OTHERS = ("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph", "shard_base", "shard_group")
DEEPSPEED = tuple(name for name in names_of(DistributedOptions) if name not in OTHERS)

UNSUPPORTED: Mapping[str, str] = {
    "deepspeed": "it spreads weights that are trained, and here they are an adapter's, a hundredth of the base model. "
    "Several processes share the batches without it (accelerate launch --num_processes 2); a base model that does not "
    "fit a card is stored smaller with --base_format int8 or nf4, waits in main memory with --blocks_to_swap or --fit, "
    "or is spread over the cards with --shard_base",
    "cuda_graphs": "training steps are not recorded as CUDA graphs. Use --compile instead, which is available for "
    "every base model.",
}
INSTEAD: Mapping[str, str] = {
    "zero_stage": "optimizer states and gradients are those of the adapter alone",
    "offload_optimizer_device": "the optimizer's states are small; --optimizer_type AdamW8bit takes a quarter",
    "offload_optimizer_nvme_path": "the optimizer's states are small",
    "offload_param_device": "--blocks_to_swap keeps blocks of the base model in main memory, --shard_base spreads "
    "them over cards",
    "offload_param_nvme_path": "--blocks_to_swap keeps blocks of the base model in main memory",
    "zero3_init_flag": "weights are read one by one straight into their place already, with --shard_base into that of "
    "the process that keeps them",
    "zero3_save_16bit_model": "--save_precision says how the adapter is saved",
    "fp16_master_weights_and_gradients": "--mixed_precision fp16 keeps the adapter in float32; --full_fp16 does not",
}


def unsupported(options: Options) -> list[str]:
    """Return a line for every option that asks for what is not done here."""
    values, defaults = options.flat(), type(options).defaults()
    lines = [f"--{name} is not supported: {why}" for name, why in UNSUPPORTED.items() if asks(values.get(name))]
    if values["deepspeed"]:
        others = [name for name in DEEPSPEED if name != "deepspeed" and is_set(values[name], defaults[name])]
        lines += [f"--{name} is not supported: {INSTEAD[name]}" for name in others]
    return lines
