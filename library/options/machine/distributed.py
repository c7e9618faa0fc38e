"""Several processes and DeepSpeed."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import whole

FLAT_BUFFER = "processes exchange gradients in one flat buffer, without torch's DDP"

MOST_MINUTES = 1_000_000  # nearly two years; torch stores milliseconds in 64 bits, its key-value stores seconds in 32


@dataclass(frozen=True)
class DistributedOptions(Options, affects_training=False):
    """Several processes and DeepSpeed."""

    ddp_timeout: int | None = option(None, kind=whole(0, MOST_MINUTES))
    """Minutes that processes of a distributed run wait for each other. Unset keeps torch's own limit."""
    ddp_gradient_as_bucket_view: bool = option(False, ignored=FLAT_BUFFER)
    """Let gradients share memory with the buffers that processes exchange, in a distributed run."""
    ddp_static_graph: bool = option(False, ignored=FLAT_BUFFER)
    """Tell a distributed run that the graph of the computation never changes."""
    shard_base: bool = option(
        False,
        refused_by_leco="the processes call the denoiser different numbers of times, but sharding requires equal ones; "
        "leave it out, or use --blocks_to_swap",
    )
    """Shard the weights of the frozen denoiser over the processes of a run: each keeps its share, and a block is
    gathered only while it computes. For base models that do not fit one GPU; needs fast links between the GPUs. An
    FSDP2 configuration of accelerate has the same effect."""
    shard_group: int | None = option(None, kind=whole(2), needs="shard_base")
    """Number of processes that share one copy of the weights with --shard_base. Unset is all processes of a machine:
    machines then exchange only the adapter's gradients."""
    deepspeed: bool = option(
        False,
        unsupported="it shards trained weights, which are only the adapter's here, about a hundredth of the base "
        "model. Several processes share the batches without it (accelerate launch --num_processes 2). For a base model "
        "that does not fit a GPU, use --base_format int8 or nf4, offload it to main memory with --blocks_to_swap or "
        "--fit, or shard it over several GPUs with --shard_base",
    )
    """Train through DeepSpeed, which spreads optimizer, gradients and weights over devices."""
    zero_stage: int = option(
        2,
        takes_other_values=True,
        needs="deepspeed",
        unsupported="optimizer states and gradients are those of the adapter alone",
        choices=(0, 1, 2, 3),
    )
    """What DeepSpeed spreads over devices: 1 optimizer states, 2 gradients too, 3 weights too, 0 nothing."""
    offload_optimizer_device: str | None = option(
        None,
        needs="deepspeed",
        unsupported="the optimizer's states are small; --optimizer_type AdamW8bit takes a quarter",
        choices=(None, "cpu", "nvme"),
    )
    """Where DeepSpeed keeps the optimizer's states, cpu or nvme. Unset leaves them on the device."""
    offload_optimizer_nvme_path: str | None = option(
        None, path="new folder", needs="deepspeed", unsupported="the optimizer's states are small"
    )
    """Folder on a fast disk for the optimizer's states that DeepSpeed moves to nvme."""
    offload_param_device: str | None = option(
        None,
        needs="deepspeed",
        unsupported="--blocks_to_swap keeps blocks of the base model in main memory, --shard_base shards them over "
        "GPUs",
        choices=(None, "cpu", "nvme"),
    )
    """Where DeepSpeed keeps the weights, cpu or nvme. Unset leaves them on the device."""
    offload_param_nvme_path: str | None = option(
        None,
        path="new folder",
        needs="deepspeed",
        unsupported="--blocks_to_swap keeps blocks of the base model in main memory",
    )
    """Folder on a fast disk for the weights that DeepSpeed moves to nvme."""
    zero3_init_flag: bool = option(
        False,
        needs="deepspeed",
        unsupported="weights are already read one by one to their final device, with --shard_base only by the process "
        "that keeps them",
    )
    """Build models already spread over devices, for DeepSpeed stage 3."""
    zero3_save_16bit_model: bool = option(
        False, needs="deepspeed", unsupported="--save_precision sets the format of the saved adapter"
    )
    """Collect 16-bit weights from all devices when saving, for DeepSpeed stage 3."""
    fp16_master_weights_and_gradients: bool = option(
        False,
        needs="deepspeed",
        unsupported="--mixed_precision fp16 keeps the adapter in float32; --full_fp16 does not",
    )
    """Keep DeepSpeed's master weights and gradients in fp16, for stage 2 with the optimizer on the CPU."""
