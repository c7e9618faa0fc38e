"""A run of one process that adds its gradients in the order of two; called by test_processes.py in a process of its
own."""

import os
from typing import Any

import torch
from torch import Tensor

from library.training.loop import loop
from library.training.run_parts import Run
from library.training.step.accumulation import Window
from tests.ranks import Job, start


def added_as_by_two(*arguments: str) -> int:
    """Train, each window's gradients added up as two processes do: those of one, those of the other, and both sums."""
    plain, accumulate = loop.backward, loop.accumulate_gradients
    kept: list[list[Tensor | None]] = []

    def backward(run: Run, *given: Any) -> Tensor:
        parameters = run.context.network.trainable_parameters()
        loss = plain(run, *given)
        kept.append([p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return loss

    def accumulate_gradients(runs: list[Run], window: Window, *given: Any) -> list[Tensor]:
        kept.clear()
        losses = accumulate(runs, window, *given)
        for place, parameter in enumerate(runs[0].context.network.trainable_parameters()):
            found = [gradients[place] for gradients in kept]
            sums = [added([g for g in found[rank::2] if g is not None]) for rank in (0, 1)]
            parameter.grad = added([one for one in sums if one is not None])
        return losses

    loop.backward, loop.accumulate_gradients = backward, accumulate_gradients
    return run_script(*arguments)


def with_two_threads(*arguments: str) -> int:
    """Train with kernels that share each sum out to two threads."""
    torch.set_num_threads(2)
    return run_script(*arguments)


def run_script(*arguments: str) -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # a run of one process has no launcher
        os.environ.pop(name, None)
    torch.distributed.destroy_process_group()
    return start(Job(list(arguments), 1, ""))


def added(gradients: list[Tensor]) -> Tensor | None:
    total = None
    for gradient in gradients:
        total = gradient.clone() if total is None else total.add_(gradient)
    return total
