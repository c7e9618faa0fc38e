"""Adapters against LyCORIS: equal values give equal outputs, gradients, merged weights and files."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import lora, oft
from networks.core.changes.adapter import Adapter
from networks.core.changes.dora import Decompose
from networks.core.changes.low_rank import LowRank
from networks.core.changes.tucker import Tucker
from networks.core.files.adapter_file import COMPUTED, AdapterFile, parse_adapter, read_adapter_file, require_layouts
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import factorize, make_fresh
from networks.core.registry.layouts import make_change, recognise_layout
from networks.core.targets.targets import adaptation_kind
from tests.hiding import lazily
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.one_layer import adapter_on, module_of
from tests.unit.networks.toy import toy_models
from tools import check_lora_weights, merge_lora, resize_lora

locon = lazily("lycoris.modules.locon")

LAYERS = {
    "linear": (lambda: nn.Linear(11, 6), (2, 5, 11)),
    "1x1": (lambda: nn.Conv2d(11, 6, 1), (2, 11, 4, 4)),
    "3x3": (lambda: nn.Conv2d(11, 6, 3, stride=2, padding=1), (2, 11, 6, 6)),
}
CASES = [
    (name, is_tucker, is_dora, has_scalar)
    for name in LAYERS
    for is_tucker in (False, True)
    for is_dora in (False, True)
    for has_scalar in (False, True)
    if name == "3x3" or not is_tucker
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # LyCORIS rebuilds the weight in float32


def pair(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> tuple[Adapter, Any, nn.Module]:
    """Return our adapter, LyCORIS's with the same weights, and the layer on which theirs is installed."""
    torch.manual_seed(1401 + CASES.index((name, is_tucker, is_dora, has_scalar)))
    layer: Any = LAYERS[name][0]().requires_grad_(False)
    kind = adaptation_kind(layer)
    assert kind is not None
    delta = (Tucker if is_tucker else LowRank)(layer, 4)
    decomposition = Decompose(layer.weight) if is_dora else None
    ours = adapter_on(layer, delta, 3.0, decomposition, has_scalar=has_scalar)
    theirs = locon.LoConModule(
        "x", layer, 1.0, 4, 3.0, use_tucker=is_tucker, use_scalar=has_scalar, weight_decompose=is_dora, wd_on_out=False
    )
    with torch.no_grad():
        for parameter in ours.change.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(ours.change.get_parameter(key))
    assert {k for k, _ in ours.change.named_parameters()} == {k for k, _ in theirs.named_parameters() if "org" not in k}
    return ours, theirs, layer


@pytest.mark.parametrize(("name", "is_tucker", "is_dora", "has_scalar"), CASES)
def test_layer_outputs_and_gradients_match_lycoris(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, layer = pair(name, is_tucker, is_dora, has_scalar)
    x = torch.randn(LAYERS[name][1], requires_grad=True)
    keys = [key for key, _ in ours.change.named_parameters()]

    def run(module: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *(module.get_parameter(key) for key in keys)))
        return y, grads

    alone = layer(x)
    ours.install()
    y, grads = run(ours.change)
    ours.remove()
    theirs.apply_to()
    their_y, their_grads = run(theirs)
    theirs.restore()
    torch.testing.assert_close(y, their_y, **CLOSE)
    assert (y - alone).abs().max() > 0.01
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(ours.merged()["weight"], theirs.get_merged_weight()[0], **CLOSE)


@pytest.mark.parametrize(("name", "is_tucker", "is_dora", "has_scalar"), CASES)
def test_the_file_matches_lycoris(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, _ = pair(name, is_tucker, is_dora, has_scalar)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in other.items()}
    for key in mine:
        torch.testing.assert_close(mine[key], other[key].float(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "is_tucker"), [("linear", False), ("3x3", False), ("3x3", True)])
