"""The text encoder of FLUX.2 dev and its tokenizer.

It is the language model of Mistral Small 3 (transformers' MistralModel), from a file or a folder.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.base.errors import about
from library.checkpoints.weights import Weights, configure, list_first_names
from library.models.language_models import FLAG, PREFIXES, LanguageModel, decoder_config, extract_decoder
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.shapes import Shapes
from library.models.tokenizer_files import TokenizerFiles

HUB_NAME = "mistralai/Mistral-Small-3.1-24B-Instruct-2503"
HEAD_WIDTH = 128
ROPE_BASE = 1_000_000_000.0
EPS = 1e-5
PADDING = "<pad>"
PREFIX = "text_encoders.mistral3_24b.transformer.model."  # in files with several models
FILES = TokenizerFiles(
    HUB_NAME,
    ("tokenizer.json", "tokenizer_config.json"),
    lambda folder: (folder / "tokenizer.json").is_file(),
    "Mistral 3",
    "tokenizer.json",
    "PreTrainedTokenizerFast",
)


def mistral_component(weights: Weights) -> Component:
    """Build the encoder's component from shapes. Raises UserError if the weights are something else."""
    decoder = extract_decoder(weights, (PREFIX, *PREFIXES))
    # Qwen3 has the same names, and norms of queries and keys besides.
    if decoder is None or "layers.0.self_attn.q_norm.weight" in decoder.shapes:
        first_names = list_first_names(weights)
        raise about(FLAG, weights.origin)(f"is not a Mistral 3 text encoder (first names: {first_names})")
    return Component(configure(decoder, mistral_config), decoder)


def mistral_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' MistralConfig."""
    return decoder_config(shapes, HEAD_WIDTH, ROPE_BASE, EPS)


# transformers' default for this class is a window of 4096 tokens, which Mistral 3 does not have.
empty_mistral = partial(empty_transformers_model, "mistral", "Mistral", sliding_window=None)


def load_mistral_tokenizer(folders: Sequence[Path], cache_dir: str | None, num_words: int | None) -> Any:
    """Load Mistral 3's tokenizer, padding on the left, as described at `TokenizerFiles.load`."""
    tokenizer = FILES.load(folders, cache_dir, num_words, padding_side="left")
    # A folder may hold tokenizer.json alone, which names no padding token.
    tokenizer.pad_token = tokenizer.pad_token or PADDING
    return tokenizer


ENCODER = LanguageModel(
    name="Mistral 3",
    hub_name=HUB_NAME,
    prefix=PREFIX,
    marks=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    open=lambda config, weights: mistral_component(weights),
    load=partial(load_component, empty_mistral),
    load_tokenizer=load_mistral_tokenizer,
)
