"""When and where weights are written."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class SavingOptions(Options):
    """When and where weights are written."""

    output_dir: str | None = option(None, help="")
    output_name: str | None = option(None, help="")
    save_precision: str | None = option(None, help="", choices=(None, "float", "fp16", "bf16"))
    save_model_as: str = option("safetensors", help="", choices=(None, "ckpt", "pt", "safetensors"))
    save_every_n_epochs: int | None = option(None, help="")
    save_every_n_steps: int | None = option(None, help="")
    save_n_epoch_ratio: int | None = option(None, help="")
    save_last_n_epochs: int | None = option(None, help="")
    save_last_n_steps: int | None = option(None, help="")
