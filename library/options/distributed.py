"""Several processes and DeepSpeed."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class DistributedOptions(Options):
    """Several processes and DeepSpeed."""

    ddp_timeout: int | None = option(None, help="")
    ddp_gradient_as_bucket_view: bool = option(False, help="")
    ddp_static_graph: bool = option(False, help="")
    deepspeed: bool = option(False, help="")
    zero_stage: int = option(2, help="", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option(None, help="", choices=(None, "cpu", "nvme"))
    offload_optimizer_nvme_path: str | None = option(None, help="")
    offload_param_device: str | None = option(None, help="", choices=(None, "cpu", "nvme"))
    offload_param_nvme_path: str | None = option(None, help="")
    zero3_init_flag: bool = option(False, help="")
    zero3_save_16bit_model: bool = option(False, help="")
    fp16_master_weights_and_gradients: bool = option(False, help="")