def test_the_update_norm_matches_lycoris(name: str, is_tucker: bool) -> None:
    ours, theirs, _ = pair(name, is_tucker, False, True)
    torch.testing.assert_close(ours.change.norm(), theirs.get_diff_weight()[0].norm(), **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_with_a_trained_strength_match_lycoris(name: str) -> None:
    """The strength starts at 0 and `up` is initialised like `down`, so that the strength has a gradient at once."""
    torch.manual_seed(1461)
    layer: Any = LAYERS[name][0]()
    kind = adaptation_kind(layer)
    assert kind is not None
    ours = adapter_on(layer, LowRank(layer, 500), 1.0, has_scalar=True)
    theirs = locon.LoConModule("x", layer, 1.0, 500, 1.0, use_scalar=True)
    assert ours.change.scalar is not None and ours.change.scalar.item() == theirs.scalar.item() == 0.0
    for key in ("lora_up.weight", "lora_down.weight"):
        mine, other = ours.change.get_parameter(key), theirs.get_parameter(key)
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01)
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)


# LoHa and LoKr against LyCORIS: equal initial values, outputs, gradients, merged weights and files.

loha = lazily("lycoris.modules.loha")
lokr = lazily("lycoris.modules.lokr")
general = lazily("lycoris.functional.general")

PRODUCT_LAYERS = {
    "linear": (lambda: nn.Linear(48, 36), (2, 5, 48)),
    "1x1": (lambda: nn.Conv2d(48, 36, 1), (2, 48, 4, 4)),
    "3x3": (lambda: nn.Conv2d(24, 36, 3, stride=2, padding=1), (2, 24, 6, 6)),
}
FORMS: dict[str, dict[str, Any]] = {
    "w2 of factors": {"factor": 2},
    "both of factors": {"decompose_both": True},
    "w1 of factors": {"decompose_both": True, "factor": 12},
    "full": {"full_matrix": True, "factor": 4},
    "core": {"use_tucker": True, "factor": 2},
}
LOHA: dict[str, tuple[int, dict[str, Any]]] = {  # form -> rank and settings
    "loha of few ranks": (2, {}),  # computed as a product of two factors
    "loha": (9, {}),  # as a full matrix
    "loha core of few ranks": (2, {"use_tucker": True}),
    "loha core": (9, {"use_tucker": True}),
}
PRODUCT_CASES = [
    (name, form, is_dora, has_scalar)
    for name in PRODUCT_LAYERS
    for form in (*FORMS, *LOHA)
    for is_dora in (False, True)
    for has_scalar in (False, True)
    if "core" not in form or name == "3x3"
]
PLAIN = [(name, form) for name, form, is_dora, has_scalar in PRODUCT_CASES if not is_dora and has_scalar]
PRODUCT_CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # LyCORIS sums in another order, in float32


def delta_of(layer: Any, form: str) -> Any:
    if form in LOHA:
        return LoHa(layer, LOHA[form][0], "core" in form)
    settings = FORMS[form]
    return make_fresh(
        layer, 2, settings.get("factor", -1), settings.get("decompose_both", False),
        settings.get("full_matrix", False), form == "core",
    )  # fmt: skip


def module_of_lycoris(layer: Any, form: str, alpha: float = 1.0, **more: Any) -> Any:
    if form in LOHA:
        return loha.LohaModule("x", layer, 1.0, LOHA[form][0], alpha, **LOHA[form][1], **more)
    return lokr.LokrModule("x", layer, 1.0, 2, alpha, **FORMS[form], **more)


