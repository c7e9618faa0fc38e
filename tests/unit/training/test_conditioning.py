"""Frozen captions are encoded once."""

from collections.abc import Sequence

import torch

from library.training.step.conditioning import CaptionMemo
from library.types import Conditioning


class Encoder:
    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        self.calls.append(list(captions))
        return {"hidden_state": torch.tensor([[float(len(caption))] * 4 for caption in captions])}


def test_each_caption_is_encoded_once_in_a_batch_of_its_own() -> None:
    encoder = Encoder()
    memo = CaptionMemo(encoder)
    first = memo(["a", "bcd", "a"])
    second = memo(["bcd", ""])
    assert encoder.calls == [["a"], ["bcd"], [""]]
    assert first["hidden_state"][:, 0].tolist() == [1, 3, 1]
    assert second["hidden_state"][:, 0].tolist() == [3, 0]


def test_beyond_the_limit_the_least_recently_used_caption_is_evicted() -> None:
    encoder = Encoder()
    memo = CaptionMemo(encoder, limit_bytes=2 * 16)
    memo(["a"]), memo(["b"]), memo(["a"]), memo(["c"])  # b is the least recently used when c is added
    memo(["a"])
    assert encoder.calls == [["a"], ["b"], ["c"]]
    memo(["b"])
    assert encoder.calls[-1] == ["b"]


def test_conditioning_of_frozen_captions_has_no_gradient() -> None:
    weight = torch.ones(4, requires_grad=True)
    memo = CaptionMemo(lambda captions: {"hidden_state": weight.expand(len(captions), 4) * 2})
    assert not memo(["x"])["hidden_state"].requires_grad
