"""Network arguments that a base model gives a meaning to."""

import logging

import pytest

from networks import lora
from tests.unit.networks.toy import TextEncoder
from tests.unit.networks.toy_transformer import ToyTransformer, toy_transformer

ALL = 2 * 2 + 3 * 2  # blocks without what is excluded


def ranks(model: ToyTransformer | None = None, dim: int = 4, **arguments: str) -> dict[str, int]:
    encoders = [TextEncoder(), TextEncoder()]
    network = lora.create_network(1.0, dim, 1, None, encoders, model or toy_transformer(0), **arguments)
    return {name: adapter.change.delta.rank for name, adapter in network.adapters.items()}  # type: ignore[union-attr]


def denoiser_ranks(**arguments: str) -> dict[str, int]:
    found = ranks(**arguments).items()
    return {name.removeprefix("lora_unet_"): rank for name, rank in found if name.startswith("lora_unet")}


def test_without_arguments_every_block_has_the_network_rank() -> None:
    found = denoiser_ranks()
    assert len(found) == ALL and set(found.values()) == {4}
    assert not any("mod" in name or name.endswith("_in") or "extra" in name for name in found)


def test_ranks_by_type_reach_their_layers_alone_and_0_leaves_them_out() -> None:
    found = denoiser_ranks(img_attn_dim="7", single_dim="0")
    assert set(found) == {f"doubles_{n}_attn_{name}" for n in range(2) for name in ("qkv", "proj")}
    assert set(found.values()) == {7}


def test_embedders_are_adapted_only_when_asked_for_each_with_its_rank() -> None:
    found = denoiser_ranks(in_dims="[5,6,7]")
    assert {name: rank for name, rank in found.items() if rank != 4} == {
        "img_in": 5, "time_in_in_layer": 6, "time_in_out_layer": 6, "patch": 7,
    }  # fmt: skip
    assert len(denoiser_ranks(in_dims="0,6,0")) == ALL + 2


def test_conv_dim_goes_before_the_rank_of_an_embedder_that_is_a_convolution() -> None:
    assert denoiser_ranks(in_dims="5,6,0", conv_dim="9")["patch"] == 9


def test_blocks_are_chosen_by_number_and_by_kind() -> None:
    assert {name for name in denoiser_ranks(train_double_block_indices="1", train_single_block_indices="0,2")} == {
        "doubles_1_attn_qkv", "doubles_1_attn_proj",
        "single_0_linear1", "single_0_linear2", "single_2_linear1", "single_2_linear2",
    }  # fmt: skip
    assert all(name.startswith("single") for name in denoiser_ranks(train_blocks="single"))
    assert len(denoiser_ranks(train_blocks="double", in_dims="4,0,0")) == 5  # embedders lie outside the blocks


def test_an_expression_goes_before_types_and_chosen_blocks_and_meets_text_encoders_too() -> None:
    found = ranks(
        network_reg_dims="doubles_1_attn_qkv=16,doubles_1=2,te1_layers_0=3",
        img_attn_dim="8",
        train_double_block_indices="0",
    )
    assert found["lora_unet_doubles_1_attn_qkv"] == 16
    assert found["lora_unet_doubles_1_attn_proj"] == 2
    assert found["lora_unet_doubles_0_attn_qkv"] == 8
    assert (found["lora_te1_layers_0_q_proj"], found["lora_te1_layers_1_q_proj"]) == (3, 4)
    assert "lora_unet_single_0_linear1" not in denoiser_ranks(network_reg_dims="single_0=0")


def test_a_text_encoder_that_needs_an_argument_waits_for_it() -> None:
    assert not any(name.startswith("lora_te3") for name in ranks())
    assert sum(name.startswith("lora_te3") for name in ranks(train_t5xxl="True")) == 2


def test_excluded_modules_come_back_by_include_patterns_and_more_can_be_excluded() -> None:
    assert {name for name in denoiser_ranks() if "mod" in name} == set()
    assert len(denoiser_ranks(include_patterns=r"doubles\.0\.mod")) == ALL + 1
    assert len(denoiser_ranks(exclude_patterns=r"['single.*', '.*qkv']")) == 2
    assert len(denoiser_ranks(train_llm_adapter="True")) == ALL + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_double_block_indices": "0,2"}, "names block 2, but the base model has 2 of them: 0 to 1"),
        ({"in_dims": "4,4"}, "in_dims has 2 entries; it needs 3: img_in, time_in, patch"),
        ({"train_blocks": "triple"}, "train_blocks=triple: this base model has all, double, single"),
        (
            {"train_blocks": "double", "train_double_block_indices": "none", "network_reg_dims": "te1=0"},
            "every module has the rank 0",
        ),
    ],
)
def test_what_the_base_model_does_not_have_is_an_error(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"emb_dims": "4,4"}, "emb_dims has no effect: it belongs to other base models"),
        ({"conv_dim": "8"}, "conv_dim has no effect"),
        ({"network_reg_lrs": "nowhere=1"}, "nothing is adapted that nowhere fits"),
    ],
)
def test_what_has_no_effect_is_said(arguments: dict[str, str], message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ranks(**arguments) == ranks()
    assert message in caplog.text


def test_rates_by_expression_stand_for_the_rate_of_the_part_and_loraplus_multiplies_them() -> None:
    model = toy_transformer(0)
    network = lora.create_network(
        1.0, 4, 1, None, None, model, network_reg_lrs="single_0=0.5,doubles=0", loraplus_lr_ratio="4"
    )
    network.apply_to(None, model, False, True)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 0.25, 1.0)
    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates == {"unet reg_lr_0": 0.5, "unet reg_lr_0 plus": 2.0, "unet": 0.25, "unet plus": 1.0}
    network.prepare_grad_etc(None, model)
    trained = {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {f"lora_unet_single_{n}_linear{i}" for n in range(3) for i in (1, 2)}


def test_rates_by_expression_count_for_a_network_from_a_file() -> None:
    model = toy_transformer(0)
    weights = lora.create_network(1.0, 4, 1, None, None, model, in_dims="1,1,1").state_dict()
    network, _ = lora.create_network_from_weights(
        1.0, "file", None, None, model, dict(weights), network_reg_lrs="single_0=0.5"
    )
    assert {name for name in network.state_dict()} == set(weights)
    _, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 0.25, 1.0)
    assert names == ["unet", "unet reg_lr_0"]
