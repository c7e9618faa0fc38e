"""The text encoder Qwen3 (transformers' Qwen3Model), from a file in its layout or a folder, and its tokenizer.

Letters: B captions, S tokens, E width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, list_first_names
from library.memory.devices import send
from library.models.language_models import FLAG, LanguageModel, decoder_config, extract_decoder
from library.models.loading import Component, empty_transformers_model, load_component
from library.models.shapes import Shapes, shape_of
from library.models.tokenizer_files import BYTE_PAIR_FILES, TokenizerFiles, holds_byte_pairs

ROPE_BASE = 1_000_000.0
EPS = 1e-6
MARK = "layers.0.self_attn.q_norm.weight"  # earlier Qwens and Mistral do not normalize queries
FOLDER = "text_encoder"  # in a diffusers folder
BEGIN, END = "<|im_start|>", "<|im_end|>"  # marks of a message in Qwen's chat template


@dataclass(frozen=True)
class Qwen3Release:
    """One size of Qwen3 with the settings that a base model uses."""

    flag: str  # option that names its file
    hub_name: str  # "Qwen/Qwen3-0.6B"
    prefix: str  # of its names in a file with several models

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The possible prefixes in files."""
        return (self.prefix, "model.", "")


def open_qwen3(name: str | None, release: Qwen3Release) -> Component:
    """Open the encoder from a file or a folder. Raises UserError naming the flag if it is missing or something else."""
    if not name:
        raise about(release.flag, kind=NotThere)(f"is missing: use the file or folder of {release.hub_name}")
    return qwen3_component(model_lookup.open_model(release.flag, name, FOLDER)[1], release)


def qwen3_component(weights: Weights, release: Qwen3Release) -> Component:
    """Build the encoder's component from shapes. Raises UserError if the weights are something else."""
    decoder = extract_decoder(weights, release.prefixes)
    if decoder is None or MARK not in decoder.shapes:
        first = list_first_names(weights)
        raise about(release.flag, weights.origin)(f"is not a Qwen3 text encoder (first names: {first})")
    return Component(configure(decoder, qwen3_config), decoder)


def qwen3_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3Config."""
    head_width = shape_of(shapes, MARK)[0]
    return decoder_config(shapes, head_width, ROPE_BASE, EPS)


empty_qwen3 = partial(empty_transformers_model, "qwen3", "Qwen3")
load_qwen3 = partial(load_component, empty_qwen3)


def qwen3_encoder(size: str) -> LanguageModel:
    """Return the Qwen3 of this size ("4B") as a base model's encoder."""
    release = Qwen3Release(FLAG, f"Qwen/Qwen3-{size}", f"text_encoders.qwen3_{size.lower()}.transformer.model.")
    return LanguageModel(
        name="Qwen3",
        hub_name=release.hub_name,
        prefix=release.prefix,
        marks=(BEGIN, END),
        open=lambda config, weights: qwen3_component(weights, release),
        load=load_qwen3,
        load_tokenizer=partial(load_qwen3_tokenizer, release),
    )


def encode_qwen3(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the last states, after the final norm, BSE, zero where the mask is 0. Gradients flow."""
    # The encoder needs no mask: attention is causal, and padding comes last.
    device = next(encoder.parameters()).device
    states_BSE: Tensor = encoder(send(ids_BS, device)).last_hidden_state
    return torch.where(send(mask_BS, device)[..., None].bool(), states_BSE, 0)


def encode_before_last_layer(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the states before the last layer, BSE, zero where the mask is 0. Gradients flow."""
    device = next(encoder.parameters()).device
    states_BSE: Tensor = encoder(send(ids_BS, device), output_hidden_states=True).hidden_states[-2]
    return torch.where(send(mask_BS, device)[..., None].bool(), states_BSE, 0)


def load_qwen3_tokenizer(
    release: Qwen3Release, folders: Sequence[Path], cache_dir: str | None, num_words: int | None
) -> Any:
    """Load Qwen3's tokenizer, padding on the right, as described at `TokenizerFiles.load`."""
    needed = "tokenizer.json (or vocab.json and merges.txt)"
    files = TokenizerFiles(
        release.hub_name, BYTE_PAIR_FILES, holds_qwen3_tokenizer, "Qwen3", needed, "Qwen2TokenizerFast"
    )
    return files.load(folders, cache_dir, num_words, padding_side="right")


def holds_qwen3_tokenizer(folder: Path) -> bool:
    """Return True if a folder has the files of Qwen3's tokenizer; a folder with T5's spiece.model does not qualify."""
    return holds_byte_pairs(folder) and not (folder / "spiece.model").exists()
