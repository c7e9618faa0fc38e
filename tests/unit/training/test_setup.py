"""Small decisions in setting up a run."""

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.training.models.base_model import hash_module
from library.training.models.opening import choose_seed
from library.training.run.optimization import allow_fp16_gradients, name_groups


def options_of(**values: Any) -> TrainOptions:
    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    args = parser.parse_args([])
    for name, value in values.items():
        setattr(args, name, value)
    return TrainOptions.from_args(args)


def test_the_identity_depends_on_the_weights_and_not_on_their_memory_layout() -> None:
    torch.manual_seed(31)
    vae = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 1, 1), nn.Linear(3, 3, dtype=torch.bfloat16))
    identity = hash_module(vae)
    assert hash_module(vae.to(memory_format=torch.channels_last)) == identity  # type: ignore[call-overload]
    with torch.no_grad():
        vae[1].weight[0, 3] += 1e-3
    assert hash_module(vae) != identity


def test_another_precision_of_the_same_weights_changes_the_identity() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 0.5)  # exact in both
    nn.init.zeros_(layer.bias)
    assert hash_module(layer) != hash_module(layer.half())


def test_full_fp16_unscales_gradients_that_are_fp16_themselves() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    allow_fp16_gradients(scaler)
    scaler.scale((parameter.float() * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1, 2, 3]
    scaler.step(optimizer)
    assert parameter.tolist() == [0.5, 0, -0.5]


def test_a_given_seed_is_kept_and_a_random_one_is_in_numpys_range() -> None:
    assert choose_seed(0, Processes(), None) == 0
    assert all(0 <= choose_seed(None, Processes(), None) < 2**32 for _ in range(20))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"network_train_unet_only": True}, False),
        ({"text_encoder_lr": [0.0]}, False),
        ({"text_encoder_lr": [0.0, 1e-4]}, True),
        ({"learning_rate": 0.0}, False),
        ({"learning_rate": 0.0, "text_encoder_lr": [1e-5]}, True),
    ],
)
def test_text_encoders_are_trained_if_their_rate_is_not_zero(values: dict[str, Any], expected: bool) -> None:
    options = options_of(**values)
    assert options.trains_text_encoders is expected


@pytest.mark.parametrize(
    ("values", "num_groups", "expected"),
    [
        ({}, 2, ["textencoder", "unet"]),
        ({}, 3, ["group0", "group1", "group2"]),
        ({"network_train_unet_only": True}, 1, ["unet"]),
        ({"network_train_text_encoder_only": True}, 1, ["textencoder"]),
        ({"network_train_unet_only": True}, 2, ["group0", "group1"]),
    ],
)
def test_unnamed_groups_get_distinct_names(values: dict[str, Any], num_groups: int, expected: list[str]) -> None:
    options = options_of(**values)
    trains_denoiser = not options.network.network_train_text_encoder_only
    assert name_groups(num_groups, trains_denoiser, options.trains_text_encoders) == expected
