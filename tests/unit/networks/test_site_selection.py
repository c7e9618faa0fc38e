"""Finding the modules to adapt, with ranks, alphas and learning rate factors per layer and block."""

import logging
import math
import re
from dataclasses import replace

import pytest
from torch import nn

from library.options.declared import list_declared
from networks import lora, oft_v2
from networks.core.arguments.common import COMMON
from networks.core.arguments.lr_curves import LrPreset
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.targets.rules import Rules, TargetSettings, make_lr_factors, make_rules, preset_factors
from networks.core.targets.targets import (
    AdapterTargets,
    BlockList,
    Part,
    TargetModule,
    adaptation_kind,
    find_target_modules,
)
from tests.unit.networks.toy import TextEncoder, toy_models
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


# Ranks, alphas and learning rate factors per layer and block.

LAYOUT = BlockList(("", r"^down\.0\.", r"^down\.1\.", r"^mid\.", r"^up\.0\."), down=3, mid=1, up=1)
TARGETS = AdapterTargets(Part("lora_unet", ()), block_list=LAYOUT)


def target(path: str, kind: str = "plain") -> TargetModule:
    return TargetModule(path, path, nn.Identity(), kind)  # type: ignore[arg-type]


def arguments_with(**given: object) -> NetworkArguments:
    declared = {group: [name for name in list_declared(group) if name in given] for group in COMMON}
    return NetworkArguments(
        {group: group(**{name: given[name] for name in names}) for group, names in declared.items()}
    )


def rules(**given: object) -> Rules:
    return make_rules(4, 1.0, arguments_with(**given), TARGETS, is_denoiser=True)


def test_plain_layers_get_the_network_rank_and_larger_kernels_are_not_adapted() -> None:
    assert rules().resolve_settings(target("down.0.to_q")) == TargetSettings(4, 1.0)
    assert rules().resolve_settings(target("down.0.conv1", "conv")).rank == 0


def test_conv_dim_applies_to_larger_kernels_with_an_alpha_of_1() -> None:
    assert rules(conv_dim=8).resolve_settings(target("down.0.conv1", "conv")) == TargetSettings(8, 1.0)
    assert rules(conv_dim=8, conv_alpha=2.5).resolve_settings(target("down.0.conv1", "conv")) == TargetSettings(8, 2.5)
    assert rules(conv_dim=8).resolve_settings(target("down.0.to_q")) == TargetSettings(4, 1.0)


def test_block_dims_set_the_rank_per_block_and_text_encoders_ignore_them() -> None:
    by_block = rules(block_dims=(1, 2, 3, 4, 5), block_alphas=(1.0, 0.5, 3.0, 4.0, 5.0))
    assert by_block.resolve_settings(target("down.0.to_q")) == TargetSettings(2, 0.5)
    assert by_block.resolve_settings(target("up.0.to_q")) == TargetSettings(5, 5.0)
    assert by_block.resolve_settings(target("elsewhere.to_q")) == TargetSettings(4, 1.0)
    in_text = make_rules(4, 1.0, arguments_with(block_dims=(1, 2, 3, 4, 5)), TARGETS, is_denoiser=False)
    assert in_text.resolve_settings(target("down.0.to_q")) == TargetSettings(4, 1.0)


def test_block_alphas_default_to_the_network_alpha_and_block_conv_ranks_to_conv_dim() -> None:
    by_block = rules(block_dims=(1, 2, 3, 4, 5), conv_dim=6)
    assert by_block.resolve_settings(target("mid.to_q")) == TargetSettings(4, 1.0)
    assert by_block.resolve_settings(target("mid.conv1", "conv")) == TargetSettings(6, 1.0)
    lists = rules(
        block_dims=(1, 2, 3, 4, 5), conv_block_dims=(5, 4, 3, 2, 1), conv_block_alphas=(9.0, 8.0, 7.0, 6.0, 5.0)
    )
    assert lists.resolve_settings(target("mid.conv1", "conv")) == TargetSettings(2, 6.0)


@pytest.mark.parametrize("name", ["block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"])
def test_a_list_of_the_wrong_length_is_an_error_that_names_the_right_length_and_the_blocks(name: str) -> None:
    given: dict[str, object] = {"block_dims": (4, 4, 4, 4, 4), name: (1, 2, 3)}
    with pytest.raises(
        ValueError, match=re.escape(f"{name} has 3 entries; this base model needs 5, one per block: 0: no")
    ):
        rules(**given)


def test_block_arguments_need_a_base_model_with_numbered_blocks() -> None:
    with pytest.raises(ValueError, match="block_dims, mid_lr_weight: this base model has no numbered blocks"):
        without = replace(TARGETS, block_list=None)
        make_rules(4, 1.0, arguments_with(block_dims=(1,), mid_lr_weight=(1.0,)), without, is_denoiser=True)


def test_factors_scale_learning_rates_and_0_excludes_a_block() -> None:
    by_factor = rules(down_lr_weight=(1.0, 0.0, 0.5), up_lr_weight=(2.0,))
    assert by_factor.resolve_settings(target("down.0.to_q")) == TargetSettings(0, 1.0, 0.0, 1)
    assert by_factor.resolve_settings(target("down.1.to_q")) == TargetSettings(4, 1.0, 0.5, 2)
    assert by_factor.resolve_settings(target("mid.to_q")) == TargetSettings(4, 1.0, 1.0, 3)
    assert by_factor.resolve_settings(target("up.0.to_q")) == TargetSettings(4, 1.0, 2.0, 4)
    assert by_factor.resolve_settings(target("elsewhere")) == TargetSettings(4, 1.0)


