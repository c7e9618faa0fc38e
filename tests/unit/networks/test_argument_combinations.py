"""Random network arguments: valid ones train a step without NaN, errors name invalid ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import dylora, lora, lora_fa
from networks.core.registry.parsing import list_arguments
from tests.unit.networks.toy import toy_models

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
