"""Locates the module that first produces NaN or infinity, by recomputing a batch with a hook on every module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.training.run_parts import Run
from library.training.step.losses import loss_of, start_batch
from library.training.step.pairs import split_passes
from library.types import Batch


@dataclass
class Trace:
    """The modules seen, in order of computation."""

    damaged_output: str | None = None  # the first module with a non-finite output
    input_was_finite: bool = True
    finite_gradients: list[str] = field(default_factory=list)  # modules in order of the backward pass
    damaged_gradient: str | None = None

    def see_output(self, name: str, inputs: Any, output: Any) -> None:
        """Record a module with a non-finite output, and hook the gradients of other modules."""
        if self.damaged_output is None and not all(is_finite(t) for t in tensors_in(output)):
            self.damaged_output = name
            self.input_was_finite = all(is_finite(t) for t in tensors_in(inputs))
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self.see_gradient, name))  # type: ignore[no-untyped-call]

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        """Record the first non-finite gradient and the modules passed before it."""
        if self.damaged_gradient is not None:
            return
        if is_finite(gradient):
            self.finite_gradients.append(name)
        else:
            self.damaged_gradient = name

    def sentence(self, damaged_parameter: str | None) -> str:
        if self.damaged_output is not None:
            state = "finite" if self.input_was_finite else "not finite either"
            return f"the output of {self.damaged_output} is the first that is not finite, its input is {state}"
        if self.damaged_gradient is not None:
            before = f", it is still finite at {self.finite_gradients[-1]}" if self.finite_gradients else ""
            return f"the gradient is first not finite at the output of {self.damaged_gradient}{before}"
        if damaged_parameter is not None:
            return f"all outputs are finite, the gradient of {damaged_parameter} is not"
        return "computed once more, outputs and gradients are finite: the batch alone does not explain it"


def find_first_damage(run: Run, batch: Batch, batch_number: int, step: int) -> str:
    """Recompute a batch's forward and backward pass with the run's random draws, and describe where the damage begins.

    Checks every output separately, so it is slow.
    """
    parameters, trace = run.context.network.trainable_parameters(), Trace()
    saved_gradients = [parameter.grad for parameter in parameters]  # gradients of a later step may exist
    for parameter in parameters:
        parameter.grad = None
    try:
        with watch_modules(list_models(run), trace):
            for pass_batch in split_passes(run.context, batch):
                start_batch(run.context, batch_number, step)
                loss = loss_of(run.context, pass_batch, batch_number)
                if trace.damaged_output is None:
                    scaler = run.optimization.scaler
                    torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
        names = {id(parameter): name for name, parameter in run.context.network.module.named_parameters()}
        damaged = [names[id(p)] for p in parameters if p.grad is not None and not is_finite(p.grad)]
        return trace.sentence(f"adapter.{damaged[0]}" if damaged else None)
    finally:
        for parameter, gradient in zip(parameters, saved_gradients, strict=True):
            parameter.grad = gradient


def list_models(run: Run) -> Mapping[str, nn.Module]:
    """Return a step's models by their names in the report."""
    models, adapter = run.context.models, run.context.network.module
    encoders = models.text_encoders
    names = ["text_encoder"] if len(encoders) == 1 else [f"text_encoder_{i + 1}" for i in range(len(encoders))]
    return {"denoiser": models.denoiser, **dict(zip(names, encoders, strict=True)), "adapter": adapter}


@contextmanager
def watch_modules(parts: Mapping[str, nn.Module], trace: Trace) -> Iterator[None]:
    """Pass every module's output to `trace` inside the block."""

    def hook(name: str) -> Any:
        return lambda _, inputs, output: trace.see_output(name, inputs, output)

    handles = []
    for part, root in parts.items():
        for name, module in root.named_modules():
            handles.append(module.register_forward_hook(hook(f"{part}.{name}" if name else part)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's inputs or outputs."""
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def is_finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
