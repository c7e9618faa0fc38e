"""The text encoder of Lumina Image 2.0: transformers' Gemma2Model, from a file in its layout or a folder.

Letters: B captions, T tokens, E width.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.base.atomic_files import copy_atomically
from library.base.errors import UserError, error_in, of_file
from library.checkpoints.model_lookup import fetch_snapshot
from library.checkpoints.weights import Weights, configure, list_first_names
from library.memory.devices import send
from library.models.language_models import decoder_config, extract_decoder
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.shapes import Shapes, shape_of
from library.models.tokenizer_files import check_ids, read_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
HUB: Mapping[str, str] = {  # repository -> its tokenizer file
    "Alpha-VLLM/Lumina-Image-2.0": f"tokenizer/{TOKENIZER_FILE}",
    "google/gemma-2-2b": TOKENIZER_FILE,  # requires accepted terms
}
HUB_CACHE = "models--google--gemma-2-2b/snapshots/*"  # where sd-scripts stores it in --tokenizer_cache_dir
GEMMA_PREFIXES = ("text_encoders.gemma2_2b.transformer.model.", "model.", "")
HEAD_WIDTH = 256
ROPE_BASE = 10_000.0
EPS = 1e-6
BEGIN, PADDING = "<bos>", "<pad>"


def gemma_component(weights: Weights) -> Component:
    """Build the encoder's component from a single file or a full checkpoint. Raises UserError for anything else."""
    decoder = extract_decoder(weights, GEMMA_PREFIXES)
    if decoder is None or "layers.0.pre_feedforward_layernorm.weight" not in decoder.shapes:
        raise of_file(weights.origin)(f"is not a Gemma 2 text encoder (first names: {list_first_names(weights)})")
    return Component(configure(decoder, gemma_config), decoder)


def gemma_of_folder(config: Mapping[str, Any], weights: Weights) -> Component:
    """Build the encoder's component from a diffusers or transformers folder. Raises UserError for another model."""
    if config.get("model_type") != "gemma2":
        raise of_file(weights.origin)(
            f"is not a Gemma 2 encoder: config.json names model_type {config.get('model_type')!r} instead of 'gemma2'"
        )
    return Component(config, extract_decoder(weights, GEMMA_PREFIXES) or weights)


def gemma_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' Gemma2Config."""
    # min: a model narrower than a usual head has one head of keys.
    head_width = min(HEAD_WIDTH, shape_of(shapes, "layers.0.self_attn.k_proj.weight")[0])
    return {**decoder_config(shapes, head_width, ROPE_BASE, EPS), "query_pre_attn_scalar": head_width}


# transformers up to 5.0 defaults to sdpa, which ignores the cap on attention logits.
empty_gemma = partial(empty_transformers_model, "gemma2", "Gemma2", attn_implementation="eager")
load_gemma = partial(load_component, empty_gemma)


def encode_gemma(encoder: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the states before the last layer, BTE; padding, where the mask is 0, is not attended to. Gradients
    flow."""
    device = next(encoder.parameters()).device
    outputs = encoder(send(ids_BT, device), attention_mask=send(mask_BT, device), output_hidden_states=True)
    states_BTE: Tensor = outputs.hidden_states[-2]
    return states_BTE


def load_gemma_tokenizer(folders: Sequence[Path], cache_dir: str | None, num_words: int | None) -> Any:
    """Load Gemma's tokenizer for an encoder with `num_words` embeddings.

    Searches `folders`, then --tokenizer_cache_dir, then the hub; a download is saved into --tokenizer_cache_dir. Raises
    UserError naming the files to provide, or for the tokenizer of another model.
    """
    from transformers import PreTrainedTokenizerFast

    file = find_gemma_tokenizer(folders, cache_dir)
    logger.info("Gemma tokenizer: %s", file)
    tokenizer = read_tokenizer(lambda: PreTrainedTokenizerFast(tokenizer_file=str(file)), file)
    vocabulary = tokenizer.get_vocab()
    if missing := [word for word in (BEGIN, PADDING) if word not in vocabulary]:
        raise error_in(path=file)(
            f"the tokenizer {file} has no {missing[0]}: it belongs to another model", "replace it with the right one"
        )
    check_ids("Gemma", tokenizer, file, num_words)
    return tokenizer


def find_gemma_tokenizer(folders: Sequence[Path], cache_dir: str | None) -> Path:
    """Return the path of the tokenizer's file, downloading it if needed. Raises UserError if it cannot be
    downloaded."""
    cache = Path(cache_dir).expanduser() if cache_dir else None
    # A download is saved under the name of the first repository, whichever it comes from.
    cache_folder = None if cache is None else cache / next(iter(HUB)).replace("/", "_")
    cache_folders = [] if cache is None or cache_folder is None else [cache_folder, *sorted(cache.glob(HUB_CACHE))]
    for folder in (*folders, *cache_folders):
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    try:
        downloaded = download_tokenizer()
    except ConnectionError as error:
        suggestion = cache_folder or f"<folder>/{next(iter(HUB)).replace('/', '_')}"
        raise UserError(
            f"Gemma's tokenizer is in none of {', '.join(map(str, folders))}, and it cannot be downloaded ({error}). "
            f"Put {TOKENIZER_FILE} of Gemma 2 into one of them, or into {suggestion}"
            f"{'' if cache_folder else ' and give --tokenizer_cache_dir <folder>'}"
        ) from error
    if cache_folder is not None:
        copy_atomically(downloaded, cache_folder / TOKENIZER_FILE)
    return downloaded


def download_tokenizer() -> Path:
    """Download the tokenizer from the first repository that allows it.

    Raises ConnectionError with each repository's reason.
    """
    refusals = []
    for repository, file in HUB.items():
        try:
            downloaded = fetch_snapshot(repository, [file]) / file
        except ConnectionError as error:
            refusals.append(f"{repository}: {error}")
            continue
        if downloaded.is_file():
            return downloaded
        refusals.append(f"{repository}: it has no {file}")
    raise ConnectionError("; ".join(refusals))