def product_pair(name: str, form: str, is_dora: bool, has_scalar: bool) -> tuple[Adapter, Any, nn.Module]:
    """Return our adapter, LyCORIS's with the same weights, and the layer on which theirs is installed."""
    torch.manual_seed(2701 + PRODUCT_CASES.index((name, form, is_dora, has_scalar)))
    layer: Any = PRODUCT_LAYERS[name][0]().requires_grad_(False)
    delta = delta_of(layer, form)
    decomposition = Decompose(layer.weight) if is_dora else None
    ours = adapter_on(layer, delta, 3.0, decomposition, has_scalar=has_scalar)
    forms = {"use_scalar": has_scalar, "weight_decompose": is_dora, "wd_on_out": False}
    theirs = module_of_lycoris(layer, form, 3.0, **forms)
    change = module_of(ours)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.copy_(parameter * 0.3 + torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(change.get_parameter(key))
    assert {k for k, _ in change.named_parameters()} == {k for k, _ in theirs.named_parameters() if "org" not in k}
    return ours, theirs, layer


@pytest.mark.parametrize(("name", "form", "is_dora", "has_scalar"), PRODUCT_CASES)
def test_layer_merged_weight_and_file_match_lycoris(name: str, form: str, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, layer = product_pair(name, form, is_dora, has_scalar)
    x = torch.randn(PRODUCT_LAYERS[name][1], requires_grad=True)
    keys = [key for key, _ in module_of(ours).named_parameters()]

    def run(module: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *(module.get_parameter(key) for key in keys)))
        return y, grads

    alone = layer(x)
    ours.install()
    y, grads = run(module_of(ours))
    ours.remove()
    base = layer.weight
    assert isinstance(base, Tensor)
    # LyCORIS's forward pass with a scalar and DoRA, written out: W0 + scalar * dW, then the magnitudes.
    merged = base + theirs.get_weight(base.shape) * theirs.scalar
    merged = theirs.apply_weight_decompose(merged) if is_dora else merged
    theirs.apply_to()
    their_y, their_grads = run(theirs)
    theirs.restore()
    torch.testing.assert_close(y, their_y, **PRODUCT_CLOSE)
    assert (y - alone).abs().max() > 1e-3
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
    torch.testing.assert_close(ours.merged()["weight"], merged, **PRODUCT_CLOSE)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in other.items()}
    for key, tensor in other.items() if form in FORMS else ():
        if (
            key != "alpha" or not recognise_layout(mine).is_whole
        ):  # without a rank alpha has no meaning: LyCORIS stores the requested rank
            torch.testing.assert_close(mine[key], tensor.detach())


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in PLAIN if form in FORMS])
def test_files_compute_the_same_in_both_programs(name: str, form: str) -> None:
    ours, theirs, layer = product_pair(name, form, False, True)
    base = layer.weight
    assert isinstance(base, Tensor)
    merged = base + theirs.get_weight(base.shape) * theirs.scalar
    loaded = make_change({key: tensor.detach() for key, tensor in theirs.custom_state_dict().items()}, layer)
    torch.testing.assert_close(loaded.merged(base), merged, **PRODUCT_CLOSE)
    leaves = ours.change.stored_tensors()
    again = lokr.LokrModule("x", layer, 1.0, 2, 3.0, **FORMS[form])
    again.load_state_dict(leaves)
    torch.testing.assert_close(base + again.get_weight(base.shape), merged, **PRODUCT_CLOSE)
    if form in ("core", "w1 of factors"):  # LyCORIS's reader misreads the rank and form of these two
        return
    stored = [leaves.get(leaf) for leaf in lokr.LokrModule.weight_list]
    with torch.no_grad():
        again = lokr.LokrModule.make_module_from_state_dict("x", layer, *stored)
    torch.testing.assert_close(base + again.get_weight(base.shape), merged, **PRODUCT_CLOSE)


@pytest.mark.parametrize(
    ("name", "form", "has_scalar"),
    [(*case, has_scalar) for case in PLAIN for has_scalar in (False, True) if case[1] in LOHA or not has_scalar],
)
def test_initial_values_equal_lycoris(name: str, form: str, has_scalar: bool) -> None:
    layer: Any = PRODUCT_LAYERS[name][0]()
    torch.manual_seed(2801)
    ours = module_of(adapter_on(layer, delta_of(layer, form), 1.0, has_scalar=has_scalar))
    torch.manual_seed(2801)
    theirs = module_of_lycoris(layer, form, use_scalar=has_scalar)
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(key)), key


def test_sizes_are_factorised_as_in_lycoris() -> None:
    sizes = (*range(1, 400), 512, 640, 768, 1000, 1280, 2048, 2560, 3072, 5120, 9216, 10240, 12288, 21504)
    for size in sizes:
        for factor in (-1, 1, 2, 3, 4, 5, 8, 12, 16, 30, 64):
            assert factorize(size, factor) == general.factorization(size, factor), (size, factor)


