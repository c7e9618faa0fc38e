"""No step of any base model uses an operation that torch's deterministic mode refuses on a GPU.

The planner runs every operation of a step on fake tensors; those of attention depend on the GPU, see
`library.base.determinism.deterministic_attention`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.base.determinism import deterministic_mode
from library.memory.planner import counter
from library.training.models.requests import RequestedRun
from library.training.planning import counting
from library.training.planning.counting import count_run
from library.training.planning.meta_run import BatchShape
from tests import nondeterministic_operations
from tests.nondeterministic_operations import REFUSED, is_refused, listed_by_torch
from tests.parity.tiny_models import opened_with
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES

CPU = torch.device("cpu")


def test_the_table_has_every_operation_that_torch_lists() -> None:
    listed = listed_by_torch()
    assert len(listed) > 20 and set(listed) <= set(REFUSED), "torch lists others: add their operations of aten"
    for name in nondeterministic_operations.names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        assert overload in ("", *getattr(torch.ops.aten, packet).overloads())


@pytest.mark.usefixtures("fresh_process")  # reading options configures logging
@pytest.mark.parametrize("name", first_is_fast(["flux", *(name for name in BASES if name != "flux")]))
def test_no_step_uses_an_operation_without_a_deterministic_form(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[tuple[Any, torch.dtype]] = set()
    run_operation = counter.run_operation

    def recorded(func: Any, args: Any, kwargs: Any) -> Any:
        if torch.are_deterministic_algorithms_enabled():  # not where a base model has switched the mode off
            used.update((func, tensor.dtype) for tensor in args[:1] if isinstance(tensor, Tensor))
        return run_operation(func, args, kwargs)

    monkeypatch.setattr(counter, "run_operation", recorded)
    # Previews are drawn outside of deterministic mode.
    monkeypatch.setattr(counting, "count_preview", lambda *arguments: None)
    options, arch = opened_with(name, [*BASES[name].build(tmp_path / "model"), *trained(name)])
    with deterministic_mode(True):
        count_run(RequestedRun.resolve(options, arch), BatchShape(2, 128, 128), CPU)
    packets = {func._schema.name for func, _ in used}
    assert "aten::mm" in packets and any("attention" in packet for packet in packets) and len(packets) > 40
    assert [func for func, dtype in used if is_refused(func, dtype)] == []


def trained(name: str) -> list[str]:
    return ["--gradient_checkpointing", "--masked_loss", *(["--min_snr_gamma", "5"] if name.startswith("sd") else [])]


def test_a_refused_operation_would_be_found() -> None:
    cumsum, pad = torch.ops.aten.cumsum.default, torch.ops.aten.reflection_pad2d_backward.default
    assert is_refused(cumsum, torch.float32) and not is_refused(cumsum, torch.int64) and is_refused(pad, torch.float32)
    assert is_refused(torch.ops.aten.median.dim, torch.float32)
    assert not is_refused(torch.ops.aten.median.default, torch.float32)
