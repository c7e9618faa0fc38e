"""Measure saved adapter files on the held-out images and choose the one to keep. All files get the same noise, and
the base model is loaded once. The training options determine the model and the images."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch

from library.base.errors import about, error_in
from library.base.terminal import print_line
from library.checkpoints.files import display_path
from library.checkpoints.headers import read_metadata
from library.commands.command import make_training_parser, training_command
from library.commands.counted_plan import read_training_options
from library.options.output.preview import PreviewOptions
from library.options.output.prompts import read_prompts
from library.options.output.reports import ReportOptions
from library.options.output.saving import SavingOptions
from library.options.training.validation import ValidationOptions
from library.protocols import Architecture
from library.training.command_line.checks import check_precision
from library.training.command_line.option_checks import check_values
from library.training.evaluation.choice import average_by_image
from library.training.evaluation.choosing import (
    MeasuredFile,
    add_scores,
    choose_measured,
    forgotten,
    format_candidates,
    format_choice,
    format_scores,
    memorised,
    memory_line,
)
from library.training.evaluation.image_scores import read_scorer
from library.training.evaluation.measurement import Measurement
from library.training.evaluation.prompts import refuse_strengths, resolve_all
from library.training.models.opening import open_data_plan
from library.training.models.text_caching import TextPlan
from library.training.models.weight_formats import check_format
from library.training.offline.contact_sheet import Row, draw_rows
from library.training.offline.file_losses import FileLosses, Sides, adjust_for_measuring, losses_of_files
from library.training.report_page.writer import add_event
from library.training.reporting import events
from library.training.reporting.event_stream import open_event_file, plain
from library.training.saving.saved_files import drop_copies, read_num_steps
from library.types import Prompt
from tools.contact_sheet import add_seeds, choose_files, expand_columns, find_device, update_report

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python3 tools/choose_checkpoint.py --script train_network.py --config_file configs/quickstart/train.toml \\
    --validation_split 0.1 --seed 42"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_training_parser(__doc__, EXAMPLES)
    parser.add_argument("--files", "--models", type=Path, nargs="+", help="adapter files; unset: all in --output_dir")
    add_seeds(parser)
    return parser


def choose_seed(seed: int | None, files: Sequence[Path]) -> int:
    """Return the given seed, else the seed that the files were trained with; it selects the held-out images.

    Raises UserError if the files record no common seed.
    """
    if seed is not None:
        return seed
    seeds = {read_metadata(path).get("ss_seed", "") for path in files}
    if len(seeds) != 1 or not (text := seeds.pop()).isdigit():
        raise about("--seed", cause="missing")(
            "is not set, and the files record no common seed", "set --seed to that of the training"
        )
    logger.info("--seed is not set: using %s from the files", text)
    return int(text)


def warn_of_other_splits(options: ValidationOptions, files: Sequence[Path], seed: int) -> None:
    """Warn about files that may have been trained on the held-out images."""
    split_seed = seed if options.validation_seed is None else options.validation_seed
    for path in files:
        metadata = read_metadata(path)
        if "ss_validation_split" not in metadata:
            continue
        # All metadata values are strings; "None" is an option that was not set.
        file_seed = metadata.get("ss_validation_seed", "None")
        file_seed = metadata.get("ss_seed", "") if file_seed == "None" else file_seed
        share = options.validation_split
        if float(metadata["ss_validation_split"]) != share or file_seed != str(split_seed):
            message = (
                "%s was trained with --validation_split %s and seed %s, but here they are %g and %d: it may have been "
                "trained on the held-out images"
            )
            logger.warning(message, path.name, metadata["ss_validation_split"], file_seed, share, split_seed)


def measure_files(sides: Sides, losses_by_file: Sequence[FileLosses]) -> list[MeasuredFile]:
    """Return each file with its mean loss per image, the base model first."""
    unseen = sides.held_out or sides.mirrored
    is_held_out = sides.held_out is not None

    def by_its_images(losses: FileLosses, of_trained: bool) -> torch.Tensor:
        losses_NL = losses.trained_NL if of_trained else losses.held_out_NL if is_held_out else losses.mirrored_NL
        measurement = sides.trained if of_trained else unseen
        assert losses_NL is not None and measurement is not None
        return average_by_image(losses_NL.mean(1), measurement.rows)

    base, measured = losses_by_file[0], []
    for file_losses in losses_by_file:
        memory = None
        if file_losses.row is not None and unseen is not None:
            unseen_pair, trained_pair = (
                (by_its_images(base, of_trained), by_its_images(file_losses, of_trained))
                for of_trained in (False, True)
            )
            memory = memorised(unseen_pair, trained_pair, "held-out" if is_held_out else "mirrored")
        losses_G = by_its_images(file_losses, of_trained=not is_held_out)
        file, step = (
            (None, 0) if file_losses.row is None else (display_path(file_losses.row), read_num_steps(file_losses.row))
        )
        measured.append(MeasuredFile(file, step, losses_G, memory, measure_forgetting(file_losses, base, sides.probe)))
    return measured


def measure_forgetting(file_losses: FileLosses, base: FileLosses, probe: Measurement | None) -> events.Forgotten | None:
    """Return the rise of the loss on the forgetting probe; None without a probe, and for the base model itself."""
    if probe is None or file_losses.row is None or file_losses.probe_NL is None or base.probe_NL is None:
        return None
    before_G, after_G = (
        average_by_image(losses_NL.mean(1), probe.rows) for losses_NL in (base.probe_NL, file_losses.probe_NL)
    )
    return forgotten(before_G, after_G)


def record_choice(choice: events.FileChoice, reports: ReportOptions, saving: SavingOptions) -> None:
    """Append the choice to the run's event file and report, if they exist."""
    line = plain(choice.as_line(time.time()))
    if (path := reports.log_events) and path != "-":
        file = open_event_file(Path(path), goes_on=True)
        file.take([line])
        file.close()
    update_report(saving, lambda report: add_event(report, line))


