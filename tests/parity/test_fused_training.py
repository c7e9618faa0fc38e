"""Fused operations in bf16, compiled by Inductor for the CPU, over steps of training: no further from float32 than
plain operations, and to neither side."""

import copy
from collections.abc import Iterator, Sequence
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor, nn

from library.memory import fused_kernels
from library.memory.fused_kernels import Fused, fused_operations
from tests.parity.deep import DEEP
from tests.parity.modes import install_adapter

NUM_STEPS = 24
BASES = ("flux", "zimage")


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compile fused operations for the CPU, and yield the directions that ran compiled."""
    reason = fused_kernels.try_compiler(torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"no C++ compiler: {reason}")
    torch.compiler.reset()
    directions = list[str]()
    run_compiled = Fused.run_compiled

    def run(operation: Fused, direction: str, arguments: Sequence[object]) -> object:
        directions.append(direction)
        return run_compiled(operation, direction, arguments)

    monkeypatch.setattr(Fused, "run_compiled", run)
    monkeypatch.setattr(fused_kernels, "compiles_for", lambda device: not Fused.is_off)
    yield directions
    torch.compiler.reset()


def is_feature(value: Tensor) -> bool:
    """Return True for latents and text features, False for times, masks and ids."""
    return value.is_floating_point() and value.ndim > 2


def draw(values: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Return other latents and text features of the same shapes, which bf16 has exactly."""
    return [
        torch.randn(value.shape, generator=generator).bfloat16().float() if is_feature(value) else value
        for value in values
    ]


def gradient(model: nn.Module, network: nn.Module, values: Sequence[Tensor], is_plain: bool) -> Tensor:
    """Return the gradient of the mean square as one vector, in float64."""
    dtype = next(model.parameters()).dtype
    inputs = [value.to(dtype) if is_feature(value) else value for value in values]
    network.zero_grad()
    with fused_operations(are_off=is_plain), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        output = model(*inputs)
    output.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).double()


@pytest.mark.nightly
def test_fused_steps_in_bf16_are_as_near_to_float32_as_plain_ones(compiling: list[str]) -> None:
    errors = {"plain": list[float](), "fused": list[float]()}
    biases = list[float]()
    for base in BASES:
        deep = DEEP[base]
        rounded = deep.frozen(61).bfloat16()
        models = {"float32": copy.deepcopy(rounded).float(), "plain": rounded, "fused": copy.deepcopy(rounded)}
        networks = {name: install_adapter("lora", deep.seen(model)) for name, model in models.items()}
        assert all(p.dtype == torch.float32 for network in networks.values() for p in network.parameters())
        optimizer = torch.optim.Adam(networks["float32"].parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(71)
        for _ in range(NUM_STEPS):
            values = draw(deep.values(), generator)
            compiling.clear()
            found = {name: gradient(models[name], networks[name], values, name != "fused") for name in models}
            assert {"value", "gradients"} == set(compiling)
            reference = found["float32"]
            for name, of_kind in errors.items():
                of_kind.append(float((found[name] - reference).norm() / reference.norm()))
            biases.append(float((found["fused"] - reference) @ reference / reference.square().sum()))
            optimizer.step()
            for network in networks.values():
                weights = networks["float32"].state_dict()
                network.load_state_dict({key: weight.bfloat16().float() for key, weight in weights.items()})
    ratio, error = mean(errors["fused"]) / mean(errors["plain"]), stdev(biases) / len(biases) ** 0.5
    assert mean(errors["plain"]) > 1e-3  # the steps are in bf16
    assert ratio <= 1.1
    assert abs(mean(biases)) <= 2 * error, (ratio, mean(biases), error)
