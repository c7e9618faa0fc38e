"""A training run from its options to its end, in stages."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TypeVar

from library.base.determinism import deterministic
from library.data.debug_dataset import show_batches
from library.diffusion.flow import FlowMatching
from library.options.train import TrainOptions
from library.processes.process_group import from_accelerator
from library.protocols import Architecture, LatentSpec
from library.training.command_line.audit_only import check_and_look
from library.training.command_line.opened_base import open_base
from library.training.command_line.outputs import holding_outputs, name_files
from library.training.command_line.resolved import resolve_run, resolve_start
from library.training.command_line.results import log_results, saving_progress
from library.training.failures.interruption import Interrupted, Interruption
from library.training.loop.loop import train
from library.training.models import opening
from library.training.models.cuda_kernels import cuda_kernels
from library.training.planning.correction import MemoryWatch
from library.training.reporting.event_stream import Sink, capture_warnings
from library.training.run.dry_run import try_out
from library.training.run.prepare import prepare

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


def train_as_asked(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    latents: LatentSpec | None,
    objective: Callable[[OptionsT], FlowMatching] | None,
    interruption: Interruption,
    command: Sequence[str] | None = None,
    sinks: Sequence[Sink] = (),
) -> bool:
    """Check the options, then train, or show the noise levels or the dataset. Return True if the run is complete, False
    if it was stopped.

    No other run writes the same files meanwhile. Progress is saved if an error or a non-finite number ends the run.
    """
    with ExitStack() as stack:
        # The events open later; warnings of the checks are kept for them and for the page of an audit.
        warnings = stack.enter_context(capture_warnings())
        if check_and_look(options, latents, objective, command, warnings):
            return True
        names = name_files(options.saving)
        events = stack.enter_context(holding_outputs(options, names, command, warnings, sinks))
        stack.enter_context(cuda_kernels(options.kernels))
        stack.enter_context(deterministic(options.diagnostics.deterministic))
        options, module, arch = open_base(options, build)
        mixed_precision, timeout = options.precision.mixed_precision, options.distributed.ddp_timeout
        accelerator = opening.open_accelerator(mixed_precision, options.trackers, timeout)
        processes = from_accelerator(accelerator)
        with processes.taking_part(Interrupted):
            start = resolve_start(options, arch, names, processes)
            data = opening.open_training_data(start.options, arch, start.text, start.seed, processes.count)
            if options.dataset.debug_dataset:
                show_batches(data)
                return True
            assert module is not None, "what trains names its network module"
            run = resolve_run(start, module, data, processes, events)
            data, largest = data.limited_to_largest_batch() if options.diagnostics.dry_run else (data, None)
            with run.loading(accelerator.device):
                prepared = prepare(run.requested, data, accelerator, processes)
            is_over = try_out(prepared, largest, run.memory_hints)
            if not is_over:
                # From here on there is progress to save, so a signal ends the run after its step.
                interruption.defer()
                started, first_step = monotonic(), prepared.progress.step
                with saving_progress(prepared):
                    train(prepared, interruption, MemoryWatch.build(prepared.run, run.fit), run.memory_hints)
                is_over = log_results(prepared, first_step, monotonic() - started)
        events.end("finished" if is_over else "stopped")
    return is_over
