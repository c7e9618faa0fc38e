"""Steps whose host runs ahead of the card, and steps that the card repeats from a record."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.memory.offload.readback import Readback
from library.training.loop.ahead import Ahead, CardCopies
from library.training.reporting.step_times import StepTimes
from tests.gpu.card import CARD_ONLY, DEVICE, ON_CARD
from tests.running import Finished
from tests.runs.bases import BASES
from tests.unit.training.test_loop import batch_of

pytestmark = [*ON_CARD, CARD_ONLY]
# Both ways run the same kernels but for learning rates, which a record reads in float32.
OF_CHANGE = 1e-3
Train = Callable[..., Finished]


@pytest.mark.parametrize("name", [name for name in BASES if name != "lumina"])
def test_a_recorded_run_trains_what_the_plain_one_trains(
    name: str, base_arguments: list[str], tmp_path: Path, train: Train
) -> None:
    base = BASES[name]
    arguments = [
        *base_arguments, *base.build(tmp_path / "model"), "--network_module", base.module, "--network_train_unet_only",
        "--cache_latents", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--mixed_precision",
        "bf16", "--deterministic", "--max_train_steps", "8",
    ]  # fmt: skip
    plain = train([*arguments, "--output_name", "plain"], script=base.script)
    recorded = train([*arguments, "--output_name", "recorded", "--cuda_graphs"], script=base.script)
    assert plain.status == recorded.status == 0, plain.stderr + recorded.stderr
    one, other = (load_file(tmp_path / "out" / f"{part}.safetensors") for part in ("plain", "recorded"))
    ups = [key for key in one if "lora_up" in key]
    off = torch.cat([(one[key] - other[key]).float().flatten() for key in ups]).norm()
    size = torch.cat([one[key].float().flatten() for key in ups]).norm()
    assert size > 0 and off <= OF_CHANGE * size


def test_batches_that_are_copied_meanwhile_arrive_whole() -> None:
    given = [replace(batch_of(float(i)), latents_BCHW=torch.full((1, 4, 512, 512), float(i))) for i in range(8)]
    ahead = Ahead(iter(given), len(given), CardCopies(DEVICE, ()), StepTimes(DEVICE))
    matrix, found = torch.randn(4096, 4096, device=DEVICE), []
    for batch in ahead:
        assert batch.latents_BCHW is not None and batch.latents_BCHW.device.type == "cuda"
        matrix @ matrix  # the card is busy while the next batch comes
        found.append(Readback(torch.stack([batch.latents_BCHW.amin(), batch.latents_BCHW.amax()])))
        ahead.fetch()
    assert [readback.read() for readback in found] == [[float(i), float(i)] for i in range(8)]
