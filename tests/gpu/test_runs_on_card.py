"""Every base model trained on a CUDA card in half precision.

`LORA_TEST_DEVICE=cpu` lets the CPU stand in for the card, so that these tests can be tried without one; fp16 is then
left out, because accelerate offers it on cards only.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.running import Finished
from tests.runs.bases import BASES

CPU_STANDS_IN = os.environ.get("LORA_TEST_DEVICE") == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CPU_STANDS_IN or torch.cuda.is_available()), reason="needs a CUDA card"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", BASES)
def test_trains_in_half_precision(
    name: str,
    precision: str,
    base_arguments: list[str],
    tmp_path: Path,
    train: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if CPU_STANDS_IN:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # else accelerate takes a card where there is one
        if precision == "fp16":
            pytest.skip("fp16 needs a card")
    base = BASES[name]
    arguments = [*base_arguments, *base.build(tmp_path / "model"), "--network_module", base.module]
    if not base.adapts_text_encoders:
        arguments.append("--network_train_unet_only")
    done = train([*arguments, "--mixed_precision", precision, "--gradient_checkpointing"], script=base.script)
    assert done.status == 0, done.stderr
    assert len(done.losses) == 4 and all(math.isfinite(loss) for loss in done.losses)
    saved = load_file(tmp_path / "out" / "mine.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    assert any(weight.any() for key, weight in saved.items() if "lora_up" in key)
