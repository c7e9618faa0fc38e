"""Scores of drawn images, compared with constructed images and with direct calls of transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage, stats

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
from library.training.reporting.sample_images import Drawn
from tests.tiny.score_models import write_clip, write_dinov2
from tests.unit.training.test_preview import prompt_of
from tools.quickstart.toy_world import QUICKSTART, draw_scene, list_scenes

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
