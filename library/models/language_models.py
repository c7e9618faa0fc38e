"""Language models of transformers as text encoders: configurations, chat templates, and the states of chosen layers.

Letters: B captions, S tokens, E width.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import error_in
from library.checkpoints.weights import Weights, select_weights, with_prefix
from library.memory.devices import send
from library.memory.formats.fp8 import Fp8Rows
from library.memory.frozen import freeze_layers, layers_in_blocks
from library.models.loading import Component, LoadPart, MaybeComponent
from library.models.shapes import Shapes, count, shape_of
from library.types import Conditioning, Tokens

logger = logging.getLogger(__name__)

PARTS = ("embed_tokens.", "layers.", "norm.")  # the rest of a file is the language modelling head, or a tokenizer
WORDS = "embed_tokens.weight"
LAYER_LINEAR = (  # the Linear layers of one decoder layer
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
DESCRIBE = (  # the text before a caption in pipelines with a Qwen-VL
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")  # in files


FLAG = "--text_encoder"


@dataclass(frozen=True)
class LanguageModel:
    """A language model that encodes captions, and its tokenizer. `FLAG` names its file or folder."""

    name: str  # in the log
    hub_name: str
    prefix: str  # of its names in a file with several models
    marks: tuple[str, ...]  # special tokens of its template
    open: Callable[[Mapping[str, Any] | None, Weights], Component]
    """(configuration of its folder, None for a file; weights) -> its component. Raises UserError for another model."""
    load: LoadPart
    load_tokenizer: Callable[[Sequence[Path], str | None, int | None], Any]  # see `TokenizerFiles.load`
    tokenizer_folders: tuple[str, ...] = ("tokenizer",)  # next to the base model and the encoder
    vision: tuple[Callable[[Weights], Component | None], LoadPart] | None = None
    """Opens and loads the vision model in its files, which only reference images need."""


def choose_load(load: LoadPart, name: str, in_8_bits: bool) -> LoadPart:
    """Return `load`, or a function that also stores the encoder's blocks as fp8 with one scale per row.

    `name` is the encoder's name in the log.
    """

    def load_in_8_bits(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
        encoder = load(component, dtype)
        logger.info("%s: %d layers in 8 bits", name, freeze_layers(Fp8Rows(), layers_in_blocks(encoder).values()))
        return encoder

    return load_in_8_bits if in_8_bits else load


def extract_decoder(weights: Weights, prefixes: Sequence[str]) -> Weights | None:
    """Return a decoder's weights under transformers' names, without the language modelling head and any vision model.

    Returns None if the file has no decoder under any of `prefixes`.
    """
    prefix = next((p for p in prefixes if f"{p}{WORDS}" in weights.shapes), None)
    if prefix is None:
        return None
    bare = with_prefix(weights, prefix)
    return select_weights(bare, {key: key for key in bare.shapes if key.startswith(PARTS)})


def decoder_config(shapes: Shapes, head_width: int, rope_base: float, eps: float) -> dict[str, Any]:
    """Return the arguments that transformers' decoder configurations share."""
    vocab, width = shape_of(shapes, WORDS)
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": count(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": shape_of(shapes, "layers.0.self_attn.q_proj.weight")[0] // head_width,
        "num_key_value_heads": shape_of(shapes, "layers.0.self_attn.k_proj.weight")[0] // head_width,
        "head_dim": head_width,
        "rope_theta": rope_base,
        "rms_norm_eps": eps,
    }


@dataclass(frozen=True)
class ChatText:
    """The text pipeline of a language model that encodes a caption as a user's message."""

    tokenizer: Any  # transformers'
    template: tuple[str, str]  # before and after a caption
    num_tokens: int  # including the template
    padding: str  # to the "longest" caption, or to "max_length"
    encode_states: Callable[[nn.Module, Tensor, Tensor], Conditioning]
    """(encoder, IDs and mask, both BS) -> features."""
    removed: str = ""  # deleted from captions

    @property
    def max_tokens(self) -> int:
        return self.num_tokens - self.count_tokens("".join(self.template))

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return token IDs and their mask, both (B, 1, S), 0 for padding.

        Truncation cuts the end of a long caption and of its template.
        """
        begin, end = self.template
        encoding = self.tokenizer(
            [f"{begin}{caption.replace(self.removed, '') if self.removed else caption}{end}" for caption in captions],
            add_special_tokens=False,
            padding=self.padding,
            truncation=True,
            max_length=self.num_tokens,
            return_tensors="pt",
        )
        return Tokens((encoding["input_ids"][:, None].long(), encoding["attention_mask"][:, None]))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return the features of `encode_states`."""
        (encoder,) = encoders
        ids_BS, mask_BS = (ids_BLT[:, 0] for ids_BLT in tokens.ids_BLT)
        # The encoder's states overflow float16.
        with torch.autocast(next(encoder.parameters()).device.type, enabled=False):
            return self.encode_states(encoder, ids_BS, mask_BS)


def with_first_layers(component: Component, num_layers: int, label: str) -> Component:
    """Return an encoder with only its first `num_layers` layers.

    Raises UserError if it has fewer; `label` names it in the message.
    """
    depth = component.config["num_hidden_layers"]
    if depth < num_layers:
        raise error_in(path=component.weights.origin, cause="does not fit")(
            f"{label} {component.weights.origin} has {depth} layers, but the first {num_layers} are used"
        )
    names = component.weights.shapes
    kept = {key: key for key in names if not key.startswith("layers.") or int(key.split(".")[1]) < num_layers}
    return Component({**component.config, "num_hidden_layers": num_layers}, select_weights(component.weights, kept))


def encode_layers(encoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor, layers: Sequence[int]) -> Tensor:
    """Concatenate the states after several layers, padding included; shape (B, S, E * number of layers).

    `layers` may include the encoder's last layer only if its last norm is removed (`remove_last_norm`).
    """
    device = next(encoder.parameters()).device
    outputs = encoder(send(ids_BS, device), attention_mask=send(mask_BS, device), output_hidden_states=True)
    return torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)


def remove_last_norm(encoder: nn.Module) -> nn.Module:
    """Remove the last norm of an encoder in place, so that its last states are those of its last layer."""
    encoder.norm = nn.Identity()
    return encoder
