"""The sum of the gradients of all processes of a run, in one flat buffer.

Every step averages an accumulation window of batches (see library/training/step/accumulation.py), of which each process
computes its share. N processes therefore equal one process that accumulates N times as many batches: the same batches,
noise, steps and learning rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.processes.process_group import Processes


@dataclass(frozen=True)
class Order:
    """A digest of the work of a process, which must be equal within its group of processes."""

    digest: int  # below 2**24, so that float32 holds it exactly
    group_size: int

    def require_same(self, digests: Sequence[float], rank: int) -> None:
        """Raise RuntimeError if the digests within the group of `rank` differ; `digests` has one entry per process."""
        first = rank // self.group_size * self.group_size
        if len(set(digests[first : first + self.group_size])) > 1:
            raise RuntimeError(
                "processes that share the base model (--shard_base) computed its blocks in different orders, so this "
                "step used wrong weights; its update was not applied"
            )


def exchange_gradients(
    processes: Processes,
    parameters: Sequence[nn.Parameter],
    losses: Tensor,
    num_losses: int,
    wishes: Sequence[bool],
    order: Order | None = None,
) -> tuple[Tensor, list[bool]]:
    """Sum the gradients of all processes. Return the losses of all, and for each wish whether any process has it.

    `losses` belong to this process's share of `num_losses` batches, in order; the result has the losses of all
    batches, in order. Everything travels in one float32 buffer and one all-reduce. A gradient that no process has
    stays None. Raises RuntimeError if processes that share an `order` computed different things.
    """
    if processes.count == 1:
        return losses, list(wishes)
    all_losses = torch.zeros(num_losses, device=processes.device)
    # Every process fills its own entries and leaves the others 0, so the sum over processes holds all of them.
    all_losses[processes.rank :: processes.count] = losses.to(processes.device, torch.float32)
    has_gradient = [p.grad is not None for p in parameters]
    digests = [0.0] * (0 if order is None else processes.count)
    if order is not None:
        digests[processes.rank] = float(order.digest)
    flags = torch.tensor([*has_gradient, *wishes, *digests], dtype=torch.float32, device=processes.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1).to(processes.device, torch.float32) for g in gradients] + [flags, all_losses])
    processes.all_reduce(flat)
    sizes = [p.numel() for p in parameters]
    *sums, flags, all_losses = torch.split(flat, [*sizes, len(flags), num_losses])
    flag_sums = flags.tolist()
    if order is not None:
        # Checked before gradients are assigned, so that a step with wrong weights is never applied.
        order.require_same(flag_sums[len(parameters) + len(wishes) :], processes.rank)
    is_set = [number > 0 for number in flag_sums[: len(parameters) + len(wishes)]]
    for parameter, total, is_used in zip(parameters, sums, is_set, strict=False):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if is_used else None
    # A view would keep the whole buffer in memory for as long as the losses are used.
    return all_losses.clone(), is_set[len(parameters) :]