# (IA)^3 and GLoRA files merge as in LyCORIS, with tools and --base_weights.

ia3 = lazily("lycoris.modules.ia3")
glora = lazily("lycoris.modules.glora")

PATHS = ("mid.attention.to_q", "mid.attention.proj_in", "mid.resnet.conv1", "up.0.resnet.time_emb_proj")
KINDS = {
    "ia3": (ia3, "IA3Module", {}),
    "ia3 on inputs": (ia3, "IA3Module", {"train_on_input": True}),
    "glora": (glora, "GLoRAModule", {"lora_dim": 3, "alpha": 1.5}),
}


def name_of(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def file_by_lycoris(unet: nn.Module, kind: str, strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (a file by LyCORIS, the merged weights by path)."""
    generator, (module, made, settings) = torch.Generator().manual_seed(621), KINDS[kind]
    tensors, after = {}, {}
    for path in PATHS:
        theirs = getattr(module, made)(name_of(path), unet.get_submodule(path), 1.0, **settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        tensors |= {f"{name_of(path)}.{leaf}": tensor.detach().clone() for leaf, tensor in theirs.state_dict().items()}
        after[path] = theirs.get_merged_weight(multiplier=strength)[0].detach()
    return tensors, after


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_match_lycoris(kind: str, strength: float) -> None:
    text, unet = toy_models(622)
    tensors, after = file_by_lycoris(unet, kind, strength)
    file = parse_adapter(tensors, {}, "a.safetensors")
    for path, wanted in after.items():
        base = unet.get_submodule(path).weight
        assert isinstance(base, Tensor)
        module = file.modules[name_of(path)]
        actual = module.merged(base, strength)
        assert (actual - base).norm() > 0.1 and not module.changes("bias")
        torch.testing.assert_close(actual, wanted, **FLOAT32_SAME_MATH)
        twice = module.change(torch.float64)  # a copy; the file is unchanged
        twice.scale_(torch.tensor(2.0))  # scaling, as used to limit norms, doubles the change
        expected = base + 2 * (actual - base)
        torch.testing.assert_close(twice.merged(base.double(), strength).float(), expected, rtol=1e-4, atol=1e-5)
    network, weights = lora.create_network_from_weights(strength, "a", None, text, unet, tensors, for_inference=True)
    assert network.adapters.keys() == {name_of(path) for path in PATHS}
    network.merge_to(text, unet, weights, torch.float32, "cpu")
    for path, wanted in after.items():
        torch.testing.assert_close(unet.get_submodule(path).weight.data, wanted, **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("kind", KINDS)
def test_they_merge_into_checkpoints_and_convert_to_a_full_rank_lora(
    kind: str, tmp_path: Path, tiny_sd_file: Path
) -> None:
    """Run the commands: merge into a checkpoint, and convert to an equivalent LoRA of full rank."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    before = load_state_dict(tiny_sd_file)
    layer = nn.Linear(*reversed(before[key].shape), bias=False)
    layer.weight.data = before[key].clone()
    module, made, settings = KINDS[kind]
    theirs = getattr(module, made)(name_of(path), layer, 1.0, **settings)
    generator = torch.Generator().manual_seed(628)
    for parameter in theirs.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    file, out = str(tmp_path / "a.safetensors"), str(tmp_path / "out.safetensors")
    save_safetensors(file, {f"{name_of(path)}.{leaf}": t.detach() for leaf, t in theirs.state_dict().items()})
    words = ["--models", file, "--ratios", "0.7", "--save_to", out]
    assert merge_lora.main([*words, "--sd_model", str(tiny_sd_file)]) == 0
    after = load_state_dict(out)
    wanted = theirs.get_merged_weight(multiplier=0.7)[0].detach()
    torch.testing.assert_close(after[key], wanted, **FLOAT32_SAME_MATH)
    assert all(torch.equal(after[other], tensor) for other, tensor in before.items() if other != key)
    rank = str(min(wanted.shape))
    assert merge_lora.main([*words, "--base_model", str(tiny_sd_file), "--new_rank", rank]) == 0
    actual = read_adapter_file(out).modules[name_of(path)].merged(before[key], 1.0)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)  # obtained by a decomposition


@pytest.mark.parametrize("kind", KINDS)
def test_continued_training_is_rejected(kind: str) -> None:
    text, unet = toy_models(623)
    tensors, _ = file_by_lycoris(unet, kind, 1.0)
    with pytest.raises(ValueError, match="that this network module cannot use"):
        lora.create_network_from_weights(1.0, "a.safetensors", None, text, unet, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_tools_name_the_kind_and_its_limitations(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, unet = toy_models(624)
    file = tmp_path / "a.safetensors"
    save_safetensors(file, file_by_lycoris(unet, kind, 1.0)[0])
    assert check_lora_weights.main([str(file), "--json"]) == 0
    assert kind.split()[0] in capsys.readouterr().out
    words = [str(file), "--save_to", str(tmp_path / "b.safetensors"), "--new_rank", "2"]
    assert resize_lora.main(["--model", *words]) == 1
    assert f"is {'GLoRA' if kind == 'glora' else '(IA)^3'}, which has no rank to reduce" in capsys.readouterr().err
    assert merge_lora.main(["--models", *words]) == 1
    assert "whose change depends on the base weight; set --base_model to the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_input": None}, "without its on_input"),
        ({"on_input": torch.tensor([0, 1])}, "it needs one number"),
        ({"weight": None}, "without its weight"),
    ],
)
def test_incomplete_modules_of_ia3_are_named(change: dict[str, Tensor | None], message: str) -> None:
    tensors, _ = file_by_lycoris(toy_models(625)[1], "ia3", 1.0)
    name = name_of(PATHS[0])
    changed = {**tensors, **{f"{name}.{leaf}": tensor for leaf, tensor in change.items()}}
    with pytest.raises(ValueError, match=message):
        parse_adapter({key: tensor for key, tensor in changed.items() if tensor is not None}, {}, "a")


