"""A training run from its options to its end, in stages."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TypeVar

from library.data.debug_dataset import show_batches
from library.determinism import deterministic
from library.diffusion.flow import FlowMatching
from library.options.train import TrainOptions
from library.processes import from_accelerator
from library.protocols import Architecture, LatentSpec
from library.training.command_line.audit_only import check_and_look
from library.training.command_line.resolved import holding_outputs, open_base, resolve_run, split_run
from library.training.command_line.results import complete_sweep_page, log_results, saving_progress
from library.training.failures.interruption import Interrupted, Interruption
from library.training.loop.loop import train
from library.training.models.cuda_kernels import cuda_kernels
from library.training.models.opening import open_accelerator
from library.training.planning.correction import MemoryWatch
from library.training.reporting.event_stream import capture_warnings
from library.training.run.dry_run import try_out
from library.training.run.prepare import prepare
from library.training.sweep.ranking import clearly_worse

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


def train_as_asked(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    latents: LatentSpec | None,
    objective: Callable[[OptionsT], FlowMatching] | None,
    interruption: Interruption,
    command: Sequence[str] | None = None,
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
        resolved = split_run(options)
        events = stack.enter_context(holding_outputs(resolved, command, warnings))
        stack.enter_context(cuda_kernels(options.kernels))
        stack.enter_context(deterministic(options.diagnostics.deterministic))
        resolved, modules, arch = open_base(resolved, build)
        accelerator = open_accelerator(
            options.precision.mixed_precision, resolved.shared.trackers, options.distributed.ddp_timeout
        )
        processes = from_accelerator(accelerator)
        with processes.taking_part(Interrupted):
            run = resolve_run(resolved, modules, arch, processes, events)
            if options.dataset.debug_dataset:
                show_batches(run.data)
                return True
            data, largest = run.data.limited_to_largest_batch() if options.diagnostics.dry_run else (run.data, None)
            with run.loading(events, accelerator.device):
                prepared = prepare(run.requested, run.seed, data, accelerator, processes, run.sweep)
            is_over = try_out(prepared, largest, run.memory_hints)
            if not is_over:
                # From here on there is progress to save, so a signal ends the run after its step.
                interruption.defer()
                first, started, first_step = prepared[0].run, monotonic(), prepared[0].progress.step
                with saving_progress(prepared, processes, events):
                    watch = MemoryWatch.build(first, run.fit)
                    train(prepared, interruption, watch, run.memory_hints, clearly_worse)
                seconds = monotonic() - started
                is_over = log_results(prepared, processes, events, first_step, seconds, options.saving, resolved.page)
        events.end("finished" if is_over else "stopped")
    # The page reads the adapters' reports, which are complete once the events have ended.
    complete_sweep_page(resolved.page, options, resolved.names)
    return is_over
