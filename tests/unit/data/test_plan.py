"""The data plan of a run is immutable; variations are derived plans."""

import dataclasses
import pickle
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.plan.data_plan import DataPlan
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.options.train import TrainOptions
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    content_of,
    options_of,
    plan_of,
    validation_of,
    write_folder,
)


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    write_folder(tmp_path / "2_a", 5, (64, 64), "one, two", seed=1)
    write_folder(tmp_path / "1_b", 3, (96, 64), "three, four", seed=2)
    command = "--resolution 64 --enable_bucket --min_bucket_reso 64 --train_batch_size 2 --caption_extension .txt"
    return options_of(f"{command} --shuffle_caption --validation_split 0.3", "--train_data_dir", str(tmp_path))


def draw_everything(plan: DataPlan) -> list[object]:
    """Return everything that is drawn from a plan."""
    validation = validation_of(plan)
    images = [content_of(batch) for batch in validation.batches(range(validation.num_batches), 0)]
    return [*(content_of(batch) for epoch in (1, 2) for batch in batches_of(plan, epoch)), *images]


def test_deriving_plans_does_not_change_the_original(options: TrainOptions) -> None:
    plan = plan_of(options)
    before, fields = draw_everything(plan), pickle.dumps(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_variants = 3  # type: ignore[misc]
    fixed = plan.with_fixed_captions(3)
    limited, batch_index = plan.limited_to_largest_batch()
    measured, numbers = plan.limited_to_measured(2, list(validation_of(plan).iterate_samples([0])))
    assert fixed.num_variants == 3 and len(numbers) == 2 and batch_index < plan.num_batches
    assert sum(limited.samples.draws_N > 0) == 2 and sum(measured.samples.draws_N > 0) > 2
    latents = cache_latents(limited, averaging_vae(), lambda: "vae", CachingOptions(cache_latents=True), 1)
    (batch,) = open_batches(limited, latents).iterate_epoch(1, [batch_index], lambda index: 0, 0, False)
    assert batch.latents_BCHW is not None and len(latents.memory) == 2
    assert draw_everything(plan) == before and pickle.dumps(plan) == fields


def test_batches_with_and_without_a_cache_agree_side_by_side(options: TrainOptions) -> None:
    plan = plan_of(options)
    plain = open_batches(plan)
    cached = open_batches(
        plan, cache_latents(plan, averaging_vae(), lambda: "vae", CachingOptions(cache_latents=True), 1)
    )
    for from_pixels, from_cache in zip(batches_of(plain), batches_of(cached), strict=True):
        assert from_pixels.keys == from_cache.keys and from_pixels.captions == from_cache.captions
        assert from_pixels.pixels_BCHW is not None and from_pixels.latents_BCHW is None
        assert from_cache.pixels_BCHW is None and from_cache.latents_BCHW is not None


def test_captions_that_change_with_the_step_cannot_be_fixed(options: TrainOptions) -> None:
    plan = plan_of(options.with_values({"token_warmup_step": 3.0}))
    with pytest.raises(UserError, match=r"1_b: --token_warmup_step .*--cache_text_encoder_outputs"):
        plan.with_fixed_captions(2)
