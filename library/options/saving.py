"""When and where weights are written."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class SavingOptions(Options):
    """When and where weights are written."""

    output_dir: str | None = option(None, help="Folder that saved files go to; made if missing.")
    output_name: str | None = option(
        None,
        help="Name of the saved files, without ending. Unset uses last, epoch-N and at-stepN.",
    )
    save_precision: str | None = option(
        None,
        help="Number format of saved weights: float, fp16 or bf16. Unset keeps the format of training.",
        choices=(None, "float", "fp16", "bf16"),
    )
    save_model_as: str = option(
        "safetensors",
        help="Format of saved files: safetensors, or ckpt and pt, which hold no metadata.",
        choices=(None, "ckpt", "pt", "safetensors"),
    )
    save_every_n_epochs: int | None = option(
        None,
        at_least=1,
        help="Save after every N-th epoch too. Unset or 0 does not.",
    )
    save_every_n_steps: int | None = option(
        None,
        at_least=1,
        help="Save after every N-th step too. Unset or 0 does not.",
    )
    save_n_epoch_ratio: int | None = option(
        None,
        at_least=1,
        help="Save about N times over the run, after whole epochs. Wins over --save_every_n_epochs.",
    )
    save_last_n_epochs: int | None = option(
        None,
        at_least=1,
        needs=("save_every_n_epochs", "save_n_epoch_ratio"),
        help="Keep only the newest N files saved after epochs and delete older ones. Unset or 0 keeps all.",
    )
    save_last_n_steps: int | None = option(
        None,
        at_least=1,
        needs="save_every_n_steps",
        help="Delete files saved after steps once they are more than N steps old. Unset or 0 keeps all.",
    )
