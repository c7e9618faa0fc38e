"""The memory of a measured pipeline, counted on fake tensors, against the allocator's events of the same step."""

from pathlib import Path

import pytest
import torch

import diffusers_train_network
from library.training.command_line.cli import parse
from library.training.models.requests import RequestedRun
from library.training.planning.counting import count_run
from library.training.planning.meta_run import BatchShape
from tests.parity.test_counting import CPU, planned_peak, real_step
from tests.running import SCRIPTS
from tests.tiny.pipelines import build_tiny_pipeline
from tests.unit.memory.planner.made_up import allocated_peak

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_process")]

SHAPE = BatchShape(2, 256, 192)
SHARE = 0.05  # maps and drawings, which are on the CPU, are a part of a tiny model's step


@pytest.mark.parametrize("name", ["AuraFlowPipeline", "StableDiffusionXLPipeline"])
def test_the_planned_step_matches_the_allocator(name: str, tmp_path: Path) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    words = [
        "--pretrained_model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path), "--cache_latents",
        "--mixed_precision", "no", "--network_module", "networks.lora", "--network_dim", "4",
    ]  # fmt: skip
    spec = SCRIPTS["diffusers_train_network"]
    options = spec.options.from_args(parse(diffusers_train_network.setup_parser(), words))
    arch = spec.build(options)
    counted = planned_peak(count_run(RequestedRun.resolve(options, arch), SHAPE, CPU), False)
    torch.manual_seed(94)
    real_step(options, arch, SHAPE, False)()  # reads the maps of this size
    assert counted == pytest.approx(allocated_peak(real_step(options, arch, SHAPE, False)), rel=SHARE)