def factors(layout: BlockList = LAYOUT, **given: object) -> tuple[float, ...]:
    lr_factors = make_lr_factors(arguments_with(**given), layout)
    assert lr_factors is not None
    return lr_factors.factors


def test_a_short_list_is_padded_with_1_and_a_single_number_applies_to_all() -> None:
    assert factors(down_lr_weight=(0.5, 0.25)) == (0.5, 0.25, 1, 1, 1)
    assert factors(down_lr_weight=(0.5,)) == (0.5, 0.5, 0.5, 1, 1)


def test_factors_not_above_the_threshold_are_0() -> None:
    assert factors(down_lr_weight=(0.1, 0.2, 0.3), block_lr_zero_threshold=0.2) == (0, 0, 0.3, 1, 1)


def test_padding_entries_have_the_factor_1() -> None:
    padded = BlockList(("", "a", "b", "c", ""), down=1, mid=1, up=1, padding=1)
    assert factors(padded, mid_lr_weight=(0.0,)) == (1, 1, 0, 1, 1)


def test_a_list_that_is_too_long_is_an_error_unless_the_rest_is_1(caplog: pytest.LogCaptureFixture) -> None:
    """lora-scripts uses the same form for all base models and writes twelve entries for SDXL too."""
    with pytest.raises(ValueError, match="mid_lr_weight has 2 entries; there are 1"):
        factors(mid_lr_weight=(1.0, 0.5))
    assert factors(mid_lr_weight=(0.5, 1.0)) == factors(mid_lr_weight=(0.5,))
    assert "mid_lr_weight has 2 entries, of which the first 1 count" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [1, math.sin(math.pi / 3), 0.5, 0]),
        ("sine", [0, 0.5, math.sin(math.pi / 3), 1]),
        ("linear", [0, 1 / 3, 2 / 3, 1]),
        ("reverse_linear", [1, 2 / 3, 1 / 3, 0]),
        ("zeros", [0, 0, 0, 0]),
    ],
)
def test_presets_are_quarter_waves_and_lines(name: str, expected: list[float]) -> None:
    assert preset_factors(LrPreset(name), 4) == pytest.approx(expected, abs=1e-12)
    assert preset_factors(LrPreset(name, 0.25), 4) == pytest.approx([value + 0.25 for value in expected])


# Finding the modules to adapt.


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), "plain"),
        (nn.Conv2d(2, 2, 1), "plain"),
        (nn.Conv2d(2, 2, (1, 1), stride=2), "plain"),
        (nn.Conv2d(2, 2, 3), "conv"),
        (nn.Conv2d(2, 2, (1, 3)), "conv"),
        (nn.LayerNorm(2), None),
        (nn.Embedding(2, 2), None),
        (nn.Conv1d(2, 2, 1), None),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_linears_and_convolutions_are_found(module: nn.Module, kind: str | None) -> None:
    assert adaptation_kind(module) == kind


def test_sites_are_named_by_prefix_and_path_in_the_order_of_the_model() -> None:
    _, unet = toy_models(501)
    target_modules = find_target_modules(Part("p", ("Transformer2DModel",)), unet, ("Transformer2DModel",))
    assert [(s.name, s.path, s.kind) for s in target_modules[:2]] == [
        ("p_down_0_attention_proj_in", "down.0.attention.proj_in", "plain"),
        ("p_down_0_attention_to_q", "down.0.attention.to_q", "plain"),
    ]
    assert target_modules[0].module is unet.down[0].attention.proj_in
    assert len(target_modules) == 6


def test_a_block_inside_a_block_is_searched_once() -> None:
    _, unet = toy_models(502)
    target_modules = find_target_modules(Part("p", ()), unet, ("Transformer2DModel", "Block"))
    paths = [target.path for target in target_modules]
    assert len(paths) == len(set(paths)) == 12


def test_excluded_paths_must_match_completely() -> None:
    _, unet = toy_models(503)
    classes = ("Transformer2DModel",)
    assert len(find_target_modules(Part("p", classes, exclude=(r"mid\..*",)), unet, classes)) == 4
    assert len(find_target_modules(Part("p", classes, exclude=(r"mid",)), unet, classes)) == 6


def test_a_path_belongs_to_the_block_of_the_first_matching_pattern() -> None:
    layout = BlockList(("", r"^down\.0\.", r"^mid\."), down=2, mid=1, up=0)
    assert [layout.index_of(path) for path in ("down.0.x", "mid.x", "down.10.x", "conv_in")] == [1, 2, None, None]


def test_every_adapted_layer_of_the_sd_unet_belongs_to_one_block() -> None:
    from library.architectures.sd.layers import TARGETS

    layout = TARGETS.block_list
    assert layout is not None and len(layout.patterns) == 25 == layout.down + layout.mid + layout.up
    for path, block in (
        ("down_blocks.0.attentions.0.proj_in", 1),
        ("down_blocks.0.downsamplers.0.conv", 3),
        ("down_blocks.3.resnets.1.conv2", 11),
        ("mid_block.attentions.0.proj_in", 12),
        ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.0.upsamplers.0.conv", 15),
        ("up_blocks.3.attentions.2.proj_out", 24),
    ):
        assert [i for i, p in enumerate(layout.patterns) if p and re.search(p, path)] == [block]
