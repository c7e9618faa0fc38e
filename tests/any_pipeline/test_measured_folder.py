"""A folder is measured on one block of each list of its denoiser, which gives what the whole denoiser gives."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.any_pipeline.assembly import measure_folder
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.folder import load_shortened, open_folder
from library.architectures.any_pipeline.measuring import measure
from tests.any_pipeline.test_convention import SIZE
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

pytestmark = pytest.mark.slow


def values_of(convention: Convention) -> dict[str, Any]:
    values = {f.name: getattr(convention, f.name) for f in fields(convention)}
    for name in ("takes_batches", "pads", "output", "memory"):  # compared by other tests
        del values[name]
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_one_block_of_each_list_gives_the_convention_of_all(name: str, tmp_path: Path) -> None:
    pipe = build_tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    of_few = measure_folder(folder, folder.build_stage(), "no")
    of_all, _ = measure(watch_pipeline(pipe), SIZE)
    assert values_of(of_few) == values_of(of_all)


def test_a_denoiser_is_shortened_to_the_first_block_of_each_list(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline("AuraFlowPipeline")
    pipe.save_pretrained(tmp_path / "model")
    short: Any = load_shortened(open_folder(str(tmp_path / "model"), False), "transformer")
    whole = pipe.transformer.single_transformer_blocks
    assert len(whole) == 4 and len(short.single_transformer_blocks) == 1
    pairs = zip(short.single_transformer_blocks[0].parameters(), whole[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