def read_columns(options: PreviewOptions, arch: Architecture, seeds: Sequence[int] | None) -> list[Prompt]:
    """Return the prompts that --score_previews draws with each file, none without it. Raises UserError without
    prompts."""
    if not options.score_previews:
        if seeds or options.score_models:
            flag = "--seeds" if seeds else "--score_models"
            raise about(flag)("has no effect without --score_previews, which draws images and scores them", "add it")
        return []
    specs = read_prompts(Path(options.sample_prompts)) if options.sample_prompts else []
    if not specs:
        raise about("--score_previews", cause="needs")("needs prompts to draw: set --sample_prompts to a file of them")
    refuse_strengths(specs, "--score_previews")
    return expand_columns(resolve_all(specs, arch), seeds)


def choose_file(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Measure the files and print the choice. Raises UserError for invalid options and files of other base models."""
    base, options = read_training_options(args.script, training)
    options = adjust_for_measuring(options)
    check_values(options)
    check_precision(options.precision, options.network)
    check_format(options.precision.denoiser_format)
    files = sorted(
        choose_files(args.files, options.saving), key=lambda path: (read_num_steps(path), display_path(path).name)
    )
    files = drop_copies(files)
    if options.dataset.dataset_class:
        raise about("--dataset_class")(
            "is not supported: images of a custom dataset class cannot be measured one by one"
        )
    seed = choose_seed(options.run.seed, files)
    warn_of_other_splits(options.validation, files, seed)
    arch = base.build(options)
    text_plan = TextPlan.resolve(options.network, arch.text_cache)
    columns = read_columns(options.preview, arch, args.seeds)
    plan = open_data_plan(options, arch, text_plan, seed, 1)
    scorer = read_scorer(options.preview, plan)
    sides, losses = losses_of_files(options, text_plan, arch, plan, seed, [None, *files], find_device())
    choice = choose_measured(measure_files(sides, list(losses)), is_held_out=sides.held_out is not None)
    if choice is None:
        raise error_in("--mixed_precision")("the loss of every file is NaN", "use --mixed_precision bf16 or no")
    if scorer is not None:
        rows = [Row([], columns), *(Row([(file, 1.0)], columns) for file in files)]
        # The models are loaded again: drawing moves text encoders and VAE as contact sheets do.
        drawn = draw_rows(options.network, options.precision, options.memory, base.build(options), rows, find_device())
        choice = add_scores(choice, [scorer.score(images, [p.text for p in columns]) for images in drawn])
    for text in format_candidates(choice):
        print_line(text)
    if scorer is not None:
        print_line(f"scores of {len(columns)} images, and differences from the file with the lowest loss:")
        print_line("\n".join(format_scores(choice)))
    print_line(format_choice(choice))
    if (line := memory_line(choice)) is not None:
        print_line(line)
    record_choice(choice, options.reports, options.saving)


main = training_command(setup_parser, choose_file)

if __name__ == "__main__":
    sys.exit(main())
