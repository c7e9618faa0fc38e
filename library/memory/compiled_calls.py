"""Calls of a compiled expression that skip the compiler's checks for arguments like those of an earlier call.

On each call torch.compile looks for a graph that fits, which takes several times as long as launching the one kernel
of a fused operation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 128  # of all expressions: one for each pattern of dtypes, broadcasting and wanted gradients
MOST_CALLS = 4096  # that are kept of an expression; image sizes and caption lengths have one each

DEVICES = ("cuda", "cpu")  # types that compile

Graph = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Call:
    """A call of a graph, as torch.compile made it for arguments of the same kind."""

    graph: Graph
    inputs: Sequence[tuple[int | None, Any]]  # of the graph: the number of an argument, or None and a size
    outputs: Sequence[int]  # the graph's numbers of the results
    is_single: bool  # one result, not a tuple

    def __call__(self, arguments: Sequence[Any]) -> Any:
        out = self.graph([value if i is None else arguments[i] for i, value in self.inputs])
        return out[self.outputs[0]] if self.is_single else tuple([out[i] for i in self.outputs])


class CompiledCalls:
    """An expression of tensors and constants, compiled by Inductor. It returns new tensors: one, or a tuple of them."""

    def __init__(self, expression: Callable[..., Any]) -> None:
        self.compiled = torch.compile(expression, dynamic=True, fullgraph=True, backend=self.compile_graph)
        self.calls: dict[Any, Call] = {}
        self.last: tuple[Graph, Sequence[Any], Sequence[Any]] | None = None  # graph that ran, its inputs and outputs

    def __call__(self, *arguments: Any) -> Any:
        # Graphs depend on nothing else that changes within a process. Inductor itself checks how tensors are aligned.
        key: list[Any] = []
        for x in arguments:
            if isinstance(x, Tensor):
                key += type(x), x.dtype, x.device, x.shape, x.stride()
            else:
                key.append(x)
        if torch._C._is_any_autocast_enabled():
            key += [torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in DEVICES]
        kept = tuple(key)
        call = self.calls.get(kept)
        return self.run_checked(kept, arguments) if call is None else call(arguments)

    def run_checked(self, key: Any, arguments: Sequence[Any]) -> Any:
        """Let torch.compile choose or compile a graph, and keep its call."""
        from torch import _dynamo

        # A graph that knows that two arguments are one tensor takes it once, which other tensors like these are not.
        numbers = {id(x): i for i, x in reversed([*enumerate(arguments)])}
        arguments = [
            x if numbers[id(x)] == i or not isinstance(x, Tensor) else x.detach() for i, x in enumerate(arguments)
        ]
        # The setting is per thread, and autograd has its own threads.
        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, MOST_GRAPHS)
        for tensor in arguments:
            if isinstance(tensor, Tensor) and tensor.ndim:
                _dynamo.mark_static(tensor, tensor.ndim - 1)  # a width; numbers of samples and tokens change
        self.last = None
        results = self.compiled(*arguments)
        call = None if self.last is None else trace_call(*self.last, arguments, results)
        self.last = None
        if call is not None:
            if len(self.calls) >= MOST_CALLS:
                self.calls.clear()
            self.calls[key] = call
        return results

    def compile_graph(self, module: Any, inputs: Sequence[Any]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        # AOTAutograd's cache would keep what is around Inductor's graph too. Inductor's own cache stays in use.
        with config.patch(enable_autograd_cache=False):
            return compile_fx(module, inputs, inner_compile=self.compile_inner)  # type: ignore[arg-type]

    def compile_inner(self, module: Any, inputs: Sequence[Any], **settings: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        graph: Any = compile_fx_inner(module, inputs, **settings)  # type: ignore[arg-type]

        def run(values: list[Any]) -> Sequence[Any]:
            given = tuple(values)  # the graph empties its list
            out: Sequence[Any] = graph(values)
            self.last = graph, given, out
            return out

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def trace_call(
    graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any], arguments: Sequence[Any], results: Any
) -> Call | None:
    """Find a graph's inputs among the arguments, and the results among its outputs; None if one is another tensor."""
    numbers = {id(x): i for i, x in enumerate(arguments) if isinstance(x, Tensor)}
    places = {id(x): i for i, x in enumerate(outputs)}
    is_single = isinstance(results, Tensor)
    found = [places.get(id(x), -1) for x in ([results] if is_single else results)]
    if -1 in found or any(isinstance(x, Tensor) and id(x) not in numbers for x in inputs):
        return None
    given = [(numbers[id(x)], None) if isinstance(x, Tensor) else (None, x) for x in inputs]
    return Call(graph, given, found, is_single)
