"""Scores of drawn images: sharpness and near-copies of training images, which need no model, and similarity to the
training images and agreement with the prompt, which need models that the user names.

All run on the CPU in float32, so that they take no GPU memory and change nothing in a run.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from library.base.errors import UserError, about
from library.base.progress import progress_bar
from library.checkpoints.model_lookup import HUB_NAME, existing, fetch_snapshot, read_model_config
from library.data.decoding.images import apply_placement, crop_at_centre, read_pixels, with_alpha
from library.data.plan.audit_findings import MOST_BITS
from library.data.plan.audit_pixels import HASH_BITS, HASH_SIDE, measure_sharpness, perceptual_hash
from library.data.plan.data_plan import DataPlan
from library.options.output.preview import PreviewOptions
from library.training.evaluation.without_side_effects import random_streams_kept
from library.training.reporting.sample_images import composite_on_white

logger = logging.getLogger(__name__)

FLAG = "--score_models"
SHARPNESS, NEAR_COPIES, SIMILARITY, AGREEMENT = "sharpness", "near-copies", "DINOv2 similarity", "CLIP agreement"
MOST_COMPARED = 500  # training images; DINOv2 base takes 46 GFLOP for each
MARGIN = 4  # of 128 pixels: on the toy world a shift by 1.6 % changes up to 18 bits, so that copies are searched ...
SHIFTS = range(-MARGIN, MARGIN + 1, 2)  # ... for at shifts of up to 3 % each way
BATCH_SIZE = 16
SMALL_FILES = ("config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.json", "merges.txt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that the hub has

Scores = Mapping[str, Sequence[float]]
"""One value for each image, by the name of the score."""


@dataclass(frozen=True)
class ScoreModel:
    """A model of transformers with its image processor, and for CLIP its tokenizer."""

    model: Any
    processor: Any
    tokenizer: Any = None

    def features(self, images: Iterable[Image.Image]) -> Tensor:
        """Return the class tokens of DINOv2 after its last norm, normalised, shape ND."""
        classes = [self.model(**batch).pooler_output for batch in self._batches(images)]
        return torch.nn.functional.normalize(torch.cat(classes), dim=1)

    def agreement(self, images: Iterable[Image.Image], texts: Sequence[str]) -> list[float]:
        """Return the cosine of CLIP's embeddings of each image and its text, of which CLIP reads the first tokens."""
        most, values, start = self.model.config.text_config.max_position_embeddings, [], 0
        for batch in self._batches(images):
            part = list(texts[start : start + len(batch["pixel_values"])])
            tokens = self.tokenizer(part, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
            result = self.model(**batch, **tokens)
            values += torch.cosine_similarity(result.image_embeds, result.text_embeds).tolist()
            start += len(part)
        return values

    def _batches(self, images: Iterable[Image.Image]) -> Iterator[Mapping[str, Tensor]]:
        waiting: list[Image.Image] = []
        for image in images:
            waiting.append(image)
            if len(waiting) == BATCH_SIZE:
                yield self.processor(images=waiting, return_tensors="pt")
                waiting = []
        if waiting:
            yield self.processor(images=waiting, return_tensors="pt")


@dataclass(frozen=True)
class Scorer:
    """Hashes of the training images and of their mirror images, features, and the models that score with them."""

    hashes: Sequence[int]
    dinov2: ScoreModel | None = None
    trained_ND: Tensor | None = None  # of `dinov2`
    clip: ScoreModel | None = None

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, list[float]]:
        """Score images drawn for these texts.

        Sharpness is that of the audit. A near-copy (1, else 0) differs from a training image or its mirror image in at
        most as many bits of a perceptual hash as near-duplicates of the audit. Similarity is the mean cosine with all
        training images, as in DreamBooth (Ruiz et al. 2023), and agreement the cosine with the prompt.
        """
        plain = [composite_on_white(image) for image in images]
        greys = [image.convert("L") for image in plain]
        scores = {
            SHARPNESS: [measure_sharpness(np.asarray(grey)) for grey in greys],
            NEAR_COPIES: [float(self.nearest_bits(grey) <= MOST_BITS) for grey in greys],
        }
        if self.dinov2 is not None and self.trained_ND is not None:
            scores[SIMILARITY] = (self.dinov2.features(plain) @ self.trained_ND.T).mean(1).tolist()
        if self.clip is not None:
            scores[AGREEMENT] = self.clip.agreement(plain, texts)
        return scores

    def nearest_bits(self, grey: Image.Image) -> int:
        """Return in how many of 64 bits the hash differs from that of the nearest training image, over all shifts."""
        small = shrink(grey)
        shifted = [hash_crop(small, x, y) for x in SHIFTS for y in SHIFTS]
        return min(((own ^ other).bit_count() for own in shifted for other in self.hashes), default=HASH_BITS)


