"""Finding the modules to adapt."""

import re

import pytest
from torch import nn

from networks.core.targets.targets import BlockList, Part, adaptation_kind, find_target_modules
from tests.unit.networks.toy import toy_models


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
