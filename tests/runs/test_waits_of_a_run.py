"""In each step of a run the host waits for the device only once, to read the results of the previous step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from library.memory.offload.readback import Readback
from library.processes.process_group import Processes
from library.training.command_line import training
from library.training.loop.update import Updates
from tests.device_reads import HostWaits, NoWaiting
from tests.device_standin import OnDevice, device_without_float64
from tests.running import Finished

Train = Callable[..., Finished]
NUM_STEPS = 5
VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


class NoReading(NoWaiting):
    """A mode that rejects blocking copies and reading values of tensors on the device."""

    is_on = False
    num_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_on:
            return func(*args, **(kwargs or {}))
        if func in VALUES and any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs))):
            raise HostWaits(f"{func} of a tensor on the device")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def tolist(self, tensor: OnDevice) -> Any:
        if self.is_on:
            raise HostWaits("tolist of a tensor on the device")
        return tensor.inner.tolist()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        before, self.is_on = self.is_on, False
        self.num_reads += before
        try:
            yield
        finally:
            self.is_on = before


@pytest.mark.nightly  # the fast tier covers the steps of every base model
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--ema_decay", "0.9", "--scale_weight_norms", "0.01"], id="plain"),
        pytest.param(
            ["--cache_latents", "--network_train_unet_only", "--gradient_accumulation_steps", "2"], id="accumulated"
        ),
    ],
)
def test_a_run_waits_for_the_device_once_per_step(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Watch the steps between the first, which creates shared tensors, and the last."""
    watch = NoReading()
    take, read = Updates.apply, Readback.read

    def watched_take(updates: Updates, window: Any, losses: Any) -> None:
        watch.is_on = watch.is_on and window.step + 1 < NUM_STEPS
        take(updates, window, losses)
        watch.is_on = window.step + 1 < NUM_STEPS

    def watched_read(readback: Readback) -> list[float]:
        with watch.allowed():
            return read(readback)

    monkeypatch.setattr(Updates, "apply", watched_take)
    monkeypatch.setattr(Readback, "read", watched_read)
    monkeypatch.setattr(OnDevice, "tolist", lambda tensor: watch.tolist(tensor))
    with device_without_float64() as device, watch:
        monkeypatch.setattr(training, "from_accelerator", lambda accelerator: Processes(device=device))
        done = train([*base_arguments, *more, "--max_train_steps", str(NUM_STEPS)])
    assert "skipped" not in done.stderr, "a damaged step is explained, for which values are asked"
    assert done.status == 0, done.stderr
    assert watch.num_reads >= NUM_STEPS - 1
