"""Network arguments: values are typed, nothing is ignored silently, and random ones train or are refused."""

import importlib
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.architectures.specs import list_network_arguments, list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from library.options.declared import list_declared
from library.options.kinds import parse_text
from networks import dylora, lora, lora_fa
from networks.core.arguments.common import DropoutArguments, RankArguments
from networks.core.arguments.lr_curves import LrPreset
from networks.core.arguments.values import SWITCH, Selection
from networks.core.registry.layouts import list_kinds
from networks.core.registry.parsing import list_arguments, list_groups, parse_arguments
from networks.core.targets.targets import AdapterTargets
from tests.unit.networks.toy import toy_models

ARCHITECTURES = Path(__file__).parents[3] / "library" / "architectures"


def test_strings_become_typed_values() -> None:
    got = parse_arguments(
        {
            "conv_dim": "8", "conv_alpha": "4.5", "block_dims": "1, 2,,3", "down_lr_weight": "0.5,1",
            "up_lr_weight": "cosine+0.25", "rank_dropout": ".1", "module_dropout": "0.2", "loraplus_lr_ratio": "16",
        }
    )  # fmt: skip
    assert got.given == {
        "conv_dim": 8, "conv_alpha": 4.5, "block_dims": (1, 2, 0, 3), "down_lr_weight": (0.5, 1.0),
        "up_lr_weight": LrPreset("cosine", 0.25), "rank_dropout": 0.1, "module_dropout": 0.2,
        "loraplus_lr_ratio": 16.0,
    }  # fmt: skip
    assert got.of(RankArguments).conv_dim == 8 and got.of(DropoutArguments).module_dropout == 0.2


def test_values_may_already_be_typed_and_none_means_unset() -> None:
    got = parse_arguments({"conv_dim": 8, "block_dims": [1, 2], "rank_dropout": None}, neuron_dropout=0.1)
    assert got.given == {"conv_dim": 8, "block_dims": (1, 2), "neuron_dropout": 0.1}


def test_network_dropout_and_its_lycoris_name_are_equivalent() -> None:
    assert parse_arguments({"dropout": "0.25"}).given == {"neuron_dropout": 0.25}
    assert parse_arguments({"dropout": 0.25}, neuron_dropout=0.25).given == {"neuron_dropout": 0.25}
    assert parse_arguments({"dropout": None}, neuron_dropout=0.25).given == {"neuron_dropout": 0.25}
    with pytest.raises(ValueError, match=r"dropout=0\.2 and --network_dropout=0\.1 mean the same and differ"):
        parse_arguments({"dropout": "0.2"}, neuron_dropout=0.1)
    with pytest.raises(ValueError, match=re.escape("--network_args dropout=a: expected a chance")):
        parse_arguments({"dropout": "a"})


def test_an_invalid_network_dropout_is_named_by_its_flag() -> None:
    with pytest.raises(ValueError, match=re.escape("--network_dropout=1.5: expected a chance")):
        parse_arguments({}, neuron_dropout=1.5)


@pytest.mark.parametrize(
    "items",
    [
        {"conv_alpha": "2"},
        {"block_alphas": "1,2"},
        {"conv_block_alphas": "1,2"},
        {"block_lr_zero_threshold": "0.1"},
        {"coft_eps": "1e-3"},
    ],
)
def test_an_argument_without_the_one_it_needs_warns(items: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_arguments(items)
    assert f"{next(iter(items))} has no effect without" in caplog.text


def test_arguments_that_belong_together_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_arguments(
            {"conv_dim": "8", "conv_alpha": "2", "block_dims": "1", "block_alphas": "1", "conv_block_alphas": "1"}
        )
    assert caplog.text == ""


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "1", "yes", " on "])
def test_true_has_many_spellings(word: str) -> None:
    assert parse_text(word, SWITCH) is True


@pytest.mark.parametrize("word", ["False", "false", "0", "no", "n", "off"])
def test_false_has_many_spellings(word: str) -> None:
    assert parse_text(word, SWITCH) is False


def test_any_other_word_is_not_a_boolean() -> None:
    with pytest.raises(ValueError, match="expected True or False"):
        parse_text("maybe", SWITCH)


def test_every_argument_has_a_help_text_and_differs_from_base_model_arguments() -> None:
    assert len(list_arguments()) == 50
    assert not list_arguments().keys() & list_network_arguments().keys()
    for name, argument in list_arguments().items():
        assert argument.help.endswith("."), name
        required = {other for names in argument.needs.groups for other in names}
        assert required <= list_arguments().keys()


