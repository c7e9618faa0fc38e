"""Batches from a user-defined class (--dataset_class)."""

from typing import Any

import pytest
import torch

from library.data.batches.own_dataset import OwnDataset, build_batch, open_own_dataset
from library.options.dataset import DatasetOptions
from library.protocols import LatentSpec

SPEC = LatentSpec(channels=4, downscale=8, bucket_step=8, cache_suffix="_sd.npz", had_keys_without_size=True)


def item(seed: int = 1, count: int = 2, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 16, 24, generator=g) * 2 - 1
    return {"images": pixels, "captions": [f"caption {seed} {n}" for n in range(count)], "input_ids": None, **changes}


class UserDataset:
    batch_size = 2
    num_train_images = 7

    def __init__(self, tokenizer: None, max_token_length: int | None, resolution: Any, debug_dataset: bool) -> None:
        self.arguments = (tokenizer, max_token_length, resolution, debug_dataset)
        self.epochs: list[int] = []

    def set_current_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return item(seed=10 + number)


DATA = DatasetOptions(dataset_class="my.Pictures", resolution="512,768")


def captions(data: OwnDataset, epoch: int, batch_indices: range) -> list[str]:
    return [batch.captions[0] for batch in data.iterate_epoch(epoch, batch_indices, lambda index: 0, 0, False)]


def test_a_dataset_class_is_called_like_in_sd_scripts() -> None:
    data = open_own_dataset(UserDataset, DATA, 150, SPEC, seed=3)
    assert data._source.arguments == (None, 150, (512, 768), False)
    assert (data.num_batches, data.batch_sizes, data.num_train_images, data.num_reg_images) == (4, [2], 7, 0)
    first, second = captions(data, 1, range(4)), captions(data, 2, range(4))
    assert sorted(first) == sorted(second) == [f"caption {10 + n} 0" for n in range(4)]
    assert first != second
    assert captions(data, 2, range(2, 4)) == second[2:]  # a resumed run continues at its batch
    assert data._source.epochs[-1] == 2
    assert data.validation.num_batches == 0


def test_all_parts_of_a_batch_are_used() -> None:
    entry = item(
        count=2, loss_weights=torch.tensor([1.0, 0.5]), alpha_masks=torch.rand(2, 16, 24), image_keys=["a", 7],
        original_sizes_hw=torch.tensor([[30, 40], [50, 60]]), crop_top_lefts=torch.tensor([[1, 2], [3, 4]]),
        custom_attributes=[{"diff_output_preservation": True}, {}],
    )  # fmt: skip
    batch = build_batch(entry, "batch 0", SPEC)
    assert batch.pixels_BCHW is not None and torch.equal(batch.pixels_BCHW, entry["images"])
    assert batch.latents_BCHW is None and batch.keys == ["a", "7"]
    assert batch.loss_weights_B.tolist() == [1.0, 0.5]
    assert batch.masks_B1HW is not None and batch.masks_B1HW.shape == (2, 1, 16, 24)
    assert batch.sizes_B6.tolist() == [[30, 40, 1, 2, 16, 24], [50, 60, 3, 4, 16, 24]]
    assert batch.attributes[0] == {"diff_output_preservation": True}
    latents = build_batch({"captions": ["a"], "latents": torch.randn(1, 4, 5, 6)}, "batch 1", SPEC)
    assert latents.pixels_BCHW is None and latents.sizes_B6.tolist() == [[40, 48, 0, 0, 40, 48]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8)}, "batch 5 has no `captions`"),
        ({"captions": ["a"]}, "batch 5 has neither `images` nor `latents`"),
        (item(count=2, captions=["one"]), r"expected \(1, 3, height, width\) for 1 captions, not \[2, 3, 16, 24\]"),
        ({"captions": ["a"], "latents": torch.zeros(1, 16, 4, 4)}, r"expected \(1, 4, height, width\)"),
        ({"captions": ["a"], "images": [1, 2]}, "not list"),
        (item(count=2, loss_weights=[0.5]), "`loss_weights` has 1 entries for 2 captions; give one for each"),
        (item(count=2, custom_attributes=[{}]), "`custom_attributes` has 1 entries for 2 captions"),
        (item(count=2, original_sizes_hw=[[1, 2]]), "`original_sizes_hw` has 1 entries for 2 captions"),
        (item(count=2, alpha_masks=torch.ones(2, 1, 16, 24)), r"`alpha_masks` of shape \(2, height, width\)"),
    ],
)
def test_invalid_batches_raise_errors_that_name_them(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch(content, "batch 5", SPEC)


def test_errors_for_an_unsuitable_class_say_what_it_must_provide() -> None:
    with pytest.raises(ValueError, match=r"is called with \(tokenizer=None, max_token_length"):
        open_own_dataset(dict.fromkeys, DATA, None, SPEC, seed=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must return the number of its batches from len\(\)"):
        OwnDataset(object(), "my.Thing", 3, SPEC)
    with pytest.raises(ValueError, match="has no batches"):
        OwnDataset([], "my.Thing", 3, SPEC)
    with pytest.raises(ValueError, match="batch 0 is int, not a mapping"):
        next(OwnDataset([5], "my.Thing", 3, SPEC).iterate_epoch(1, [0], lambda index: 0, 0, False))
