"""Ranks, alphas and learning rate factors per layer and block."""

import math
import re
from dataclasses import replace

import pytest
from torch import nn

from library.options.declared import list_declared
from networks.core.arguments.common import COMMON
from networks.core.arguments.lr_curves import LrPreset
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.targets.rules import Rules, TargetSettings, make_lr_factors, make_rules, preset_factors
from networks.core.targets.targets import AdapterTargets, BlockList, Part, TargetModule

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