def test_kinds_that_share_an_argument_parse_it_identically() -> None:
    readers: dict[str, set[Any]] = {}
    for group in list_groups():
        for name, argument in list_declared(group).items():
            readers.setdefault(name, set()).add(argument.kind)
    assert all(len(parsers) == 1 for parsers in readers.values())
    assert {kind.network_module for kind in list_kinds() if "block_size" in list_declared(kind.arguments)} == {
        "networks.boft",
        "networks.oft_v2",
    }


def test_base_model_arguments_are_typed_too() -> None:
    got = parse_arguments(
        {
            "img_attn_dim": "8", "in_dims": "[1, 2,,4,5]", "train_t5xxl": "true", "train_blocks": "single",
            "train_double_block_indices": "0-2, 5", "train_single_block_indices": "none", "train_block_indices": "all",
        },
        of_models=list_network_arguments(),
    ).of_model  # fmt: skip
    assert got == {
        "img_attn_dim": 8, "in_dims": (1, 2, 0, 4, 5), "train_t5xxl": True, "train_blocks": "single",
        "train_double_block_indices": Selection(frozenset({0, 1, 2, 5})),
        "train_single_block_indices": Selection(frozenset()), "train_block_indices": Selection(),
    }  # fmt: skip


@pytest.mark.parametrize("spec", list_specs(), ids=lambda spec: spec.name)
def test_every_base_model_recognises_the_arguments_of_the_others(spec: BaseModelSpec) -> None:
    """Such an argument is parsed, and a warning follows when the network is created; it is not an unknown argument."""
    package = next(path for path in ARCHITECTURES.iterdir() if spec in specs_in(path))
    name = f"library.architectures.{package.name}"
    file = "layers" if importlib.util.find_spec(f"{name}.layers") else "targets"
    declared = vars(importlib.import_module(f"{name}.{file}")).values()
    (targets,) = (
        each for each in declared if isinstance(each, AdapterTargets) and each.arguments == spec.network_arguments
    )
    assert targets.known_arguments == list_network_arguments()
    got = parse_arguments({"in_dims": "1,2", "train_llm_adapter": "yes"}, of_models=targets.known_arguments).of_model
    assert got == {"in_dims": (1, 2), "train_llm_adapter": True}


def specs_in(package: Path) -> tuple[BaseModelSpec, ...]:
    is_one = (package / "spec.py").is_file()
    return importlib.import_module(f"library.architectures.{package.name}.spec").SPECS if is_one else ()


def test_base_models_agree_on_the_format_of_shared_arguments() -> None:
    for name, form in list_network_arguments().items():
        assert {spec.network_arguments[name] for spec in list_specs() if name in spec.network_arguments} == {form}


def test_expressions_and_patterns_keep_their_order() -> None:
    got = parse_arguments(
        {"network_reg_dims": "a=b=4,.*_0_=0", "network_reg_lrs": "x=1e-3", "exclude_patterns": "['.*mlp.*', '.*q']"}
    )
    assert got.given == {
        "network_reg_dims": (("a=b", 4), (".*_0_", 0)),
        "network_reg_lrs": (("x", 1e-3),),
        "exclude_patterns": (".*mlp.*", ".*q"),
    }
    assert parse_arguments({"include_patterns": ".*[kv]"}).given == {"include_patterns": (".*[kv]",)}


# Random network arguments: valid ones train a step without NaN, errors name invalid ones.

chances = st.sampled_from(["0", "0.1", "0.5", "0.9"])
ranks = st.sampled_from(["1", "2", "3", "8"])
flags = st.sampled_from(["True", "true", "1", "yes", "False", "false", "0", "no"])
numbers = st.sampled_from(["0.5", "1", "4"])
rank_lists = st.lists(st.sampled_from("0124"), min_size=4, max_size=4).filter(lambda r: "4" in r[1:]).map(",".join)
alpha_lists = st.lists(st.sampled_from(["0", "0.5", "2"]), min_size=4, max_size=4).map(",".join)

