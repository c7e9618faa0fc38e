"""Network arguments whose meaning depends on the base model."""

import logging
from dataclasses import replace

import pytest

from networks import lora, oft_v2
from tests.unit.networks.toy import TextEncoder
from tests.unit.networks.toy_transformer import ToyTransformer, toy_transformer

ALL = 2 * 2 + 3 * 2  # blocks without the excluded layers


def ranks(model: ToyTransformer | None = None, dim: int = 4, **arguments: str) -> dict[str, int]:
    encoders = [TextEncoder(), TextEncoder()]
    network = lora.create_network(1.0, dim, 1, None, encoders, model or toy_transformer(0), **arguments)
    return {name: adapter.change.delta.rank for name, adapter in network.adapters.items()}  # type: ignore[union-attr]


def denoiser_ranks(**arguments: str) -> dict[str, int]:
    items = ranks(**arguments).items()
    return {name.removeprefix("lora_unet_"): rank for name, rank in items if name.startswith("lora_unet")}


def test_without_arguments_every_block_has_the_network_rank() -> None:
    ranks_by_path = denoiser_ranks()
    assert len(ranks_by_path) == ALL and set(ranks_by_path.values()) == {4}
    assert not any("mod" in name or name.endswith("_in") or "extra" in name for name in ranks_by_path)


def test_ranks_by_type_affect_only_their_layers_and_0_excludes_them() -> None:
    ranks_by_path = denoiser_ranks(img_attn_dim="7", single_dim="0")
    assert set(ranks_by_path) == {f"doubles_{n}_attn_{name}" for n in range(2) for name in ("qkv", "proj")}
    assert set(ranks_by_path.values()) == {7}


def test_embedders_are_adapted_only_on_request_each_with_its_rank() -> None:
    ranks_by_path = denoiser_ranks(in_dims="[5,6,7]")
    assert {name: rank for name, rank in ranks_by_path.items() if rank != 4} == {
        "img_in": 5,
        "time_in_in_layer": 6,
        "time_in_out_layer": 6,
        "patch": 7,
    }
    assert len(denoiser_ranks(in_dims="0,6,0")) == ALL + 2


def test_conv_dim_overrides_the_rank_of_a_convolutional_embedder() -> None:
    assert denoiser_ranks(in_dims="5,6,0", conv_dim="9")["patch"] == 9


def test_blocks_are_chosen_by_number_and_by_kind() -> None:
    assert {name for name in denoiser_ranks(train_double_block_indices="1", train_single_block_indices="0,2")} == {
        "doubles_1_attn_qkv", "doubles_1_attn_proj",
        "single_0_linear1", "single_0_linear2", "single_2_linear1", "single_2_linear2",
    }  # fmt: skip
    assert all(name.startswith("single") for name in denoiser_ranks(train_blocks="single"))
    assert len(denoiser_ranks(train_blocks="double", in_dims="4,0,0")) == 5  # embedders are outside the blocks


def test_an_expression_overrides_types_and_blocks_and_applies_to_text_encoders_too() -> None:
    ranks_by_path = ranks(
        network_reg_dims="doubles_1_attn_qkv=16,doubles_1=2,te1_layers_0=3",
        img_attn_dim="8",
        train_double_block_indices="0",
    )
    assert ranks_by_path["lora_unet_doubles_1_attn_qkv"] == 16
    assert ranks_by_path["lora_unet_doubles_1_attn_proj"] == 2
    assert ranks_by_path["lora_unet_doubles_0_attn_qkv"] == 8
    assert (ranks_by_path["lora_te1_layers_0_q_proj"], ranks_by_path["lora_te1_layers_1_q_proj"]) == (3, 4)
    assert "lora_unet_single_0_linear1" not in denoiser_ranks(network_reg_dims="single_0=0")


def test_an_optional_text_encoder_is_adapted_only_with_its_argument() -> None:
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
def test_arguments_that_do_not_match_the_base_model_are_errors(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"emb_dims": "4,4"}, "emb_dims has no effect: it belongs to other base models"),
        ({"conv_dim": "8"}, "conv_dim has no effect"),
        ({"network_reg_lrs": "nowhere=1"}, "nothing is adapted that nowhere fits"),
        ({"exclude_patterns": r"['atn', 'qkv']"}, "exclude_patterns: no module has the whole path atn or qkv (paths"),
        ({"include_patterns": ".*qkv"}, "include_patterns: no module that is left out has the whole path .*qkv"),
        ({"tlora": "True", "tlora_min_rank": "4"}, "tlora_min_rank=4: no layer of the denoiser has more ranks"),
    ],
)
def test_arguments_without_effect_are_warned_about(
    arguments: dict[str, str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ranks(**arguments) == ranks()
    assert message in caplog.text


def test_an_expression_for_a_part_of_a_path_is_warned_about_where_only_whole_paths_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = toy_transformer(0)
    model.adapter_targets = replace(model.adapter_targets, expressions="path")
    with caplog.at_level(logging.WARNING):
        assert ranks(model, network_reg_dims="attn_qkv=8") == ranks()
    assert "nothing is adapted that attn_qkv fits; here an expression must fit a whole path, such as" in caplog.text
    caplog.clear()
    assert 8 in ranks(model, network_reg_dims=r".*\.attn_qkv=8").values()
    assert not caplog.text


def test_patterns_and_ranks_with_an_effect_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ranks(exclude_patterns=r"single.*", include_patterns=r"['.*mod', 'single.0.*']", tlora="1", tlora_min_rank="3")
        oft_v2.create_network(1.0, 4, 1, None, None, toy_transformer(0), include_patterns=".*qkv")
    assert not caplog.text


def test_a_pattern_of_a_rotation_that_selects_nothing_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        oft_v2.create_network(1.0, 4, 1, None, None, toy_transformer(0), include_patterns="['.*qkv', '.*atn']")
    assert "include_patterns: no module has the whole path .*atn" in caplog.text


def test_rates_by_expression_replace_the_rate_of_the_part_and_loraplus_multiplies_them() -> None:
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


def test_rates_by_expression_apply_to_a_network_from_a_file(caplog: pytest.LogCaptureFixture) -> None:
    model = toy_transformer(0)
    weights = lora.create_network(1.0, 4, 1, None, None, model, in_dims="1,1,1").state_dict()
    network, _ = lora.create_network_from_weights(
        1.0, "file", None, None, model, dict(weights), network_reg_lrs="single_0=0.5,nowhere=1"
    )
    assert "network_reg_lrs: nothing is adapted that nowhere fits" in caplog.text
    assert {name for name in network.state_dict()} == set(weights)
    _, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 0.25, 1.0)
    assert names == ["unet", "unet reg_lr_0"]
