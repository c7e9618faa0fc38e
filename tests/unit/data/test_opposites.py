"""Image pairs of opposite_dir and of prompts: matched, augmented alike and checked before any model is loaded."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from library.base.errors import UserError
from library.base.randomness import random_for
from library.data.caching.latents import cache_latents
from library.data.concepts.prompt_pairs import PromptPairs, draw_size, open_prompt_pairs, size_conditioning
from library.data.concepts.prompts_file import PromptPair
from library.data.plan.data_plan import DataPlan
from library.data.training_data import open_batches
from library.options.caching import CachingOptions
from library.options.dataset import DatasetOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.run import RunOptions
from library.protocols import LatentSpec
from library.types import Batch, Concept
from tests.unit.data import builders
from tests.unit.data.builders import (
    averaging_vae,
    batches_of,
    plan_of,
    validation_of,
    write_config,
    write_folder,
    write_image,
)

HEAD = "[[datasets]]\nresolution = 64\nbatch_size = 2\ncaption_extension = '.txt'\n"
SUBSET = "[[datasets.subsets]]\nimage_dir = '{here}/good'\n"
PAIR = "opposite_dir = '{here}/bad'\n"


def plan(
    folder: Path,
    keys: str = PAIR,
    head: str = HEAD,
    more: str = "",
    trains: str = "dpo",
    spec: LatentSpec = builders.SPEC,
) -> DataPlan:
    options = write_config(folder / "data.toml", f"{head}{SUBSET}{keys}{more}")
    return plan_of(options.with_values({"preference_loss": trains or None}), spec=spec)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Write two images with partners of other sizes, one of them in another format."""
    write_folder(tmp_path / "good", 2)
    write_image(tmp_path / "bad" / "p0.png", (96, 96), seed=7)
    write_image(tmp_path / "bad" / "p1.webp", (32, 64), seed=8)
    return tmp_path