ANY_KIND: dict[str, st.SearchStrategy[str]] = {
    "conv_dim": ranks,
    "conv_alpha": numbers,
    "block_dims": rank_lists,
    "block_alphas": alpha_lists,
    "down_lr_weight": st.sampled_from(["1", "0,1", "cosine+0.25", "sine"]),
    "mid_lr_weight": st.sampled_from(["1", "0.5"]),
    "up_lr_weight": st.sampled_from(["2", "reverse_linear+0.1"]),
    "block_lr_zero_threshold": st.sampled_from(["0", "0.2"]),
    "rank_dropout": chances,
    "module_dropout": chances,
    "neuron_dropout": chances,
    "loraplus_lr_ratio": numbers,
    "loraplus_unet_lr_ratio": numbers,
    "loraplus_text_encoder_lr_ratio": numbers,
    "use_scalar": flags,
    "train_norm": flags,
}
DORA = {"dora_wd": flags, "dora_constant_norm": flags, "wd_on_output": flags}
KINDS: dict[str, tuple[Any, dict[str, st.SearchStrategy[str]]]] = {
    "lora": (lora, {**ANY_KIND, **DORA, "use_tucker": flags}),
    "lora_fa": (lora_fa, {**ANY_KIND, **DORA}),
    "dylora": (dylora, {**ANY_KIND, "train_all_ranks": flags}),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_valid_combination_trains_a_step_and_is_limited_and_saved_without_nan(kind: str, data: Any) -> None:
    network_module, strategies = KINDS[kind]
    args = data.draw(st.fixed_dictionaries({}, optional=strategies), label="network args")
    text, unet = toy_models(data.draw(st.integers(0, 99), label="seed"))
    network = network_module.create_network(1.0, 4, 2.0, None, text, unet, **args)
    network.apply_to(text, unet)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-2)
    assert len(set(names)) == len(names) == len(groups)
    network.prepare_grad_etc(text, unet)
    network.on_epoch_start(text, unet)
    network.on_optimizer_step_start(5, 0)
    optimizer = torch.optim.AdamW(groups)
    is_checkpointed = data.draw(st.booleans(), label="recomputed")
    with torch.autocast("cpu", torch.bfloat16, enabled=data.draw(st.booleans(), label="bf16")):
        run = torch.utils.checkpoint.checkpoint if is_checkpointed else lambda module, x, **_: module(x)
        losses = [
            run(module, x, use_reentrant=False).float().square().mean()
            for module, x in ((text, torch.randn(2, 3, 7)), (unet, torch.randn(2, 6, 4, 4, requires_grad=True)))
        ]
    loss = torch.stack(losses).sum()
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    count, mean, maximum = network.apply_max_norm_regularization(0.01, "cpu")
    assert 0 <= mean <= maximum <= 0.01 * (1 + 1e-5)
    assert 0 <= count <= len(network.adapters)
    assert loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


BAD: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(
        ("use_tucker", "use_scalar", "train_norm", "dora_wd", "dora_constant_norm", "train_all_ranks"),
        st.sampled_from(["maybe", "2", "", "Trve"]),
    ),
    **dict.fromkeys(("conv_dim", "unit"), st.sampled_from(["-1", "two", "1.5", ""])),
    **dict.fromkeys(("rank_dropout", "module_dropout"), st.sampled_from(["1", "-0.1", "nan", "half"])),
    **dict.fromkeys(("block_dims", "down_lr_weight"), st.sampled_from(["1,2,3,4,x", "-1,1,1,1", "1,2,3,4,5,6"])),
    **dict.fromkeys(
        ("loraplus_lr_ratio", "conv_alpha", "block_lr_zero_threshold"), st.sampled_from(["-1", "inf", "fast"])
    ),
    **dict.fromkeys((f"{key}s" for key in list_arguments()), st.just("1")),  # misspelt
}


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_invalid_argument_is_named_whatever_the_other_arguments(data: Any) -> None:
    strategies = KINDS["lora"][1]
    key = data.draw(st.sampled_from(sorted(BAD)), label="bad argument")
    bad = {key: data.draw(BAD[key], label="value")}
    args = data.draw(st.fixed_dictionaries({}, optional=strategies), label="valid arguments")
    with pytest.raises(ValueError, match=rf"--network_args {key}\b"):
        lora.create_network(1.0, 4, 2.0, None, *toy_models(7), **{**args, **bad})


@pytest.mark.parametrize(
    ("network_module", "argument"), [(dylora, "dora_wd"), (dylora, "use_tucker"), (lora_fa, "use_tucker")]
)
def test_incompatible_arguments_are_an_error_that_says_why(network_module: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"--network_args {argument} does not work with this --network_module: \w+"):
        network_module.create_network(1.0, 4, 2.0, None, *toy_models(8), conv_dim="2", **{argument: "True"})