def test_mismatched_factors_and_layers_are_named() -> None:
    _, unet = toy_models(626)
    for kind in KINDS:
        file: AdapterFile = parse_adapter(file_by_lycoris(unet, kind, 1.0)[0], {}, "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors: .* changes a weight of the shape"):
            file.modules[name_of(PATHS[0])].merged(torch.ones(9, 11), 1.0)
    tensors, _ = file_by_lycoris(unet, "glora", 1.0)
    key = f"{name_of(PATHS[0])}.b2.weight"
    with pytest.raises(ValueError, match=r"a1, a2, b1 and b2 are .*; LyCORIS before 2\.0 has others"):
        parse_adapter({**tensors, key: tensors[key][:2]}, {}, "a")
    del tensors[key]
    with pytest.raises(ValueError, match=r"without its b2\.weight"):
        parse_adapter(tensors, {}, "a")


def test_ia3_values_are_read_in_half_precision_and_flags_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    _, unet = toy_models(627)
    tensors, after = file_by_lycoris(unet, "ia3 on inputs", 1.0)
    halves = {k: tensor.half() if tensor.is_floating_point() else tensor for k, tensor in tensors.items()}
    module = parse_adapter(halves, {}, "a").modules[name_of(PATHS[0])]
    base = unet.get_submodule(PATHS[0]).weight
    assert isinstance(base, Tensor)
    torch.testing.assert_close(module.merged(base, 1.0), after[PATHS[0]], rtol=2**-10, atol=2**-10)
    assert not caplog.records


# Full weight differences in LyCORIS's `full` format merge as in LyCORIS, with tools and --base_weights.

full = lazily("lycoris.modules.full")

FULL_PATHS = {
    "lora_unet_mid_attention_to_q": "mid.attention.to_q",
    "lora_unet_mid_attention_proj_in": "mid.attention.proj_in",
    "lora_unet_mid_resnet_conv1": "mid.resnet.conv1",
    "lora_unet_mid_attention_norm": "mid.attention.norm",  # written by extractions, but not by LyCORIS
}


