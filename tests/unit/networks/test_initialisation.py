"""Initial values of LoRA factors, and ranks, norms and damage of adapter files."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.memory.frozen import freeze_layer
from networks import dylora, lora, lora_fa, tlora
from networks.core.changes.adapter import Adapter
from networks.core.changes.init import FromStart, make_starting_delta
from networks.core.files.adapter_file import sort_tensors
from networks.core.files.inspection import group_by_block, locate_module, structure_problem, summarise_module
from networks.core.files.module_weights import value_problems
from tests.tiers import first_is_fast
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tests.unit.networks.toy import randomize, toy_models
from tests.weight_formats import CODECS

LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 9), (3, 5, 12)),
    "1x1": (lambda: nn.Conv2d(12, 9, 1), (3, 12, 3, 3)),
    "3x3": (lambda: nn.Conv2d(4, 9, 3, stride=2, padding=1), (3, 4, 6, 6)),
}
INITS = ("pissa", "pissa_niter_4", "olora", "orthogonal")


def started(name: str, init: str, seed: int, rank: int = 4, alpha: float = 3.0) -> tuple[Any, Adapter, Tensor]:
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    return layer, adapter_on(layer, make_starting_delta(init, layer, rank, alpha / rank), alpha), torch.randn(shape)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_initialised_adapter_does_not_change_the_output_and_trains_both_factors(name: str, init: str) -> None:
    layer, adapter, x = started(name, init, seed=81)
    alone = layer(x)
    adapter.install()
    start = layer(x)
    assert torch.equal(start, alone) if init != "orthogonal" else torch.allclose(start, alone, rtol=1e-5, atol=1e-6)
    start.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-3 for p in module_of(adapter).parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_file_is_a_lora_of_twice_the_rank_with_the_trained_change(name: str, init: str) -> None:
    layer, adapter, x = started(name, init, seed=82)
    double(adapter)
    randomize(module_of(adapter), 83)
    adapter.target.module.double()
    adapter.install()
    trained = layer(x.double())
    leaves = adapter.change.stored_tensors()
    rank = leaves["lora_down.weight"].shape[0]
    assert (rank, float(leaves["alpha"])) == (8, 6.0)
    assert leaves.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
    change = leaves["lora_up.weight"].flatten(1) @ leaves["lora_down.weight"].flatten(1) * 6.0 / 8
    weight = (layer.weight + change.view_as(layer.weight)).detach()
    adapter.remove()
    expected = torch.func.functional_call(layer, {"weight": weight}, (x.double(),))
    torch.testing.assert_close(trained, expected, **FLOAT64)
    torch.testing.assert_close(adapter.merged()["weight"], weight, **FLOAT64)


def test_pissa_starts_at_the_best_approximation_at_any_scale() -> None:
    layer, adapter, _ = started("3x3", "pissa", seed=84, rank=3, alpha=0.5)
    delta = module_of(adapter).delta
    part = 0.5 / 3 * delta.lora_up.start.flatten(1) @ delta.lora_down.start.flatten(1)
    values = torch.linalg.svdvals(layer.weight.flatten(1).double())
    rest = layer.weight.flatten(1) - part
    assert float(rest.double().norm()) == pytest.approx(float(values[3:].norm()), rel=1e-5)
    guessed = make_starting_delta("pissa_niter_9", layer, 3, 0.5 / 3)
    assert isinstance(guessed, FromStart)
    close = 0.5 / 3 * guessed.lora_up.start.flatten(1) @ guessed.lora_down.start.flatten(1)
    error = float((layer.weight.flatten(1) - close).norm())
    assert error == pytest.approx(
        float(values[3:].norm()), rel=1e-2
    )  # singular values of random weights are close together


def test_a_rank_above_that_of_the_weight_starts_as_a_plain_lora() -> None:
    layer, adapter, x = started("linear", "pissa", seed=85, rank=14)
    alone = layer(x)
    adapter.install()
    (layer(x) - alone - 1).square().sum().backward()
    assert torch.equal(layer(x), alone)
    grad = module_of(adapter).lora_up.weight.grad
    assert (grad.abs().amax(0) > 1e-4).all()  # also above the nine singular values


def test_the_decoded_weight_of_an_8_bit_base_is_decomposed() -> None:
    torch.manual_seed(86)
    layer = nn.Linear(128, 64).requires_grad_(False)
    exact = layer.weight.clone()
    freeze_layer(CODECS["int8"], layer)
    delta = make_starting_delta("olora", layer, 8, 1.0)
    assert isinstance(delta, FromStart)
    q, r = torch.linalg.qr(layer.weight)
    torch.testing.assert_close(delta.lora_up.start @ delta.lora_down.start, q[:, :8] @ r[:8], **FLOAT32_SAME_MATH)
    assert not torch.allclose(layer.weight, exact, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 128)
    alone = layer(x)
    adapter = adapter_on(layer, delta, 8.0)
    adapter.install()
    assert torch.equal(layer(x), alone)


def make_network(network_module: Any, seed: int = 87, **arguments: str) -> tuple[Any, tuple[nn.Module, nn.Module]]:
    models = toy_models(seed)
    network = network_module.create_network(1.0, 4, 2.0, None, *models, conv_dim="2", **arguments)
    network.apply_to(*models)
    return network, models


def outputs(models: tuple[nn.Module, nn.Module]) -> Tensor:
    generator = torch.Generator().manual_seed(88)
    x = torch.randn(2, 6, 4, 4, generator=generator), torch.randn(2, 3, 7, generator=generator)
    return torch.cat([models[1](x[0]).flatten(), models[0](x[1]).flatten()])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "True"}, {"rslora": "True"}],
    ids=["plain", "dora", "dora per output", "rslora"],
)
@pytest.mark.parametrize("init", first_is_fast(["pissa", "olora"]))
def test_a_saved_file_is_trained_further_with_and_without_init(
    tmp_path: Path, init: str, arguments: dict[str, str]
) -> None:
    network, models = make_network(lora, init=init, **arguments)
    bare = outputs(toy_models(87))
    torch.testing.assert_close(outputs(models), bare, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.add_(torch.randn_like(p) * (0.02 if "dora" in name else 0.2))
    expected = outputs(models)
    assert not torch.allclose(expected, bare, atol=0.05)
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, None, {})

    by_dim, others = make_network(lora, init=init, **arguments)
    by_dim.load_weights(path)
    torch.testing.assert_close(outputs(others), expected, **FLOAT32_SAME_MATH)
    for key, tensor in network.state_dict().items():  # a single rounding of the stored sum
        torch.testing.assert_close(by_dim.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)

    for options in ({"init": init}, {}):
        models_again = toy_models(87)
        from_file, _ = lora.create_network_from_weights(
            1.0, path, None, *models_again, **({**arguments, **options} if options else {})
        )
        from_file.apply_to(*models_again)
        from_file.load_weights(path)
        torch.testing.assert_close(outputs(models_again), expected, **FLOAT32_SAME_MATH)
        path_again = str(tmp_path / "b.safetensors")
        from_file.save_weights(path_again, None, {})
        saved, saved_again = load_file(path), load_file(path_again)
        assert saved.keys() == saved_again.keys()
        for key in saved:
            torch.testing.assert_close(saved[key], saved_again[key], rtol=1e-6, atol=1e-6)


def test_half_precision_keeps_a_small_change(tmp_path: Path) -> None:
    """The file stores the differences, not two large products whose difference would be lost in rounding."""
    network, models = make_network(lora, init="pissa")
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 1e-3)
    bare, expected = outputs(toy_models(87)), outputs(models)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float16, {})
    plain, others = make_network(lora, init="pissa")
    plain.load_weights(str(tmp_path / "a.safetensors"))
    error = (outputs(others) - expected).norm() / (expected - bare).norm()
    assert error < 2e-3


def test_norm_limits_scale_only_the_change() -> None:
    network, _ = make_network(lora, init="pissa")
    randomize(network, 89)
    before = {name: a.change.weight() for name, a in network.adapters.items()}
    norms = {name: float(a.change.norm()) for name, a in network.adapters.items()}
    for name, weight in before.items():
        assert norms[name] == pytest.approx(weight.norm().item(), rel=1e-5)
    count, _, largest = network.apply_max_norm_regularization(0.3, "cpu")
    assert count > 0
    assert largest <= 0.3 * (1 + 1e-5)
    for name, a in network.adapters.items():
        ratio = min(1.0, 0.3 / norms[name])
        torch.testing.assert_close(a.change.weight(), before[name] * ratio, **FLOAT32_SAME_MATH)


def test_tlora_masks_a_rank_together_with_its_initial_value() -> None:
    network, models = make_network(tlora, init="pissa")
    assert torch.equal(outputs(models), outputs(toy_models(87)))
    randomize(network, 90)
    network.on_noise_levels(torch.tensor([1.0, 1.0]))  # one rank each
    adapter = network.adapters["lora_unet_mid_attention_to_q"]
    delta: Any = adapter.change.delta
    x = torch.randn(2, 4, 4, 8)
    actual = adapter.change.forward(x, lambda x: torch.zeros(2, 4, 4, 6), 1.0)
    first = (delta.lora_up.weight + delta.lora_up.start)[:, :1] @ (delta.lora_down.weight + delta.lora_down.start)[:1]
    expected = x @ (0.5 * (first - delta.lora_up.start[:, :1] @ delta.lora_down.start[:1])).T
    torch.testing.assert_close(actual, expected, **FLOAT32_SAME_MATH)


@pytest.mark.parametrize(
    "network_module", [lora, lora_fa, dylora, tlora], ids=lambda network_module: network_module.__name__
)
def test_rslora_divides_alpha_by_the_square_root_of_the_rank_in_memory_and_in_the_file(network_module: Any) -> None:
    network, _ = make_network(network_module, rs_lora="True")
    scales = {name: (a.change.scale, a.change.delta.rank) for name, a in network.adapters.items()}
    for name, (scale, rank) in scales.items():
        alpha = 1.0 if rank == 2 else 2.0  # conv_alpha is 1 where it is left out
        assert scale == pytest.approx(alpha / math.sqrt(rank), rel=1e-6)
        leaves = network.adapters[name].change.stored_tensors()
        assert float(leaves["alpha"]) / rank == pytest.approx(scale, rel=1e-6)


def test_a_network_with_init_refuses_a_plain_file_and_stays_unchanged(tmp_path: Path) -> None:
    plain, _ = make_network(lora)
    path = str(tmp_path / "plain.safetensors")
    plain.save_weights(path, None, {})
    network, _ = make_network(lora, init="pissa")
    before = {key: t.clone() for key, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="with --network_args init it has 8 in files, twice the rank"):
        network.load_weights(path)
    assert all(torch.equal(t, before[key]) for key, t in network.state_dict().items())


def test_the_log_states_that_the_rank_doubles(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_network(lora, init="pissa")
    assert "the saved LoRA takes it out again, at twice the rank" in caplog.text


# Ranks, norms and damage of adapter files.

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"


def tensors_of(seed: int, *kernel: int, rank: int = 3, alpha: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, *kernel, generator=generator)
    up = torch.randn(7, rank, *(1,) * len(kernel), generator=generator)
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_norms_equal_those_of_the_full_matrices(kernel: tuple[int, ...]) -> None:
    tensors = tensors_of(920 + len(kernel) + sum(kernel), *kernel)
    summary = summarise_module(sort_tensors(tensors, {}, "").modules[NAME])
    up, down = tensors[f"{NAME}.lora_up.weight"].double(), tensors[f"{NAME}.lora_down.weight"].double()
    assert (summary.rank, summary.alpha) == (3, 2.0)
    assert summary.down_norm == pytest.approx(float(down.norm()), rel=1e-12)
    assert summary.up_norm == pytest.approx(float(up.norm()), rel=1e-12)
    update = 2 / 3 * up.flatten(1) @ down.flatten(1)
    assert summary.update_norm == pytest.approx(float(update.norm()), rel=1e-10)


def test_a_tucker_core_is_multiplied_in() -> None:
    tensors = tensors_of(925, 1, 1)
    mid = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(926))
    summary = summarise_module(sort_tensors({**tensors, f"{NAME}.lora_mid.weight": mid}, {}, "").modules[NAME])
    up, down = tensors[f"{NAME}.lora_up.weight"].double(), tensors[f"{NAME}.lora_down.weight"].double()
    update = 2 / 3 * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid.double(), down.flatten(1))
    assert summary.kind == "tucker" and summary.update_norm == pytest.approx(float(update.norm()), rel=1e-10)


def test_norm_weights_have_no_rank() -> None:
    module = sort_tensors(
        {"lora_unet_a.w_norm": torch.tensor([3.0]), "lora_unet_a.b_norm": torch.tensor([4.0])}, {}, ""
    ).modules
    summary = summarise_module(module["lora_unet_a"])
    assert (summary.rank, summary.alpha, summary.update_norm) == (None, None, 5.0)


@pytest.mark.parametrize(
    ("name", "part", "block"),
    [
        (NAME, "denoiser", "down_blocks_0"),
        ("lora_unet_mid_block_resnets_1_conv1", "denoiser", "mid_block"),
        ("lora_unet_conv_in", "denoiser", "outside blocks"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text encoder (lora_te)", "encoder_layers_11"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "text encoder (lora_te2)", "encoder_layers_3"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "denoiser", "input_blocks_4"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
            "text encoder (text_encoders_clip_l)",
            "encoder_layers_3",
        ),
        ("unet.up_blocks.2.resnets.1.conv1", "denoiser", "up_blocks_2"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", "text encoder (text_encoder_2)", "encoder_layers_3"),
        ("lora_unet_double_blocks_12_img_attn_qkv", "denoiser", "double_blocks_12"),
        ("lora_unet_layers_4_attention_qkv", "denoiser", "layers_4"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "denoiser", "single_transformer_blocks_3"),
    ],
)
def test_a_module_name_is_located_in_its_part_and_block(name: str, part: str, block: str) -> None:
    assert locate_module(name) == (part, block)


def test_blocks_add_up_and_are_sorted_by_number() -> None:
    generator = torch.Generator().manual_seed(930)
    tensors: dict[str, Tensor] = {}
    for block, rank in ((10, 2), (2, 3), (2, 4)):
        name = f"lora_te_text_model_encoder_layers_{block}_fc{rank}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 5, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, rank, generator=generator)
    summary = [summarise_module(module) for module in sort_tensors(tensors, {}, "").modules.values()]
    second, tenth = group_by_block(summary)
    assert (second.block, second.num_modules, second.ranks) == ("encoder_layers_2", 2, (3, 4))
    assert (tenth.block, tenth.ranks, tenth.alphas) == ("encoder_layers_10", (2,), (2.0,))
    assert second.update_norm == pytest.approx(math.hypot(summary[1].update_norm or 0, summary[2].update_norm or 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lora_up.weight": None}, "lora_down.weight without its up factor"),
        ({"lora_down.weight": None}, "lora_up.weight without its down factor"),
        ({"lora_down.weight": torch.ones(4, 5)}, "do not fit together"),
    ],
)
def test_structural_damage_is_reported(damage: dict[str, Tensor | None], message: str) -> None:
    tensors = {**tensors_of(931), **{f"{NAME}.{leaf}": tensor for leaf, tensor in damage.items()}}
    module = sort_tensors({key: t for key, t in tensors.items() if t is not None}, {}, "").modules[NAME]
    assert message in (structure_problem(module) or "")


def test_an_intact_module_has_no_problem() -> None:
    module = sort_tensors(tensors_of(932), {}, "").modules[NAME]
    assert structure_problem(module) is None and list(value_problems(module)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    tensors = tensors_of(933)
    tensors[f"{NAME}.lora_up.weight"][2, 1] = value
    problems = list(value_problems(sort_tensors(tensors, {}, "").modules[NAME]))
    assert problems == [f"{NAME}.lora_up.weight has 1 of 21 values that are not finite"]
