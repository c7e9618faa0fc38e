"""Options for choosing the fastest training setup that fits the GPU."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.machine.base_formats import BASE_FORMATS


@dataclass(frozen=True)
class FitOptions(Options, affects_training=False):
    """Automatic choice of memory-saving options."""

    fit: str | None = option(
        None,
        usual=True,
        metavar="SIZE",
        excludes={"dataset_class": "the sizes of its batches are not known before they are drawn"},
    )
    """Estimate the memory that training needs, and choose the fastest configuration that fits into this much GPU
    memory. 12GB is what a GPU of that size has free beside a desktop, 11500MB or 12GiB exactly that amount, auto what
    is free now. Prints the candidates; options that you set yourself stay."""
    fit_formats: list[str] | None = option(
        None,
        needs="fit",
        excludes={"base_arithmetic=8bit": "only some formats support 8-bit matmul, so set --base_format instead"},
        nargs="+",
        choices=BASE_FORMATS,
    )
    """Values of --base_format that --fit may choose from. Unset keeps the format that you set."""
