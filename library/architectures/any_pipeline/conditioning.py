"""Captions as the denoiser's arguments: captured once each by drawing until the denoiser's first call."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence

from library.architectures.any_pipeline.convention import PROMPTS, Convention, Joint
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.trees import (
    Path,
    float_tensors,
    format_path,
    leaves,
    list_paths,
    pad_to,
    replace_leaves,
)
from library.architectures.any_pipeline.watch import Answers, Refused, Watched, key_of, setting
from library.types import Conditioning, Tokens

SHAPE = "shape of "
MOST_ENCODER_ERROR = 0.1  # of features, relative to the largest; between float32 and bfloat16 some hundredths
NO_VALUE = [-1]  # the shape of None, such as a mask that masks nothing


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
    compared: list[str] = field(default_factory=list)  # captions by which the loaded encoders were compared
    planned: dict[Path, list[int]] = field(default_factory=dict)  # shapes of the longest caption, for the planner

    @property
    def keys(self) -> tuple[str, ...]:
        names = tuple(map(format_path, self.convention.text))
        return (*names, *(SHAPE + name for name in names))

    @property
    def host_keys(self) -> tuple[str, ...]:
        """The features that are read on the host: shapes, and arguments that are no tensors."""
        numbers = [format_path(path) for path, value in self.example.items() if not isinstance(value, Tensor | None)]
        return (*numbers, *(key for key in self.keys if key.startswith(SHAPE)))

    def count_tokens(self, caption: str) -> int:
        return len(self.tokenizer(caption, add_special_tokens=False)["input_ids"])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        rows = [caption.encode() for caption in captions]
        length = max(1, *map(len, rows))
        return Tokens((torch.tensor([list(row.ljust(length, b"\0")) for row in rows]),))

    def encode(self, encoders: Sequence[nn.Module], tokens: Tokens) -> Conditioning:
        """Return the denoiser's text arguments, first axis B, without gradient."""
        watched, models, ids_BL = self.watched, dict(zip(self.names, encoders, strict=True)), tokens.ids_BLT[0]
        memory = watched.memory if self.remembers else dict(watched.memory)
        with watched.real_tensors(), setting(watched, models={**watched.models, **models}, memory=memory):
            if isinstance(ids_BL, FakeTensor):  # of the planner
                captions = ["a " * self.max_tokens] * len(ids_BL)
            else:
                self.require_same_encoders()
                captions = [bytes(row.tolist()).rstrip(b"\0").decode() for row in ids_BL]
            rows = [self.to_features(capture_text(watched, self.convention, caption)) for caption in captions]
            if isinstance(ids_BL, FakeTensor):
                self.planned.update({path: rows[0][SHAPE + format_path(path)].tolist() for path in self.example})
            return {key: pad_sequence([row[key] for row in rows], batch_first=True) for key in rows[0]}

    def require_same_encoders(self) -> None:
        """Raise Refused if the loaded text encoders give other features than when the pipeline was measured."""
        if self.compared:
            return
        watched, c = self.watched, self.convention
        recorded = join_floats(capture_text(watched, c, PROMPTS[0]))
        with setting(watched, memory={}):
            loaded = join_floats(capture_text(watched, c, PROMPTS[0]))
        is_same = loaded.shape == recorded.shape
        error = float((loaded - recorded).abs().max() / recorded.abs().max().clamp(min=1e-6)) if is_same else math.inf
        if not error <= MOST_ENCODER_ERROR:
            raise Refused(
                f"{c.pipeline}: the loaded text encoders give other features than when the pipeline was measured "
                f"(by {error:.2g} of the largest value); delete the kept measurement and start again"
            )
        self.compared.append(PROMPTS[0])

    def to_features(self, text: Mapping[Path, Any]) -> dict[str, Tensor]:
        """Return the text arguments of one sample as vectors and their shapes."""
        row = {}
        for path in self.convention.text:
            value = torch.as_tensor(() if text[path] is None else text[path])
            value = value.to(self.dtype) if value.is_floating_point() else value
            shape = NO_VALUE if text[path] is None else value.shape
            row[format_path(path)], row[SHAPE + format_path(path)] = value.flatten(), torch.tensor(shape)
        return row

    def restore(self, conditioning: Conditioning, place: int) -> dict[Path, Any]:
        """Return the arguments of one sample of a batch."""
        text: dict[Path, Any] = {}
        for path in self.convention.text:
            value_N, old = conditioning[format_path(path)][place], self.example[path]
            shape_A = conditioning[SHAPE + format_path(path)][place]  # a fake one under the planner
            shape = self.planned[path] if isinstance(shape_A, FakeTensor) else shape_A.tolist()
            if shape[:1] == NO_VALUE:
                text[path] = None
                continue
            count = math.prod(shape)
            # Trailing zeros are cut off in caches.
            value = pad_to(value_N[:count], (count,)).reshape(shape)
            if isinstance(old, Tensor | None):
                text[path] = value if old is None else value.to(old.dtype)
            else:
                text[path] = type(old)(value.item())
        return text