def full_file(unet: nn.Module, strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (a file by LyCORIS, the merged parameters by name)."""
    generator = torch.Generator().manual_seed(611)
    tensors, after = {}, {}
    for name, path in FULL_PATHS.items():
        layer = unet.get_submodule(path)
        if path.endswith("norm"):
            changes = {parameter: torch.randn(6, generator=generator) for parameter in ("weight", "bias")}
            tensors |= {f"{name}.diff": changes["weight"], f"{name}.diff_b": changes["bias"]}
            after |= {f"{path}.{p}": layer.get_parameter(p) + strength * change for p, change in changes.items()}
            continue
        theirs = full.FullModule(name, layer, 1.0)
        shape = layer.weight.shape
        theirs.apply_to()  # saving before this would subtract the weight twice
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        tensors |= {f"{name}.{leaf}": tensor.detach().clone() for leaf, tensor in theirs.state_dict().items()}
        weight, bias = theirs.get_merged_weight(multiplier=strength, shape=shape)
        theirs.restore()
        after[f"{path}.weight"] = weight.detach()
        after |= {} if bias is None else {f"{path}.bias": bias.detach()}
    return tensors, after


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_merged_weights_and_biases_match_lycoris(strength: float) -> None:
    text, unet = toy_models(612)
    tensors, after = full_file(unet, strength)
    file = parse_adapter(tensors, {}, "a.safetensors")
    require_layouts(file, COMPUTED, "merged")
    for name, path in FULL_PATHS.items():
        for parameter in ("weight", "bias"):
            if (wanted := after.get(f"{path}.{parameter}")) is None:
                assert not file.modules[name].changes(parameter)
                continue
            base = unet.get_parameter(f"{path}.{parameter}")
            actual = file.modules[name].merged(base, strength, parameter=parameter)
            assert (actual - base).norm() > 0.1
            torch.testing.assert_close(actual, wanted, **FLOAT32_SAME_MATH)
    network, weights = lora.create_network_from_weights(strength, "a", None, text, unet, tensors, for_inference=True)
    assert network.adapters.keys() == FULL_PATHS.keys()
    network.merge_to(text, unet, weights, torch.float32, "cpu")
    for name, wanted in after.items():
        torch.testing.assert_close(unet.get_parameter(name).data, wanted, **FLOAT32_SAME_MATH)


def test_continued_training_of_full_differences_is_rejected() -> None:
    text, unet = toy_models(613)
    tensors, _ = full_file(unet, 1.0)
    with pytest.raises(ValueError, match=r"has keys such as \*\.diff that this network module cannot use"):
        lora.create_network_from_weights(1.0, "a.safetensors", None, text, unet, tensors)


@pytest.mark.parametrize("more", [{"rescale": (6, 1)}, {"oft_blocks.1": (1, 2, 2)}])
def test_a_network_accepts_every_tensor_of_output_oft(more: dict[str, tuple[int, ...]]) -> None:
    """These include LyCORIS's scales and a layer of several projections."""
    text, unet = toy_models(614)
    name, g = "lora_unet_mid_attention_to_q", torch.Generator().manual_seed(615)
    blocks = {"oft_blocks": (3, 2, 2)} if "rescale" in more else {"oft_blocks.0": (2, 2, 2)}
    tensors = {f"{name}.{leaf}": torch.randn(shape, generator=g) for leaf, shape in {**blocks, **more}.items()}
    network, _ = oft.create_network_from_weights(1.0, "a", None, text, unet, tensors)
    network.apply_to(text, unet, False, True)
    wanted = parse_adapter(tensors, {}, "a").modules[name]
    base = unet.get_submodule("mid.attention.to_q").weight
    assert isinstance(base, Tensor)
    network.adapters[name].change.load({key.partition(".")[2]: tensor for key, tensor in tensors.items()})
    torch.testing.assert_close(network.adapters[name].change.merged(base), wanted.merged(base, 1.0))