def measure_change(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Return the mean difference of images of the same prompts and seeds, as a share of the range of 8-bit values."""
    values = [[np.asarray(composite_on_white(image), np.float32) for image in images] for images in (before, after)]
    return float(np.mean([np.abs(one - other).mean() for one, other in zip(*values, strict=True)]) / 255)


def shrink(grey: Image.Image) -> Image.Image:
    return grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)


def hash_crop(small: Image.Image, x: int = 0, y: int = 0) -> int:
    """Return the perceptual hash of an image of `shrink` without a margin, which is wider on one side if shifted."""
    left, top, side = MARGIN + x, MARGIN + y, HASH_SIDE - 2 * MARGIN
    return perceptual_hash(small.crop((left, top, left + side, top + side)))


def format_means(scores: Scores) -> str:
    return ", ".join(f"{name} {fmean(values):.3g}" for name, values in scores.items())


def build_scorer(images: Iterable[Image.Image], models: Mapping[str, ScoreModel] | None = None) -> Scorer:
    """Read training images once. `models` are those of `load_score_models`."""
    models, hashes = models or {}, list[int]()

    def hashed() -> Iterator[Image.Image]:
        for image in images:
            small = shrink(image.convert("L"))
            hashes.extend((hash_crop(small), hash_crop(ImageOps.mirror(small))))
            yield image

    dinov2, features = models.get("dinov2"), None
    with torch.no_grad():
        if dinov2 is not None:
            features = dinov2.features(hashed())
        else:
            for _ in hashed():
                pass
    return Scorer(hashes, dinov2, features, models.get("clip"))


def read_scorer(options: PreviewOptions, plan: DataPlan | None) -> Scorer | None:
    """Return what --score_previews asks for; None without it. Raises UserError for a model that cannot be used."""
    if not options.score_previews or plan is None:
        return None
    with random_streams_kept(torch.device("cpu")):
        models = load_score_models(options.score_models or ())
    return build_scorer(read_trained_images(plan), models)


def read_trained_images(plan: DataPlan) -> Iterator[Image.Image]:
    """Yield the training images as they are trained, cropped at the centre; evenly spread ones if there are many.

    Images that cannot be decoded are left out, as in training, which names them.
    """
    _, chosen = plan.limited_to_measured(MOST_COMPARED, ())
    if len(chosen) == MOST_COMPARED:
        logger.warning("--score_previews compares images with %d of the training images", MOST_COMPARED)
    with progress_bar("reading training images", len(chosen)) as bar:
        for sample in map(plan.samples.__getitem__, chosen):
            try:
                rgb, alpha = read_pixels(sample.image.key, plan.storage.content(sample.image))
                pixels = with_alpha(rgb, alpha) if plan.spec.has_alpha else rgb
                placed = Image.fromarray(apply_placement(pixels, crop_at_centre(sample.shape), None))
                yield composite_on_white(placed)
            except UserError as error:
                logger.warning("left out of the scores: %s", error)
            bar.update(1)


def load_score_models(names: Sequence[str]) -> dict[str, ScoreModel]:
    """Load models by their type, "dinov2" and "clip", onto the CPU. Raises UserError naming one that cannot be used."""
    models: dict[str, ScoreModel] = {}
    for name in names:
        folder = find_folder(name)
        kind = read_model_config(folder).get("model_type") if folder.is_dir() else None
        if kind not in ("dinov2", "clip"):
            raise about(FLAG)(
                f"{name} is no folder of transformers with a DINOv2 model or a whole CLIP model: the model_type "
                f"in its config.json is {kind or 'missing'}, not dinov2 or clip"
            )
        if kind in models:
            raise about(FLAG)(f"{name} is a second {kind} model", "give one")
        models[kind] = load_score_model(name, folder, kind)
    return models


def load_score_model(name: str, folder: Path, kind: str) -> ScoreModel:
    """Load a model with the processor that its folder describes. Raises UserError naming a file that is missing."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, info = AutoModel.from_pretrained(str(folder), output_loading_info=True, **options)
        processor = AutoImageProcessor.from_pretrained(str(folder), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options) if kind == "clip" else None
    except Exception as error:  # transformers raises anything for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise about(FLAG, cause="unreadable")(
            f"{name} cannot be loaded ({reason}); it needs config.json, preprocessor_config.json, "
            f"{' or '.join(WEIGHTS)}, and for CLIP its tokenizer"
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise about(FLAG)(
            f"{name} lacks {len(missing)} tensors of the model, such as {missing[0]}", "download it again"
        )
    return ScoreModel(model.float().eval(), processor, tokenizer)


def find_folder(name: str) -> Path:
    """Return the folder of a model, downloaded if `name` is on the hub. Raises UserError if there is none."""
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or not re.fullmatch(HUB_NAME, name):
        return existing(FLAG, name)
    try:
        for weights in WEIGHTS:
            folder = fetch_snapshot(name, [*SMALL_FILES, weights])
            if (folder / weights).is_file():
                break
        return folder
    except ConnectionError as error:
        raise about(FLAG)(
            f"{name} is no folder, and cannot be downloaded from the hub ({error}). Check the path, or download "
            "the model elsewhere and give its folder"
        ) from error