def capture_text(watched: Watched, convention: Convention, caption: str) -> dict[Path, Any]:
    """Return the denoiser's text arguments for a caption; for the empty one those of the pipeline's negative prompt."""
    c, negative = convention, convention.unconditional
    if caption or negative is None:
        kwargs = watched.draw(caption, c.size, Answers(stops_at=0), **c.extra).calls[0].kwargs
        require_fixed(c, kwargs, caption)
        return text_of(c, kwargs)
    answers, row = Answers(lambda _: c.output, stops_at=negative.call), negative.row
    text = text_of(c, watched.draw(PROMPTS[0], c.size, answers, **negative.extra).calls[-1].kwargs)
    if row is None:
        return text
    # A pipeline whose guidance is never off has several rows in each call, of which all get the negative prompt.
    usual = capture_text(watched, c, PROMPTS[0])
    return {path: torch.cat([value[row : row + 1]] * len(usual[path])) for path, value in text.items()}


def join_floats(text: Mapping[Path, Any]) -> Tensor:
    return torch.cat([torch.zeros(1), *(value.float().flatten() for value in float_tensors(dict(text)))])


def digest_others(arguments: Mapping[Path, Any], changing: Collection[Path]) -> dict[Path, str]:
    """Return a digest of each argument that is not in `changing`."""
    return {path: key_of(leaf) for path, leaf in arguments.items() if path not in changing}


def require_fixed(convention: Convention, kwargs: Any, caption: str) -> None:
    """Raise Refused if a caption changes an argument that was measured to follow no caption."""
    c = convention
    fixed = digest_others(leaves(kwargs), {*c.text, *c.time, c.latents})
    if paths := sorted(path for path in fixed.keys() | c.fixed.keys() if fixed.get(path) != c.fixed.get(path)):
        raise Refused(
            f"{c.pipeline}: the caption {caption!r} changes {list_paths(paths)} of the denoiser, which no caption did "
            "while the pipeline was measured; leave it out"
        )


def text_of(convention: Convention, kwargs: Any) -> dict[Path, Any]:
    found = leaves(kwargs)
    if missing := [format_path(path) for path in convention.text if path not in found]:
        raise Refused(f"a caption gives the denoiser no {', '.join(missing)}")
    return {path: found[path] for path in convention.text}


def compose(joint: Mapping[Path, Joint], of_size: Mapping[Path, Any], text: Mapping[Path, Any]) -> Any:
    """Return the denoiser's arguments from those of a size and a text that was captured apart."""
    made = {**of_size, **text}
    for path, (axis, num_text, num_image) in joint.items():
        image = of_size[path].narrow(axis, num_text, of_size[path].shape[axis] - num_text)
        made[path] = torch.cat([text[path].narrow(axis, 0, text[path].shape[axis] - num_image), image], axis)
    return made


def fill_arguments(
    convention: Convention, maps: SizeMaps, text: Mapping[Path, Any], sample_N: Tensor, level_1: Tensor
) -> Any:
    """Return the denoiser's arguments for a sample with a text that was captured apart, at `Convention.size`."""
    c, base = convention, leaves(maps.kwargs)
    new = compose(c.joint, base, text)
    for path in c.time:
        source, old = c.lines.get(path) or maps.tables[path], base[path]
        value_1 = source.at(level_1)
        is_tensor = isinstance(old, Tensor)
        new[path] = value_1.to(old.dtype).reshape(()).expand(old.shape) if is_tensor else type(old)(value_1.item())
    new[c.latents] = maps.into(sample_N[None]).reshape(maps.into.shape)
    return replace_leaves(maps.kwargs, new)
