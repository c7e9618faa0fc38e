"""Captions as the denoiser's arguments: captured once each by drawing until the denoiser's first call."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.utils.rnn import pad_sequence

from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.trees import Path, format_path, leaves
from library.architectures.any_pipeline.watch import Answers, Refused, Watched
from library.types import Conditioning, Tokens

SHAPE = "shape of "


@dataclass(frozen=True, eq=False)
class CapturedText:
    """The text pipeline: tokens are the bytes of a caption, which the pipeline itself tokenizes and encodes.

    Features are named by the denoiser's arguments. Each is stored as a vector, and its shape beside it, because shapes
    may follow the caption.
    """

    watched: Watched
    convention: Convention
    names: tuple[str, ...]  # the text encoders, in the order of `PipelineLoader.text_encoders`
    example: Mapping[Path, Any]  # the text arguments of some caption
    tokenizer: Any  # counts tokens
    max_tokens: int
    dtype: torch.dtype  # of the features
    remembers: bool = False  # keep what the text encoders return, to draw with it

    @property
    def keys(self) -> tuple[str, ...]:
        names = tuple(map(format_path, self.convention.text))
        return (*names, *(SHAPE + name for name in names))

    @property
    def host_keys(self) -> tuple[str, ...]:
        """The features that are read on the host: shapes, and arguments that are no tensors."""
        numbers = [format_path(path) for path, value in self.example.items() if not isinstance(value, Tensor)]
        return (*numbers, *(key for key in self.keys if key.startswith(SHAPE)))

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        rows = [caption.encode() for caption in captions]
        length = max(1, *map(len, rows))
        return Tokens((torch.tensor([list(row.ljust(length, b"\0")) for row in rows]),))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return the denoiser's text arguments, first axis B, without gradient."""
        if detect_fake_mode(tokens.ids_BLT) is not None:
            raise Refused(
                "the memory of a measured pipeline cannot be planned, because its captions are captured by drawing; "
                "remove --fit"
            )
        captions = [bytes(row.tolist()).rstrip(b"\0").decode() for row in tokens.ids_BLT[0]]
        return pad_rows([self._encode(encoders, caption) for caption in captions])

    def _encode(self, encoders: Sequence[nn.Module], caption: str) -> dict[str, Tensor]:
        watched = self.watched
        with watched.using(dict(zip(self.names, encoders, strict=True))):
            with nullcontext() if self.remembers else watched.forgetting():
                return self._features(capture_text(watched, self.convention, caption))

    def _features(self, text: Mapping[Path, Any]) -> dict[str, Tensor]:
        row = {}
        for path in self.convention.text:
            value = torch.as_tensor(text[path])
            value = value.to(self.dtype) if value.is_floating_point() else value
            row[format_path(path)], row[SHAPE + format_path(path)] = value.flatten(), torch.tensor(value.shape)
        return row

    def restore(self, conditioning: Conditioning, place: int) -> dict[Path, Any]:
        """Return the arguments of one sample of a batch."""
        text: dict[Path, Any] = {}
        for path in self.convention.text:
            value_N, old = conditioning[format_path(path)][place], self.example[path]
            shape = conditioning[SHAPE + format_path(path)][place].tolist()
            count = math.prod(shape)
            # Trailing zeros are cut off in caches.
            value = nn.functional.pad(value_N, (0, max(0, count - len(value_N))))[:count].reshape(shape)
            text[path] = value.to(old.dtype) if isinstance(old, Tensor) else type(old)(value.item())
        return text


def pad_rows(rows: Sequence[Mapping[str, Tensor]]) -> Conditioning:
    """Stack the features of captions, padded with zeros."""
    return {key: pad_sequence([row[key] for row in rows], batch_first=True) for key in rows[0]}


def capture_text(watched: Watched, convention: Convention, caption: str) -> dict[Path, Any]:
    """Return the denoiser's text arguments for a caption; for the empty one those of the pipeline's negative prompt."""
    c, unconditional = convention, convention.unconditional
    if caption or unconditional is None:
        return text_of(c, watched.draw(caption, c.size, answer_until(c, c.call), **c.extra).calls[-1].kwargs)
    answers = answer_until(c, unconditional.call)
    kwargs = watched.draw(c.prompts[0], c.size, answers, **unconditional.extra).calls[-1].kwargs
    row, count = unconditional.row, unconditional.num_rows
    return {path: value[row : row + 1] if count > 1 else value for path, value in text_of(c, kwargs).items()}


def text_of(convention: Convention, kwargs: Any) -> dict[Path, Any]:
    found = leaves(kwargs)
    if missing := [format_path(path) for path in convention.text if path not in found]:
        raise Refused(f"a caption gives the denoiser no {', '.join(missing)}")
    return {path: found[path] for path in convention.text}


def answer_until(convention: Convention, call: int) -> Answers:
    """Return answers that end the drawing at a call; earlier calls of the step get zeros."""
    return Answers(outputs=lambda _: convention.output, stops_at=call)
