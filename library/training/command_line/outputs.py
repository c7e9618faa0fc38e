"""The files of a run: their names, and whether it writes any."""

import torch

from library.environment.installed import NEEDED_BY_ALL, check_gpu_is_used, check_installed
from library.options.dataset import DatasetOptions
from library.options.output.saving import SavingOptions
from library.options.training.run import DiagnosticOptions
from library.training.saving.names import Names


def writes(diagnostics: DiagnosticOptions, dataset: DatasetOptions) -> bool:
    """Return False for a dry run and a look at the dataset."""
    return not (diagnostics.dry_run or dataset.debug_dataset)


def name_files(saving: SavingOptions) -> Names | None:
    """Check that the machine can train, and name the files of the run; None without an output folder."""
    check_installed("adapters", NEEDED_BY_ALL)
    check_gpu_is_used(torch)
    return Names.build(saving) if saving.output_dir else None
