"""Random dropout of text encoders and random crops of the position table, drawn for each training step."""

import pytest
import torch

from library.architectures.sd3.conditioning_dropout import Variation
from library.types import Conditioning

L, G, T5 = 3, 5, 7


def conditioning(num_samples: int, with_t5: bool = True) -> dict[str, torch.Tensor]:
    features = {
        "lg_out": torch.ones(num_samples, 4, L + G),
        "lg_pooled": torch.ones(num_samples, 2 * (L + G)),
        "clip_l_attn_mask": torch.ones(num_samples, 4, dtype=torch.int64),
        "clip_g_attn_mask": torch.ones(num_samples, 4, dtype=torch.int64),
    }
    if with_t5:
        features |= {"t5_out": torch.ones(num_samples, 6, T5), "t5_attn_mask": torch.ones(num_samples, 6)}
    return features


def vary(num_samples: int, seed: int = 1, with_t5: bool = True, **rates: float) -> Conditioning:
    all_rates = {"clip_l": 0.0, "clip_g": 0.0, "t5": 0.0, "position": 0.0} | rates
    variation = Variation(**all_rates, clip_l_width=L, clip_l_pooled_width=2 * L)  # type: ignore[arg-type]
    return variation(conditioning(num_samples, with_t5), torch.Generator().manual_seed(seed))


def test_nothing_changes_at_rate_0() -> None:
    before, after = conditioning(4), vary(4)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_dropping_an_encoder_zeroes_its_states_pooled_features_and_mask_only() -> None:
    after = vary(2, clip_l=1.0)
    assert after["lg_out"][..., :L].eq(0).all() and after["lg_out"][..., L:].eq(1).all()
    assert after["lg_pooled"][:, : 2 * L].eq(0).all() and after["lg_pooled"][:, 2 * L :].eq(1).all()
    assert after["clip_l_attn_mask"].eq(0).all() and after["clip_g_attn_mask"].eq(1).all()
    after = vary(2, clip_g=1.0, t5=1.0)
    assert after["lg_out"][..., :L].eq(1).all() and after["lg_out"][..., L:].eq(0).all()
    assert after["t5_out"].eq(0).all() and after["t5_attn_mask"].eq(0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_sample_and_each_encoder_is_dropped_independently(rate: float) -> None:
    n = 20_000
    after = vary(n, clip_l=rate, clip_g=rate, t5=rate)
    drops = torch.stack([after["lg_out"][:, 0, 0] == 0, after["lg_out"][:, 0, -1] == 0, after["t5_out"][:, 0, 0] == 0])
    deviation = (rate * (1 - rate) / n) ** 0.5
    assert (drops.double().mean(1) - rate).abs().max() < 4 * deviation
    both = (drops[0] & drops[1]).double().mean().item()
    assert abs(both - rate**2) < 4 * (rate**2 / n) ** 0.5


def test_one_rate_does_not_affect_the_draws_of_another() -> None:
    alone, together = vary(500, t5=0.3), vary(500, t5=0.3, clip_l=0.7)
    assert torch.equal(alone["t5_out"], together["t5_out"])


def test_without_t5_no_t5_features_are_added() -> None:
    assert "t5_out" not in vary(3, with_t5=False, t5=1.0)


def test_a_whole_batch_shares_one_random_position() -> None:
    assert "position" not in vary(3)
    places = torch.stack([vary(3, seed, position=0.5).get("position", torch.full((3, 2), -1.0)) for seed in range(400)])
    assert torch.equal(places, places[:, :1].expand_as(places)), "one table of positions serves the whole batch"
    moved = places[places[:, 0, 0] >= 0, 0]
    assert 150 < len(moved) < 250
    assert moved.min() >= 0 and moved.max() < 1 and abs(moved.mean() - 0.5) < 0.08


def test_gradients_reach_the_encoders_that_are_not_dropped() -> None:
    features = conditioning(1)
    features["lg_out"].requires_grad_()
    variation = Variation(1.0, 0.0, 0.0, 0.0, L, 2 * L)
    variation(features, torch.Generator().manual_seed(1))["lg_out"].sum().backward()
    assert features["lg_out"].grad is not None
    assert features["lg_out"].grad[0, 0].tolist() == [0.0] * L + [1.0] * G