def test_an_image_is_paired_with_the_one_of_its_name_resized_to_it(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Base models without reference images can train pairs; partners are in the order of their images."""
    write_image(pairs / "bad" / "p2.png")
    data_plan = plan(pairs)
    with caplog.at_level(logging.INFO):
        data_plan.audit(logging.getLogger("audit"))
    (batch,) = batches_of(data_plan)
    partners = {
        sample.image.key: [Path(reference.key).name for reference in sample.image.references]
        for sample in data_plan.samples
    }
    assert [partners[key] for key in batch.keys] == [
        [Path(key).stem + (".png" if key.endswith("p0.png") else ".webp")] for key in batch.keys
    ]
    assert batch.pixels_BCHW is not None and len(batch.reference_pixels) == 1
    assert batch.reference_pixels[0].shape == batch.pixels_BCHW.shape == (2, 3, 64, 64)
    assert "one partner in" in caplog.text and "1 reference image without an image of its name" in caplog.text
    assert "1 image with a reference image of another aspect ratio, which is cropped to theirs: p1.png" in caplog.text


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_cached_partners_are_sampled_with_the_noise_of_their_images(pairs: Path, to_disk: bool) -> None:
    """Both images of a pair get the same noise, which otherwise would tell the preferred from the rejected one."""
    data_plan = plan(pairs, f"{PAIR}flip_aug = true\n")
    options = CachingOptions(cache_latents=True, cache_latents_to_disk=to_disk)
    cached, encode = (
        open_batches(data_plan, cache_latents(data_plan, averaging_vae(), lambda: "vae", options, 1)),
        averaging_vae(),
    )
    for epoch in (1, 2):
        for plain, stored in zip(batches_of(data_plan, epoch), batches_of(cached, epoch), strict=True):
            noise = stored.latents_BCHW - encode(plain.pixels_BCHW, None)
            assert 0.008 < float(noise.std()) < 0.012
            torch.testing.assert_close(stored.reference_latents[0] - encode(plain.reference_pixels[0], None), noise)


def test_a_partner_is_opaque_where_the_alpha_channel_of_its_image_is_a_mask(tmp_path: Path) -> None:
    """For a base model that encodes alpha channels, in the step and cached."""
    for folder, seed in (("good", 1), ("bad", 2)):
        for path in write_folder(tmp_path / folder, 2, seed=seed).glob("*.png"):
            with Image.open(path) as image:
                image.putalpha(60)
                image.save(path)
    spec, average = replace(builders.SPEC, has_alpha=True), averaging_vae()

    def encode(pixels_BCHW: torch.Tensor, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        return average(pixels_BCHW[:, 1:], generators)  # three channels, among them alpha

    for is_mask in (False, True):
        keys = f"{PAIR}alpha_mask = {str(is_mask).lower()}\n"
        data_plan = plan(tmp_path, keys, spec=spec)
        options = CachingOptions(cache_latents=True)
        cached = open_batches(data_plan, cache_latents(data_plan, encode, lambda: "vae", options, 1))
        for plain, stored in zip(batches_of(data_plan), batches_of(cached), strict=True):
            assert (plain.reference_pixels[0][:, 3] == 1).all() == is_mask
            noise = stored.latents_BCHW - encode(plain.pixels_BCHW, None)
            torch.testing.assert_close(stored.reference_latents[0] - encode(plain.reference_pixels[0], None), noise)


def test_text_encoders_that_see_references_do_not_see_partners(pairs: Path) -> None:
    data_plan = plan(pairs)
    assert not data_plan.has_references
    seen = data_plan.with_fixed_captions(1).with_seen_references()
    assert [list(row) for row in seen.caption_texts()] == [["a tag 0"], ["a tag 1"]]


def test_a_cache_entry_with_a_reference_image_is_not_used_for_a_pair(
    pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference of an edit model is encoded without noise."""
    calls: list[int] = []

    def cache(data_plan: DataPlan) -> int:
        calls.clear()
        options = CachingOptions(cache_latents=True, cache_latents_to_disk=True)
        cache_latents(data_plan, averaging_vae(calls), lambda: "vae", options, 1)
        return sum(calls)

    edit = write_config(pairs / "edit.toml", f"{HEAD}{SUBSET}control_dirs = '{{here}}/bad'\n")
    spec = replace(builders.SPEC, max_references=1)
    assert cache(plan_of(edit, spec=spec)) == 4
    with caplog.at_level(logging.INFO):
        assert cache(plan(pairs)) == 4
    assert "2 stale (2 made with a reference image where the partner of a pair is needed" in caplog.text
    assert cache(plan(pairs)) == 0
    assert cache(plan_of(write_config(pairs / "plain.toml", f"{HEAD}{SUBSET}"))) == 0, "the image is the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"opposite_dir .*bad: 1 of 2 images do not have exactly one partner of their name there: .*p1.png"),
        ("twice", r"1 of 2 images do not have exactly one partner of their name there: .*p1.png"),
        ("equal", r"opposite_dir .*bad: 1 image equal to the partner, which teaches nothing: .*p0.png"),
        ("folder", r"opposite_dir .*bad is not a folder"),
        ("damaged", r"1 partner cannot be read: .*p0.png is not an image"),
    ],
)
def test_images_without_exactly_one_valid_partner_are_refused_by_name(pairs: Path, change: str, message: str) -> None:
    if change == "missing":
        (pairs / "bad" / "p1.webp").unlink()
    elif change == "twice":
        write_image(pairs / "bad" / "p1.png")
    elif change == "equal":
        (pairs / "bad" / "p0.png").write_bytes((pairs / "good" / "p0.png").read_bytes())
    elif change == "folder":
        (pairs / "bad").rename(pairs / "worse")
    else:
        (pairs / "bad" / "p0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=message):
        plan(pairs)


@pytest.mark.parametrize("keys", ["control_dirs = '{here}/bad'", "control_resolution = 64", "is_reg = true"])
def test_keys_that_do_not_work_with_pairs_are_refused(pairs: Path, keys: str) -> None:
    with pytest.raises(UserError, match=rf"{keys.split()[0]} does not work with opposite_dir"):
        plan(pairs, PAIR + keys)


def test_output_preservation_does_not_work_with_pairs(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"diff_output_preservation trains toward the base model's own predictions"):
        plan(pairs, PAIR + "custom_attributes = {diff_output_preservation = true}")


def test_pairs_require_preference_loss_and_vice_versa(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"has opposite_dir, whose pairs are trained with --preference_loss dpo or"):
        plan(pairs, trains="")
    with pytest.raises(
        UserError, match=r"good has no pairs, which --preference_loss and --pair_slider train: set oppo"
    ):
        plan(pairs, "")
    write_folder(pairs / "other", 1)
    more = "\n[[datasets.subsets]]\nimage_dir = '{here}/other'\n"
    with pytest.raises(UserError, match=r"other has no pairs"):
        plan(pairs, more=more)
    data_plan = plan(pairs, more=f"{more}is_forgetting_probe = true\n")
    assert validation_of(data_plan).of_probe(True).num_images == 1, "a probe is measured as it is"


def test_metadata_files_are_paired_by_folder_and_not_by_control_path(pairs: Path) -> None:
    table = {f"{pairs.as_posix()}/good/p{i}.png": {"caption": "x"} for i in range(2)}
    (pairs / "meta.json").write_text(json.dumps(table))
    head = HEAD.replace("caption_extension = '.txt'\n", "")
    data_plan = plan(pairs, f"metadata_file = '{{here}}/meta.json'\n{PAIR}", head)
    assert all(len(sample.image.references) == 1 for sample in data_plan.samples)
    for entry in table.values():
        entry["control_path"] = f"{pairs.as_posix()}/bad/p0.png"
    (pairs / "meta.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"with control_path, and the subset has opposite_dir; keep one of them"):
        plan(pairs, f"metadata_file = '{{here}}/meta.json'\n{PAIR}", head)


# Batches of prompt pairs: their order, random values and metadata.

WORD_PAIR = PromptPair(
    place="prompts.toml, [[prompts]] number 1", target="van gogh", positive="van gogh", unconditional="", neutral="art",
    action="erase", guidance_scale=1.5, height=512, width=768, dynamic_resolution=False, batch_size=3,
    dynamic_crops=False, multiplier=-2.0, weight=0.5,
)  # fmt: skip


def pairs_of(*pairs: PromptPair, seed: int = 7, num_batches: int = 400, steps: int = 10) -> PromptPairs:
    return PromptPairs(pairs, steps, 2.5, "a/prompts.toml", seed, num_batches, num_batches)


def pair_batches_of(data: PromptPairs, count: int | None = None) -> Iterator[Batch]:
    return data.iterate_epoch(1, range(data.num_batches if count is None else count), lambda index: index, 0, False)


def concept_of(batch: Batch) -> Concept:
    assert batch.concept is not None
    return batch.concept


def test_a_batch_has_the_values_of_its_pair() -> None:
    (batch,) = pair_batches_of(pairs_of(WORD_PAIR), 1)
    assert batch.captions == ["van gogh"] * 3 and batch.height_width == (512, 768)
    assert batch.loss_weights_B.tolist() == [0.5] * 3
    assert batch.sizes_B6.tolist() == [[512, 768, 0, 0, 512, 768]] * 3
    concept = concept_of(batch)
    assert (concept.positive, concept.unconditional, concept.neutral) == ("van gogh", "", "art")
    assert (concept.push, concept.multiplier, concept.num_steps, concept.guidance) == (-1.5, -2.0, 10, 2.5)


def test_every_pair_is_drawn_once_per_round_in_varying_order() -> None:
    pairs = [replace(WORD_PAIR, target=name) for name in "abcde"]
    order = [batch.captions[0] for batch in pair_batches_of(pairs_of(*pairs), 50)]
    rounds = ["".join(order[first : first + 5]) for first in range(0, 50, 5)]
    assert all(sorted(targets) == list("abcde") for targets in rounds)
    assert len(set(rounds)) > 5


def test_the_number_of_denoising_steps_is_uniform_below_the_maximum() -> None:
    """Each of nine counts is binomial with mean 111 and standard deviation 9.9; allow four standard deviations."""
    counts = Counter(concept_of(batch).num_denoised for batch in pair_batches_of(pairs_of(WORD_PAIR, num_batches=1000)))
    assert sorted(counts) == list(range(1, 10))
    assert all(abs(count - 1000 / 9) < 40 for count in counts.values())


def test_a_batch_depends_only_on_the_seed_and_its_index() -> None:
    varied = replace(WORD_PAIR, width=512, dynamic_resolution=True, dynamic_crops=True)
    data = pairs_of(varied)
    sizes = [batch.sizes_B6.tolist() for batch in pair_batches_of(data, 20)]
    (again,) = data.iterate_epoch(1, [13], lambda index: index, 0, False)
    assert again.sizes_B6.tolist() == sizes[13]
    assert [batch.sizes_B6.tolist() for batch in pair_batches_of(pairs_of(varied, seed=8), 20)] != sizes


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
    small, large = replace(WORD_PAIR, batch_size=1), replace(WORD_PAIR, batch_size=2)
    preserved = replace(large, action="preserve")
    data, index = pairs_of(small, large, preserved).limited_to_largest_batch()
    (batch,) = data.iterate_epoch(1, [index], lambda p: p, 0, False)
    assert len(batch.keys) == 2 and concept_of(batch).push and concept_of(batch).num_denoised == 9


def test_metadata_lists_the_prompts_like_sd_scripts() -> None:
    data = pairs_of(*(replace(WORD_PAIR, target=f"é{n}") for n in range(20)))
    metadata = data.metadata(DatasetOptions(), 1)
    assert (metadata["ss_leco_prompt_count"], metadata["ss_leco_prompts_file"]) == (20, "prompts.toml")
    preview = json.loads(metadata["ss_leco_preview"])
    assert len(preview) == 16 and "é0" in metadata["ss_leco_preview"]
    assert preview[0] == {
        "target": "é0", "positive": "van gogh", "unconditional": "", "neutral": "art", "action": "erase",
        "multiplier": -2.0, "weight": 0.5,
    }  # fmt: skip


def test_the_identity_depends_on_the_prompts_but_not_on_the_path() -> None:
    here = pairs_of(WORD_PAIR).identity
    assert pairs_of(replace(WORD_PAIR, place="elsewhere.toml")).identity == here
    assert pairs_of(replace(WORD_PAIR, neutral="a photo")).identity != here
    assert pairs_of(replace(WORD_PAIR, batch_size=1)).identity != here


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
