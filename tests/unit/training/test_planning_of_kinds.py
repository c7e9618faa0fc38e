"""Adapters of every kind are counted for every base model."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from library.memory.planner import counter
from library.training.models.requests import RequestedRun
from library.training.planning.counting import count_run
from library.training.planning.meta_run import BatchShape
from networks.core.registry.layouts import list_kinds
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

KINDS = sorted(kind.network_module for kind in list_kinds() if kind.network_module)
FAST = "sd"  # which has convolutions
WORDS = ("--cache_latents", "--network_train_unet_only", "--mixed_precision", "bf16")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if name == FAST else pytest.mark.slow)
        for kind, name in itertools.product(KINDS, BASES)
    ],
)
def test_adapters_of_every_kind_are_counted_on_one_device(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.15 refuses operations on fake tensors of two devices; older versions count too little."""
    run_operation = counter.run_operation

    def run_on_one_device(func: Any, args: Any, kwargs: Any) -> Any:
        assert not any(tensor.is_meta for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor))
        return run_operation(func, args, kwargs)

    monkeypatch.setattr(counter, "run_operation", run_on_one_device)
    options, arch = opened_with(name, [*BASES[name].build(tmp_path / "model"), *WORDS])
    convolutions = ["conv_dim=4"] if name == FAST and "oft" not in kind else []
    options = options.with_values({"network_module": kind, "network_args": convolutions})
    step = count_run(
        RequestedRun.resolve(options, arch), BatchShape(*BASES[name].count_shape), torch.device("cpu")
    ).step
    assert step.gradient_bytes > 0 and step.optimizer.state >= 2 * step.gradient_bytes
