"""Runs of one process that add gradients in the order of two, called in subprocesses by test_order_of_sums.py."""

import os
from typing import Any

import torch
from torch import Tensor

from library.training.loop import loop
from library.training.run_parts import Run
from library.training.step.accumulation import Window
from tests.ranks import Job, start


def train_in_order_of_two(*arguments: str) -> int:
    """Train, adding each window's gradients as two processes do: first within each process, then the two sums."""
    plain, accumulate = loop.backward, loop.accumulate_gradients
    gradients_of_batches: list[list[Tensor | None]] = []

    def backward(run: Run, *given: Any) -> Tensor:
        parameters = run.context.network.trainable_parameters()
        loss = plain(run, *given)
        gradients_of_batches.append([p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        return loss

    def accumulate_gradients(run: Run, window: Window, *given: Any) -> Tensor:
        gradients_of_batches.clear()
        losses = accumulate(run, window, *given)
        for place, parameter in enumerate(run.context.network.trainable_parameters()):
            batch_gradients = [gradients[place] for gradients in gradients_of_batches]
            sums = [sum_gradients([g for g in batch_gradients[rank::2] if g is not None]) for rank in (0, 1)]
            parameter.grad = sum_gradients([partial_sum for partial_sum in sums if partial_sum is not None])
        return losses

    loop.backward, loop.accumulate_gradients = backward, accumulate_gradients
    return run_script(*arguments)


def train_with_two_threads(*arguments: str) -> int:
    """Train with kernels that split each sum between two threads."""
    torch.set_num_threads(2)
    return run_script(*arguments)


def run_script(*arguments: str) -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # a single-process run has no launcher
        os.environ.pop(name, None)
    torch.distributed.destroy_process_group()
    return start(Job(list(arguments), 1, ""))


def sum_gradients(gradients: list[Tensor]) -> Tensor | None:
    total = None
    for gradient in gradients:
        total = gradient.clone() if total is None else total.add_(gradient)
    return total
