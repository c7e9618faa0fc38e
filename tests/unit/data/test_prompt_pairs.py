"""Batches of prompt pairs: their order, random values and metadata."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.base.randomness import random_for
from library.data.concepts.prompt_pairs import PromptPairs, draw_size, open_prompt_pairs, size_conditioning
from library.data.concepts.prompts_file import PromptPair
from library.options.dataset import DatasetOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.run import RunOptions
from library.types import Batch, Concept

PAIR = PromptPair(
    place="prompts.toml, [[prompts]] number 1", target="van gogh", positive="van gogh", unconditional="", neutral="art",
    action="erase", guidance_scale=1.5, height=512, width=768, dynamic_resolution=False, batch_size=3,
    dynamic_crops=False, multiplier=-2.0, weight=0.5,
)  # fmt: skip


def pairs_of(*pairs: PromptPair, seed: int = 7, num_batches: int = 400, steps: int = 10) -> PromptPairs:
    return PromptPairs(pairs, steps, 2.5, "a/prompts.toml", seed, num_batches, num_batches)


def batches_of(data: PromptPairs, count: int | None = None) -> Iterator[Batch]:
    return data.iterate_epoch(1, range(data.num_batches if count is None else count), lambda index: index, 0, False)


def concept_of(batch: Batch) -> Concept:
    assert batch.concept is not None
    return batch.concept


def test_a_batch_has_the_values_of_its_pair() -> None:
    (batch,) = batches_of(pairs_of(PAIR), 1)
    assert batch.captions == ["van gogh"] * 3 and batch.height_width == (512, 768)
    assert batch.loss_weights_B.tolist() == [0.5] * 3
    assert batch.sizes_B6.tolist() == [[512, 768, 0, 0, 512, 768]] * 3
    concept = concept_of(batch)
    assert (concept.positive, concept.unconditional, concept.neutral) == ("van gogh", "", "art")
    assert (concept.push, concept.multiplier, concept.num_steps, concept.guidance) == (-1.5, -2.0, 10, 2.5)


def test_every_pair_is_drawn_once_per_round_in_varying_order() -> None:
    pairs = [replace(PAIR, target=name) for name in "abcde"]
    order = [batch.captions[0] for batch in batches_of(pairs_of(*pairs), 50)]
    rounds = ["".join(order[first : first + 5]) for first in range(0, 50, 5)]
    assert all(sorted(targets) == list("abcde") for targets in rounds)
    assert len(set(rounds)) > 5


def test_the_number_of_denoising_steps_is_uniform_below_the_maximum() -> None:
    """Each of nine counts is binomial with mean 111 and standard deviation 9.9; allow four standard deviations."""
    counts = Counter(concept_of(batch).num_denoised for batch in batches_of(pairs_of(PAIR, num_batches=1000)))
    assert sorted(counts) == list(range(1, 10))
    assert all(abs(count - 1000 / 9) < 40 for count in counts.values())


def test_a_batch_depends_only_on_the_seed_and_its_index() -> None:
    varied = replace(PAIR, width=512, dynamic_resolution=True, dynamic_crops=True)
    data = pairs_of(varied)
    sizes = [batch.sizes_B6.tolist() for batch in batches_of(data, 20)]
    (again,) = data.iterate_epoch(1, [13], lambda index: index, 0, False)
    assert again.sizes_B6.tolist() == sizes[13]
    assert [batch.sizes_B6.tolist() for batch in batches_of(pairs_of(varied, seed=8), 20)] != sizes


def test_dynamic_resolution_draws_sides_from_half_to_full_in_steps_of_64() -> None:
    sides = {draw_size(512, random_for(1, "size", n)) for n in range(300)}
    assert {side for size in sides for side in size} == {256, 320, 384, 448, 512}
    assert len(sides) == 25
    assert {draw_size(64, random_for(1, "size", n)) for n in range(20)} == {(64, 64)}


def test_dynamic_crops_are_inside_an_image_up_to_three_times_as_large() -> None:
    conditionings = [size_conditioning(512, 768, random_for(1, "crop", n)) for n in range(300)]
    for height, width, top, left, *target in conditionings:
        assert target == [512, 768]
        assert 512 <= height < 3 * 512 and 768 <= width < 3 * 768
        assert 0 <= top <= max(0, height - 512) and 0 <= left <= max(0, width - 768)
    assert max(top for _, _, top, *_ in conditionings) > 700


def test_the_largest_batch_has_the_most_pixels_predictions_and_denoising_steps() -> None:
    small, large = replace(PAIR, batch_size=1), replace(PAIR, batch_size=2)
    preserved = replace(large, action="preserve")
    data, index = pairs_of(small, large, preserved).limited_to_largest_batch()
    (batch,) = data.iterate_epoch(1, [index], lambda p: p, 0, False)
    assert len(batch.keys) == 2 and concept_of(batch).push and concept_of(batch).num_denoised == 9


def test_metadata_lists_the_prompts_like_sd_scripts() -> None:
    data = pairs_of(*(replace(PAIR, target=f"é{n}") for n in range(20)))
    metadata = data.metadata(DatasetOptions(), 1)
    assert (metadata["ss_leco_prompt_count"], metadata["ss_leco_prompts_file"]) == (20, "prompts.toml")
    preview = json.loads(metadata["ss_leco_preview"])
    assert len(preview) == 16 and "é0" in metadata["ss_leco_preview"]
    assert preview[0] == {
        "target": "é0", "positive": "van gogh", "unconditional": "", "neutral": "art", "action": "erase",
        "multiplier": -2.0, "weight": 0.5,
    }  # fmt: skip


def test_the_identity_depends_on_the_prompts_but_not_on_the_path() -> None:
    here = pairs_of(PAIR).identity
    assert pairs_of(replace(PAIR, place="elsewhere.toml")).identity == here
    assert pairs_of(replace(PAIR, neutral="a photo")).identity != here
    assert pairs_of(replace(PAIR, batch_size=1)).identity != here


def open_pairs(text: str, folder: Path, tells_sizes: bool = True) -> PromptPairs:
    path = folder / "prompts.toml"
    path.write_text(text)
    arch: Any = SimpleNamespace(
        preview=SimpleNamespace(defaults=SimpleNamespace(size_step=8)),
        text=SimpleNamespace(count_tokens=lambda text: len(text.split()), max_tokens=3),
        tells_sizes=tells_sizes,
    )
    run = RunOptions(max_train_steps=5, gradient_accumulation_steps=3)
    return open_prompt_pairs(ConceptOptions(str(path), 40, 3.0), run, arch, 1, 2)


def test_a_run_is_one_epoch_of_all_batches(tmp_path: Path) -> None:
    assert open_pairs('[[prompts]]\ntarget = "x"\n', tmp_path).num_batches == 5 * 3 * 2


@pytest.mark.parametrize(("side", "near"), [(500, 496), (32, 64)])
def test_a_size_that_the_model_cannot_generate_is_refused(tmp_path: Path, side: int, near: int) -> None:
    with pytest.raises(
        ValueError, match=f"resolution has a side of {side}; use {near}, at least 64 and a multiple of 8"
    ):
        open_pairs(f'[[prompts]]\ntarget = "x"\nresolution = {side}\n', tmp_path)


def test_truncated_prompts_and_options_without_effect_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_pairs('[[prompts]]\ntarget = "one two three four"\ndynamic_crops = true\n', tmp_path, tells_sizes=False)
    crops, cut = (record.message for record in caplog.records)
    assert "dynamic_crops has no effect: the base model has no size input" in crops
    assert "a prompt has 4 tokens, of which only the first 3 are used: one two three four" in cut
