"""A step in the form that a CUDA graph needs: the same tensors at the same places each time, and no word of the host.

What differs between steps is copied into buffers: latents with their noise, text features, weights of the loss, the
length of the window, learning rates. Gradients and the optimizer's memory stay where they are. The first batch of each
shape computes as ever, which makes whatever is made once; the second one is recorded; from then on the record is
repeated. The numbers are those of the plain step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from library.memory.devices import is_on, send
from library.training.step.context import StepContext
from library.training.step.losses import losses_of, noised_of, varied_conditioning_of
from library.training.step.skipping import left_out_if
from library.types import Batch, Noised

Named = Mapping[str, Tensor]
Work = Callable[[], None]
NOISED, TEXT, BATCH = "noised ", "text ", "batch "
OF_BATCH = ("loss_weights_B", "sizes_B6", "crops_B2", "masks_B1HW")


class Recorder(Protocol):
    """Records work, and gives what repeats it."""

    def record(self, work: Work) -> Work: ...


class Repeat:
    """For devices without graphs: the work is done once more."""

    def record(self, work: Work) -> Work:
        return work


class CudaGraphs:
    """CUDA graphs over one pool of memory: they never run at the same time, and nothing in it outlives a step."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        repeat: Work = graph.replay
        return repeat


@dataclass(frozen=True)
class Recorded:
    """The passes of one shape of batch."""

    buffers: Named
    loss: Tensor
    repeat: Work


class FixedSteps:
    """Computes gradients and updates through buffers, recorded by shape."""

    def __init__(self, context: StepContext, optimizer: Optimizer, max_grad_norm: float, recorder: Recorder) -> None:
        """`optimizer` is a fused Adam or AdamW; `max_grad_norm` 0 clips nothing."""
        self._context, self._optimizer, self._max_grad_norm = context, optimizer, max_grad_norm
        self._recorder = recorder
        self._passes: dict[object, Recorded | None] = {}  # by shape; None once one was computed plainly
        self._update: Work | None = None
        self._num_updates = 0
        device = context.device
        # Fused optimizers read rates in float64 on a CPU and in float32 on a card.
        kind = torch.float64 if device == torch.device("cpu") else torch.float32
        self._rates = [torch.zeros((), dtype=kind, device=device) for _ in optimizer.param_groups]
        self._norm = torch.zeros((), device=device)
        self._losses_are_finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def num_recorded(self) -> int:
        """Shapes of batches that are recorded."""
        return sum(recorded is not None for recorded in self._passes.values())

    def gradients(self, batch: Batch, batch_number: int, window_size: int) -> Tensor:
        """Add the gradient of one batch, divided by `window_size`; gives its loss, float32."""
        given = self._inputs(batch, batch_number, window_size)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        if shape not in self._passes or asks_host(batch, given, self._context.device):
            self._passes.setdefault(shape, None)
            return self._pass(given, batch)
        recorded = self._passes[shape]
        if recorded is None:
            recorded = self._passes[shape] = self._record(given, batch)
        for name, buffer in recorded.buffers.items():
            buffer.copy_(given[name])
        recorded.repeat()
        return recorded.loss.clone()

    def update(self, losses: Tensor) -> Tensor:
        """Clip, move the weights and zero the gradients; gives the losses and the norm of the gradient, float32.

        Where one of them is not finite neither weights nor the optimizer's memory move.
        """
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._losses_are_finite.copy_(losses.isfinite().all())
        self._num_updates += 1
        if self._num_updates == 1:  # makes the optimizer's memory
            self._move()
        else:
            if self._update is None:
                self._update = self._recorder.record(self._move)
            self._update()
        return torch.cat([losses.to(self._norm.device), self._norm.view(1)])

    def _inputs(self, batch: Batch, batch_number: int, window_size: int) -> dict[str, Tensor]:
        """All that the passes depend on, on the device but for what the denoiser asks of the host."""
        context = self._context
        noised = noised_of(context, batch, batch_number, is_checked=False)
        with context.autocast():
            conditioning = varied_conditioning_of(context, batch, batch_number, {})
        of_batch = {name: getattr(batch, name) for name in OF_BATCH}
        return {
            **{NOISED + field.name: getattr(noised, field.name) for field in fields(Noised)},
            **{TEXT + name: tensor for name, tensor in conditioning.items()},
            **{BATCH + name: send(t, context.device) for name, t in of_batch.items() if t is not None},
            "window size": torch.full((), float(window_size), device=context.device),
        }

    def _pass(self, given: Named, batch: Batch) -> Tensor:
        """Forward and backward pass; gives the loss."""
        context = self._context
        noised = Noised(**part_of(given, NOISED))
        of_batch: dict[str, Any] = part_of(given, BATCH)
        plain = replace(batch, pixels_BCHW=None, latents_BCHW=None, conditioning=None, **of_batch)
        text = part_of(given, TEXT)
        losses_B = losses_of(context, context.arch.objective, plain, noised, lambda: text)
        loss = (losses_B * plain.loss_weights_B).mean()
        torch.autograd.backward(loss / given["window size"])
        return loss.detach().float()

    def _record(self, given: Named, batch: Batch) -> Recorded:
        buffers = {name: tensor.clone() for name, tensor in given.items()}
        loss = torch.zeros((), device=self._context.device)
        return Recorded(buffers, loss, self._recorder.record(lambda: fill(loss, self._pass(buffers, batch))))

    def _move(self) -> None:
        parameters = self._context.network.trainable_parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._norm.copy_(norm)
        if self._max_grad_norm != 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        with left_out_if(self._optimizer, ~(self._losses_are_finite & norm.isfinite())), self._rates_on_device():
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Inside, the optimizer's groups have their learning rates as buffers; states and schedules know numbers."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        is_recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"], group["capturable"] = rate, is_recorded
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = rate, capturable


def part_of(given: Named, prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}


def fill(buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(value)


def asks_host(batch: Batch, given: Named, device: torch.device) -> bool:
    """Whether a batch needs something that no record has: values on the host, or the model without its adapter."""
    is_there = all(is_on(tensor, device) for tensor in given.values())
    return not is_there or any(attributes.get("diff_output_preservation") for attributes in batch.attributes)
