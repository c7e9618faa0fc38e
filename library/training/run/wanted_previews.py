"""The previews that a run is asked for, read before any model is loaded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import needing
from library.checkpoints.marks import TRAIN_PY, is_sealed
from library.checkpoints.weights import to_meta_device
from library.data.training_data import TrainingData
from library.options.output.preview import PreviewOptions
from library.protocols import Architecture
from library.training.evaluation.drawing import collect_texts
from library.training.evaluation.image_scores import Scorer, read_scorer
from library.training.evaluation.preview import read_wanted_prompts
from library.training.evaluation.untaught_words import caption_texts, describe_untaught, find_untaught_words
from library.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WantedPreviews:
    """The prompts to draw, their texts, and what scores the images."""

    prompts: Sequence[Prompt] = ()
    texts: Sequence[str] = ()
    scorer: Scorer | None = None


def read_wanted_previews(options: PreviewOptions, arch: Architecture, data: TrainingData) -> WantedPreviews:
    """Read the prompts and what scores their images; nothing if none are to be drawn."""
    prompts = read_wanted_prompts(options, arch)
    if not prompts:
        return WantedPreviews()
    with needing("--sample_prompts draws images; give the VAE, or leave it out"):
        # Reads the header of the file only, which is enough to notice that there is none.
        to_meta_device(arch.load).vae()
    if not is_sealed(Path(str(options.sample_prompts)), TRAIN_PY):  # whose words are not the user's
        warn_of_untaught_words(prompts, data, arch)
    return WantedPreviews(prompts, collect_texts(prompts, arch), read_scorer(options, data.image_plan))


def warn_of_untaught_words(prompts: Sequence[Prompt], data: TrainingData, arch: Architecture) -> None:
    """Warn about words that every preview prompt has and no caption, such as a misspelt trigger word."""
    if data.image_plan is None:
        return
    captions = caption_texts(data.image_plan)
    words = find_untaught_words([prompt.text for prompt in prompts], captions, arch.text.count_tokens)
    if words:
        logger.warning("%s", describe_untaught(words))
