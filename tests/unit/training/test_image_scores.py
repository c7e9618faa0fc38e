"""Scores of drawn images, ranking of adapters, and the correlation of strength and change."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from library.base.errors import UserError
from library.options.output.preview import PreviewOptions
from library.training.evaluation.choosing import MeasuredFile, add_scores, choose_measured, format_scores
from library.training.evaluation.image_scores import (
    AGREEMENT,
    NEAR_COPIES,
    SHARPNESS,
    SIMILARITY,
    Scorer,
    build_scorer,
    load_score_models,
    read_scorer,
)
from library.training.evaluation.preview import crop_references
from library.training.evaluation.strength_response import measure_response, rank_correlation
from library.training.report_page.page import read_data
from library.training.reporting.sample_images import Drawn
from library.training.sweep.ranking import MeasuredAdapter, clearly_worse, format_ranking, rank, rank_and_write
from library.training.sweep.worker import Standing
from tests.hiding import lazily
from tests.tiny.score_models import write_clip, write_dinov2
from tests.unit.training.test_preview import prompt_of
from tools.quickstart.toy_world import QUICKSTART, draw_scene, list_scenes

ndimage, stats = lazily("scipy.ndimage"), lazily("scipy.stats")

TEXTS = ["a red cat", "a dog on a large blue field of grass", "cat"]


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Return an image with broad and fine structure, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (s, s, 0)) * s for s in (1, 4, 16)]
    values = sum(layers)
    return Image.fromarray(np.clip(128 + 45 * values / values.std(), 0, 255).astype(np.uint8))


def shifted(image: Image.Image, share: float) -> Image.Image:
    """Return an image moved to the right by a share of its width; its left edge is repeated."""
    pixels, count = np.asarray(image), round(share * image.width)
    return Image.fromarray(
        np.concatenate([np.repeat(pixels[:, :1], count, axis=1), pixels[:, : -count or None]], axis=1)
    )


def recompressed(image: Image.Image) -> Image.Image:
    file = BytesIO()
    image.resize((image.width * 2, image.height * 2)).save(file, "JPEG", quality=60)
    return Image.open(file)


TRAINED = [scene(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return build_scorer(TRAINED)


def test_a_blurred_image_is_less_sharp(scorer: Scorer) -> None:
    image = scene(20)
    sharp, blurred, flat = scorer.score(
        [image, image.filter(ImageFilter.GaussianBlur(2)), Image.new("RGB", (160, 120), "red")], []
    )[SHARPNESS]
    assert sharp > 10 * blurred > 0 == flat
    # scipy's Laplacian in place of OpenCV's, over the same tiles.
    laplacian = ndimage.laplace(np.asarray(image.convert("L")).astype(np.int32), mode="mirror")
    tiles = [tile for rows in np.array_split(laplacian, 4) for tile in np.array_split(rows, 4, axis=1)]
    assert sharp == pytest.approx(max(tile.var() for tile in tiles))


@pytest.mark.parametrize(
    ("change", "is_copy"),
    [
        (lambda image: image, True),
        (recompressed, True),
        (ImageOps.mirror, True),
        (lambda image: shifted(image, 0.03), True),
        (lambda image: shifted(image, 0.2), False),
        (lambda image: ImageOps.flip(image), False),
        (lambda image: scene(50), False),
    ],
    ids=["exact", "recompressed", "mirrored", "shifted by 3 %", "shifted by 20 %", "upside down", "unrelated"],
)
def test_near_copies_of_training_images_are_found(
    scorer: Scorer, change: Callable[[Image.Image], Image.Image], is_copy: bool
) -> None:
    images = [change(image) for image in TRAINED]
    assert scorer.score(images, [])[NEAR_COPIES] == [float(is_copy)] * len(images)


def test_newly_drawn_hearts_of_the_toy_world_are_near_copies_and_other_shapes_are_not() -> None:
    """The toy world's hearts are too alike for the score to tell memorization from learning: benchmarks/RESULTS.md."""
    toy = build_scorer(Image.open(path).convert("RGB") for path in sorted((QUICKSTART / "dataset").glob("*.png")))
    rng = np.random.default_rng(7)

    def share(shapes: tuple[str, ...]) -> float:
        drawn = [Image.fromarray(draw_scene(scene, rng)) for scene in list_scenes(shapes)]
        return float(np.mean(toy.score(drawn, [])[NEAR_COPIES]))

    assert 0.6 < share(("heart",)) < 0.85 and share(("circle", "cross")) < 0.05


