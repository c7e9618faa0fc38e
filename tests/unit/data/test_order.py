"""The order and number of draws, and the plan of a run."""

import dataclasses
import logging
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.base.errors import UserError
from library.data.caching.latents import cache_latents
from library.data.plan import samples
from library.data.plan.data_plan import DataPlan
from library.data.plan.order import Bucket, epoch_batches, regularisation_repeats
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

BUCKETS = (
    Bucket(0, (64, 64), 4, tuple(range(10))),
    Bucket(0, (64, 128), 4, tuple(range(10, 15))),
    Bucket(1, (64, 64), 3, (15, 16, 17)),
)


def test_every_epoch_has_every_draw_once_and_each_batch_one_bucket():
    for epoch in (1, 2, 3):
        batches = epoch_batches(BUCKETS, seed=4, epoch=epoch)
        assert Counter(draw for batch in batches for draw in batch) == Counter(range(18))
        assert sorted(len(batch) for batch in batches) == [1, 2, 3, 4, 4, 4]
        assert all(any(set(batch) <= set(bucket.draws) for bucket in BUCKETS) for batch in batches)


def test_the_order_depends_only_on_seed_and_epoch():
    first = epoch_batches(BUCKETS, seed=4, epoch=2)
    epoch_batches(BUCKETS, seed=4, epoch=7)
    assert epoch_batches(BUCKETS, seed=4, epoch=2) == first
    assert epoch_batches(BUCKETS, seed=4, epoch=3) != first != epoch_batches(BUCKETS, seed=5, epoch=2)


def test_each_epoch_shuffles_the_batches_and_the_draws_within_each_bucket():
    """Buckets of one draw show only the order of batches; a bucket of one batch shows only that of its draws."""
    single = [Bucket(0, (64, 64 * i), 4, (i,)) for i in range(1, 9)]
    whole = [Bucket(0, (64, 64 * i), 8, tuple(range(8))) for i in (1, 2)]
    assert len({tuple(epoch_batches(single, 4, epoch)) for epoch in range(1, 6)}) == 5
    orders = [order for epoch in range(1, 6) for order in epoch_batches(whole, 4, epoch)]
    assert len(set(orders)) == 10, "also buckets of equal draws have orders of their own"
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(8))}
    assert [bucket.num_batches for bucket in BUCKETS] == [3, 2, 1]


@pytest.mark.parametrize(
    ("num_train_draws", "repeats", "expected"),
    [
        (4, [1], [4]),
        (10, [1, 1, 1], [4, 3, 3]),
        (5, [2, 2, 2, 2], [2, 2, 2, 0]),  # the third image exceeds the required sum
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
        (0, [3, 1], [0, 0]),
        (7, [], []),
    ],
)
def test_regularisation_images_are_repeated_until_there_are_enough(num_train_draws, repeats, expected):
    assert regularisation_repeats(num_train_draws, repeats) == expected


@given(st.integers(0, 60), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_regularisation_exceeds_the_training_draws_by_less_than_one_image(num_train_draws, repeats):
    used = regularisation_repeats(num_train_draws, repeats)
    assert sum(used) >= num_train_draws
    assert sum(used) - num_train_draws < max(repeats)


# The length of an epoch is limited, because its whole order is built at once.


@pytest.mark.parametrize("has_regularisation", [False, True])
def test_an_epoch_that_is_too_long_is_refused_before_it_is_ordered(tmp_path: Path, has_regularisation: bool) -> None:
    write_folder(tmp_path / "data/1000000000_cat", 2)
    write_folder(tmp_path / "reg/1_cat", 1)
    reg = ["--reg_data_dir", str(tmp_path / "reg")] if has_regularisation else []
    with pytest.raises(UserError, match="num_repeats: an epoch would have 2000000000 samples, more than 10000000"):
        plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path / "data"), *reg))


def test_a_long_epoch_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(samples, "MANY_DRAWS", 100)
    write_folder(tmp_path / "data/60_cat", 2)
    with caplog.at_level(logging.WARNING):
        assert plan_of(options_of("--resolution 64 --train_data_dir", str(tmp_path / "data"))).num_batches == 120
    assert "an epoch has 120 samples; ordering them before it starts" in caplog.text


# The data plan of a run is immutable; variations are derived plans.


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