def test_without_models_nothing_else_is_computed(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(scorer.score([scene(1)], ["a cat"])) == {SHARPNESS, NEAR_COPIES}
    plan: Any = object()  # raises if anything is read
    assert read_scorer(PreviewOptions(sample_prompts="a.txt", score_models=["not loaded"]), plan) is None


def test_dinov2_similarity_is_the_mean_cosine_of_class_tokens(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    folder = write_dinov2(tmp_path / "dino")
    images = [scene(seed, 70 + seed, 90) for seed in range(30, 50)]  # more than one batch
    values = build_scorer(TRAINED, load_score_models([str(folder)])).score(images, [])[SIMILARITY]
    model, processor = Dinov2Model.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)

    def tokens(part: list[Image.Image]) -> np.ndarray:
        with torch.no_grad():
            rows = [model(**processor(images=image, return_tensors="pt")).last_hidden_state[0, 0] for image in part]
        return torch.stack(rows).double().numpy()

    drawn, trained = tokens(images), tokens(TRAINED)
    lengths = np.linalg.norm(drawn, axis=1)[:, None] * np.linalg.norm(trained, axis=1)
    assert values == pytest.approx(((drawn @ trained.T) / lengths).mean(1).tolist(), abs=1e-5)
    assert len(set(values)) == len(images)


def test_clip_agreement_is_the_cosine_of_image_and_prompt(tmp_path: Path) -> None:
    """The first model call of transformers computes all pairs at once; a long prompt is cut at CLIP's 77 tokens."""
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = write_clip(tmp_path / "clip")
    images, texts = [scene(seed) for seed in range(20)], [*TEXTS * 6, "cat", "cat " * 200]
    values = build_scorer(TRAINED, load_score_models([str(folder)])).score(images, texts)[AGREEMENT]
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    tokens = CLIPTokenizerFast.from_pretrained(str(folder))(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        pairs = model(**processor(images=images, return_tensors="pt"), **tokens).logits_per_image
        expected = pairs.diagonal() / model.logit_scale.exp()
    assert values == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(value, 6) for value in values}) > 10


def test_models_that_cannot_be_used_are_named_with_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dino, clip = write_dinov2(tmp_path / "dino"), write_clip(tmp_path / "clip")
    assert set(load_score_models([str(dino), str(clip)])) == {"dinov2", "clip"}
    with pytest.raises(UserError, match=rf"--score_models {tmp_path}/dinos does not exist.*dino"):
        load_score_models([f"{tmp_path}/dinos"])
    with pytest.raises(UserError, match=rf"--score_models {dino} is a second dinov2 model"):
        load_score_models([str(dino), str(dino)])
    config = json.loads((dino / "config.json").read_text())
    (dino / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(
        UserError, match=rf"--score_models {dino} is no folder .* config.json is vit, not dinov2 or clip"
    ):
        load_score_models([str(dino)])
    with pytest.raises(UserError, match=r"model\.safetensors is no folder .* is missing, not dinov2 or clip"):
        load_score_models([str(clip / "model.safetensors")])
    (dino / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    with pytest.raises(UserError, match=r"config\.json asks for attn_implementation someone/kernel, code that"):
        load_score_models([str(dino)])
    (dino / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=rf"--score_models {dino} lacks \d+ tensors of the model, such as encoder\.layer\.2"
    ):
        load_score_models([str(dino)])
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=rf"--score_models {clip} cannot be loaded .*preprocessor_config.json"):
        load_score_models([str(clip)])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="--score_models someone/dino is no folder, and cannot be downloaded"):
        load_score_models(["someone/dino"])


def test_files_are_compared_image_by_image() -> None:
    """scipy's paired test gives the same interval at the level of three comparisons."""
    rng = np.random.default_rng(3)
    losses = [torch.full((8,), value).double() for value in (0.4, 0.2, 0.3, 0.25)]
    measured = [MeasuredFile(Path(f"{n}.pt") if n else None, n, losses_G) for n, losses_G in enumerate(losses)]
    values = rng.normal(0.6, 0.2, 12) + rng.normal(0, 0.02, (4, 12)) + np.array([[0], [0.1], [0.12], [0.3]])
    choice = choose_measured(measured)
    assert choice is not None
    scored = add_scores(choice, [{SIMILARITY: row.tolist(), NEAR_COPIES: [0.0] * 12} for row in values])
    for candidate, row in zip(scored.candidates, values, strict=True):
        assert candidate.scores is not None
        score = candidate.scores[SIMILARITY]
        assert score.mean == pytest.approx(row.mean())
        if candidate.step != 1:  # the file with the lowest loss
            expected = stats.ttest_rel(row, values[1]).confidence_interval(1 - 0.05 / 3)
            assert (score.low, score.high) == pytest.approx((expected.low, expected.high))
    head, base, best, *_ = format_scores(scored)
    assert head.split() == ["file", *SIMILARITY.split(), NEAR_COPIES]
    assert base.startswith("before training") and " to " in base
    assert best.split() == ["1.pt", f"{values[1].mean():.4g}", "0"]


def test_reference_images_beside_a_preview_are_not_scored() -> None:
    shown = Image.new("RGB", (100, 8), "red")
    shown.paste(Image.new("RGB", (64, 8), "blue"), (36, 0))
    prompt = replace(prompt_of(width=64, height=8), reference_paths=(Path("before.png"),))
    assert crop_references(Drawn(0, prompt, shown)).getcolors() == [(64 * 8, (0, 0, 255))]
    assert crop_references(Drawn(0, prompt_of(width=100, height=8), shown)).size == (100, 8)


# Ranking the adapters of a sweep; the error rate of "significantly worse" covers repeated looks.


def measured(label: str, losses_G: list[float] | None, ended: str = "") -> MeasuredAdapter:
    return MeasuredAdapter(label, 8, losses_G, ended, f"{label}.safetensors")


def test_adapters_are_sorted_by_loss_with_unmeasured_ones_last() -> None:
    common_G = torch.randn(9, generator=torch.Generator().manual_seed(81), dtype=torch.float64) + 5
    wobble_G = 0.01 * torch.randn(9, generator=torch.Generator().manual_seed(82), dtype=torch.float64)
    ranking = rank(
        [
            measured("unmeasured", None, "its losses were not finite"),
            measured("worse", (common_G + 0.2 + wobble_G).tolist()),
            measured("broken", [nan] * 9),
            measured("close", (common_G + wobble_G).tolist()),
            measured("best", (common_G - 0.0001).tolist()),
        ]
    )
    assert [row.measured.label for row in ranking.rows][2:] == ["worse", "broken", "unmeasured"]
    verdicts = {row.measured.label: row.compared and row.compared.is_worse for row in ranking.rows}
    assert verdicts == {"best": False, "close": False, "worse": True, "broken": True, "unmeasured": None}
    first, second = (row.measured.label for row in ranking.rows[:2])
    assert ranking.verdict == f"{first} has the lowest loss, not significantly lower than {second}"
    lines = format_ranking(ranking)
    assert len(lines) == 6 and lines[3].split()[-1] == "yes" and lines[5].endswith("its losses were not finite")


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([None, None], "nothing is ranked: no adapter has validation losses"),
        ([[1.0], [2.0]], "a single image tells no difference from chance"),
        ([[1.0, 2.0, 3.0], [2.0, 3.1, 4.0]], "a0 is significantly better than every other adapter"),
    ],
)
def test_the_verdict_on_a_ranking(losses: list[list[float] | None], verdict: str) -> None:
    assert rank([measured(f"a{i}", losses_G) for i, losses_G in enumerate(losses)]).verdict.startswith(verdict)


def test_page_and_log_name_the_word_by_which_nothing_is_ranked(tmp_path: Path) -> None:
    losses = {"a": 1.0, "b": 2.0}
    runs = [Standing(label, 8, 8, losses, "", f"{label}.safetensors") for label in ("l1", "l2")]
    lines = rank_and_write(runs, "cat", tmp_path / "cat-sweep.html", ["loss_type"], {}, {})
    verdict = "nothing is ranked: loss_type changes the held-out images or what their losses mean"
    assert lines == [f"sweep: {verdict}; the ranking is {tmp_path / 'cat-sweep.html'}"]
    page = read_data((tmp_path / "cat-sweep.html").read_text(encoding="utf-8"))
    assert page["verdict"] == verdict and all(row["compared"] is None for row in page["rows"])


@pytest.mark.slow
def test_adapters_that_are_equally_good_are_seldom_dropped() -> None:
    """Four adapters that differ by chance alone, ranked 15 times: in at most 5 % of sweeps one is dropped."""
    generator, num_sweeps, dropped = torch.Generator().manual_seed(83), 300, 0
    for _ in range(num_sweeps):
        images_G = torch.randn(10, generator=generator, dtype=torch.float64)
        for look in range(1, 16):
            own_AG = images_G + 0.1 * torch.randn(4, 10, generator=generator, dtype=torch.float64)
            if clearly_worse({str(i): row.tolist() for i, row in enumerate(own_AG)}, 4, look):
                dropped += 1
                break
    assert dropped / num_sweeps <= 0.05 + 0.025  # two standard errors of the share


def test_clearly_worse_or_nan_adapters_are_dropped_and_later_looks_need_more_evidence() -> None:
    images_G = torch.arange(8.0, dtype=torch.float64)
    wobble_G = 0.02 * torch.randn(8, generator=torch.Generator().manual_seed(84), dtype=torch.float64)
    losses = {
        "nan": [1.0] * 7 + [nan],
        "best": images_G.tolist(),
        "worse": (images_G + 0.5 + wobble_G).tolist(),
        "slightly": (images_G + 0.025 + wobble_G).tolist(),
    }
    assert clearly_worse(losses, 4, 1) == ["nan", "worse", "slightly"]
    assert clearly_worse(losses, 4, 40) == ["nan", "worse"]
    assert clearly_worse({"nan": losses["nan"]}, 2, 1) == []


# The rank correlation of an adapter's strength with the change of its images.


def test_without_ties_the_correlation_is_spearmans_formula() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.permutation(9), rng.permutation(9)
    expected = 1 - 6 * float(((x - y) ** 2).sum()) / (9 * (81 - 1))
    assert rank_correlation(x.tolist(), y.tolist()) == pytest.approx(expected)


def test_ties_share_their_mean_rank() -> None:
    expected = np.corrcoef([3.5, 1.0, 3.5, 2.0], [1, 2, 3, 4])[0, 1]
    assert rank_correlation([3.0, 1.0, 3.0, 2.0], [5.0, 6.0, 7.0, 8.0]) == pytest.approx(expected)
    assert np.isnan(rank_correlation([1.0, 2.0], [5.0, 5.0]))


def image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8))


def test_the_change_is_the_position_on_the_line_from_the_first_to_the_last_image() -> None:
    """Changes orthogonal to that line do not count; strengths may come in any order."""
    first, last = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    last[0, 0], across = 200, np.zeros((2, 2, 3))
    across[1, 1] = 90
    shares = {-2.0: 0.0, -1.0: 0.6, 0.0: 0.5, 2.0: 1.0}
    order = [0.0, 2.0, -2.0, -1.0]
    response = measure_response(order, [image(first + shares[s] * (last - first) + across * (s == -1)) for s in order])
    assert list(response.strengths) == [-2.0, -1.0, 0.0, 2.0]
    assert response.changes == pytest.approx([0.0, 0.6, 0.5, 1.0])
    assert response.correlation == pytest.approx(0.8)


def test_equal_images_have_no_correlation() -> None:
    assert np.isnan(measure_response([-1.0, 0.0, 1.0], [image(np.full((2, 2, 3), 7.0))] * 3).correlation)
