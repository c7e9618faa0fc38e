"""Adapters against PEFT: equal factors give equal outputs and gradients, and its folders are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from networks.core.changes.init import INITS, FromStart, make_starting_delta
from networks.core.changes.low_rank import LowRank
from networks.core.files.adapter_file import COMPUTED, read_adapter_file, require_layouts
from networks.core.targets.targets import adaptation_kind
from tests.hiding import lazily
from tests.tiny.sd import build_tiny_sd
from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tools import check_lora_weights, merge_lora

peft = lazily("peft")

SHAPES = {
    "linear": (lambda: nn.Linear(11, 6), (2, 5, 11)),
    "conv": (lambda: nn.Conv2d(11, 6, 3, stride=2, padding=1), (2, 11, 6, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_those_of_peft(name: str) -> None:
    make, shape = SHAPES[name]
    torch.manual_seed(431)
    layer = make().double().requires_grad_(False)
    wrapped = nn.Sequential(make()).double()
    wrapped[0].load_state_dict(layer.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(wrapped, config).double()
    their_down, their_up = (p for p in theirs.parameters() if p.requires_grad)

    kind = adaptation_kind(layer)
    assert kind is not None
    ours = double(adapter_on(layer, LowRank(layer, 4), 3.0))
    ours.change.load_state_dict(
        {"alpha": ours.change.alpha, "lora_down.weight": their_down, "lora_up.weight": their_up}
    )
    ours.install()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x), **FLOAT64)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.change.get_parameter("lora_down.weight").grad, their_down.grad, **FLOAT64)
    torch.testing.assert_close(ours.change.get_parameter("lora_up.weight").grad, their_up.grad, **FLOAT64)
    assert their_down.grad.abs().max() > 0.01


@torch.no_grad()
def test_a_folder_saved_by_peft_merges_into_a_checkpoint_as_in_peft(tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Its names lack a model prefix, and its alphas are stored in the folder's config."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "to_out.0", "conv1"], alpha_pattern={"conv1": 1}, use_rslora=True,
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(433)
    theirs = peft.get_peft_model(unet, config)
    theirs.save_pretrained(str(tmp_path / "saved"))
    generator = torch.Generator().manual_seed(434)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BTC = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    expected = theirs(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample
    words = [
        "--sd_model",
        str(tiny_sd_folder),
        "--models",
        str(tmp_path / "saved"),
        "--save_to",
        str(tmp_path / "merged"),
    ]
    assert merge_lora.main(words) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    actual = merged(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample
    alone = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    assert (alone(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample - expected).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)


# AdaLoRA folders saved by PEFT: merged as in PEFT, also with pruned modules, and trained further as LoRA.

RANK, ALPHA = 4, 7
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2"]


def unet_of(folder: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    return unet.requires_grad_(False)


def save_by_peft(base: Path, folder: Path, kept: dict[str, list[bool]]) -> dict[str, Tensor]:
    """Save a folder with PEFT and return the weights of `LAYERS` that it merges; `kept` masks the unpruned ranks."""
    torch.manual_seed(631)
    settings = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=ALPHA, total_step=10, tinit=1, tfinal=1, target_modules=LAYERS
    )
    theirs = peft.get_peft_model(unet_of(base), settings)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    if kept:
        ranks = {f"{layer}.lora_E.default": kept.get(layer, [True] * RANK) for layer in LAYERS}
        theirs.peft_config["default"].rank_pattern = ranks
    theirs.save_pretrained(str(folder))
    merged = peft.PeftModel.from_pretrained(unet_of(base), str(folder)).merge_and_unload()
    return {layer: merged.get_parameter(f"{layer}.weight").detach() for layer in LAYERS}


@pytest.mark.parametrize(
    "kept", [{}, {LAYERS[0]: [True, False, False, True], LAYERS[1]: [False] * RANK}], ids=["all ranks", "pruned"]
)
def test_merging_into_a_checkpoint_matches_peft(kept: dict[str, list[bool]], tmp_path: Path) -> None:
    base = build_tiny_sd(tmp_path / "sd", 632)
    wanted = save_by_peft(base, tmp_path / "peft", kept)
    assert any(key.endswith("lora_E") for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    words = ["--sd_model", str(base), "--models", str(tmp_path / "peft"), "--save_to", str(tmp_path / "out")]
    assert merge_lora.main(words) == 0
    before = load_state_dict(base / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_state_dict(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {key.removesuffix(".weight") for key in after if not torch.equal(after[key], before[key])}
    assert changed == {layer for layer in LAYERS if any(kept.get(layer, [True]))}
    for layer, weight in wanted.items():
        torch.testing.assert_close(after[f"{layer}.weight"], weight, **FLOAT32_SAME_MATH)


def test_the_tools_read_it_and_it_trains_further_as_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build_tiny_sd(tmp_path / "sd", 633)
    save_by_peft(base, tmp_path / "peft", {})
    assert check_lora_weights.main([str(tmp_path / "peft"), "--json"]) == 0
    assert '"rank": 4' in capsys.readouterr().out
    words = ["--models", str(tmp_path / "peft"), "--concat", "--save_to", str(tmp_path / "lora.safetensors")]
    assert merge_lora.main(words) == 0
    file, joined = read_adapter_file(tmp_path / "peft"), read_adapter_file(tmp_path / "lora.safetensors")
    for layer in LAYERS:
        joined_weight = joined.modules[f"lora_unet_{layer.replace('.', '_')}"].weight()
        torch.testing.assert_close(
            joined_weight, file.modules[f"base_model.model.{layer}"].weight(), **FLOAT32_SAME_MATH
        )


@pytest.mark.parametrize(
    ("leaf", "shape", "message"),
    [
        ("lora_A", None, "without its lora_A"),
        ("lora_E", (RANK - 1, 1), "do not fit together"),
        ("lora_B", None, "lora_B"),
    ],
)
def test_mismatched_tensors_are_named(leaf: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path) -> None:
    save_by_peft(build_tiny_sd(tmp_path / "sd", 634), tmp_path / "peft", {})
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{LAYERS[2]}.{leaf}"
    old = tensors.pop(key)
    save_file({**tensors, **({} if shape is None else {key: old[: shape[0]].clone()})}, path)
    with pytest.raises(ValueError, match=message):
        read_adapter_file(tmp_path / "peft")


# Initialisation of LoRA factors against PEFT: values, the trained layer, and the file for the unchanged base.

STEPS = 12


def layer_of(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(23, 14).requires_grad_(False)


def wrap_by_peft(layer: nn.Linear, init: str, use_rslora: bool) -> Any:
    """Return PEFT's model of a copy of the layer, whose weight PEFT changes."""
    copy = nn.Sequential(nn.Linear(23, 14))
    copy[0].load_state_dict(layer.state_dict())
    config = peft.LoraConfig(r=6, lora_alpha=4.0, target_modules=["0"], init_lora_weights=init, use_rslora=use_rslora)
    return peft.get_peft_model(copy, config)


def factors_of(theirs: Any) -> tuple[Tensor, Tensor]:
    """Return PEFT's (up, down)."""
    inner = theirs.base_model.model[0]
    return inner.lora_B["default"].weight, inner.lora_A["default"].weight


def scale_of(use_rslora: bool) -> float:
    return 4.0 / 6**0.5 if use_rslora else 4.0 / 6


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_factors_match_peft(init: str, use_rslora: bool) -> None:
    layer = layer_of(451)
    ours = make_starting_delta(init, layer, 6, scale_of(use_rslora))
    assert isinstance(ours, FromStart)
    up, down = factors_of(wrap_by_peft(layer, init, use_rslora))
    torch.testing.assert_close(ours.lora_up.start, up.detach(), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(ours.lora_down.start, down.detach(), **FLOAT32_SAME_MATH)


def test_orthogonal_factors_match_peft_with_the_same_random_numbers() -> None:
    layer = layer_of(452)
    theirs = wrap_by_peft(layer, "gaussian", False).base_model.model[0]
    torch.manual_seed(453)
    theirs.orthogonal_init("default")
    torch.manual_seed(453)
    LowRank(layer, 6)  # the default initialisation draws first
    state = torch.get_rng_state()
    torch.manual_seed(453)
    ours = make_starting_delta("orthogonal", layer, 6, 1.0)
    torch.set_rng_state(state)
    theirs.orthogonal_init("default")
    up, down = ours.factors()
    torch.testing.assert_close(up, theirs.lora_B["default"].weight, **EXACT)
    torch.testing.assert_close(down, theirs.lora_A["default"].weight, **EXACT)
    assert (up @ down).abs().max() < 1e-6 < up.abs().max()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_sgd_gives_the_same_outputs_and_both_files_change_the_base_equally(
    tmp_path: Path, init: str, use_rslora: bool
) -> None:
    """PEFT subtracts the initial factors from the base; ours keeps the base and trains the difference.

    All in float32: outputs over twelve steps agree to 1e-4, since PEFT's base has one more rounding.
    """
    layer = layer_of(454)
    scale = scale_of(use_rslora)
    theirs = wrap_by_peft(layer, init, use_rslora)
    # The initial values are set below, as in PEFT's documentation.
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(str(tmp_path / "start"))
    adapter = adapter_on(layer, make_starting_delta(init, layer, 6, scale), scale * 6)
    adapter.install()
    ups, downs = factors_of(theirs)
    optimizers = [torch.optim.SGD(p, lr=0.03) for p in ([ups, downs], list(module_of(adapter).parameters()))]
    x, target = torch.randn(9, 23), torch.randn(9, 14)
    first = layer(x).detach()
    for _ in range(STEPS):
        for model, optimizer in zip((theirs, layer), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert (layer(x) - first).abs().max() > 0.05

    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "lora"))
    up, down = (next(t for key, t in saved.items() if part in key) for part in ("lora_B", "lora_A"))
    factor = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    leaves = adapter.change.stored_tensors()
    ours = float(leaves["alpha"]) / 12 * leaves["lora_up.weight"] @ leaves["lora_down.weight"]
    assert up.shape[1] == leaves["lora_up.weight"].shape[1] == 12
    torch.testing.assert_close(ours, factor * up @ down, rtol=1e-4, atol=1e-4)
    assert ours.abs().max() > 0.01


def test_every_listed_initialisation_exists_in_peft() -> None:
    for name in INITS:
        if name != "default":
            wrap_by_peft(layer_of(455), name, False)


# Folders saved by PEFT are read and merged as PEFT merges them, for every kind that both support.

SAVED_LAYERS = ["linear", "square", "conv", "narrow", "square_conv"]
ROWS: dict[str, Any] = {"target_modules": SAVED_LAYERS, "init_lora_weights": False}
OTHERS: dict[str, Any] = {"target_modules": SAVED_LAYERS, "init_weights": False}
CONFIGS: dict[str, Callable[[], Any]] = {
    "patterns of alternatives": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"conv": 2}, alpha_pattern={"square_conv|narrow": 3}, **ROWS
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **ROWS),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, **OTHERS),
    "LoHa with cores": lambda: peft.LoHaConfig(
        r=4, alpha=6, use_effective_conv2d=True, alpha_pattern={"square": 1}, **OTHERS
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=6, decompose_factor=4, decompose_both=True, **OTHERS),
    "LoKr with cores": lambda: peft.LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, decompose_factor=2, **OTHERS),
    "LoKr of whole matrices": lambda: peft.LoKrConfig(r=16, alpha=8, rank_pattern={"square": 32}, **OTHERS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=SAVED_LAYERS, init_weights=False),
}


class Layers(nn.Module):
    """Layers with a square convolution, whose output magnitudes have the shape that others use per input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.square = nn.Linear(24, 32), nn.Linear(16, 16)
        self.conv, self.narrow = nn.Conv2d(16, 24, 3), nn.Conv2d(16, 24, 1)
        self.square_conv = nn.Conv2d(16, 16, 3)


def save_in_namings(folder: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a folder with PEFT; return (the weights, the merged weights) by layer name."""
    torch.manual_seed(437)
    model = Layers().requires_grad_(False)
    before = {name: model.get_parameter(f"{name}.weight").clone() for name in SAVED_LAYERS}
    theirs = peft.get_peft_model(model, CONFIGS[what]())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
            parameter.data *= 1 + 0.5 * torch.rand(parameter.shape) if "magnitude" in name else 1
    theirs.save_pretrained(str(folder))
    merged = theirs.merge_and_unload()
    return before, {name: merged.get_parameter(f"{name}.weight").detach() for name in SAVED_LAYERS}


@pytest.mark.parametrize("what", CONFIGS)
def test_merged_weights_match_peft(tmp_path: Path, what: str) -> None:
    before, after = save_in_namings(tmp_path, what)
    file = read_adapter_file(tmp_path)
    require_layouts(file, COMPUTED, "merged")
    assert len(file.modules) == len(SAVED_LAYERS)
    for name, weight in before.items():
        actual = file.modules[f"base_model.model.{name}"].merged(weight, 1.0)
        assert (actual - weight).norm() > 1e-3 * weight.norm()
        torch.testing.assert_close(actual, after[name], **FLOAT32_SAME_MATH)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("beside the file", "patterns of alternatives"),
        ("in its metadata", "patterns of alternatives"),
        ("beside the file", "LoKr of whole matrices"),
    ],
)
def test_the_update_norm_includes_alpha_recorded_outside_the_tensors(
    tmp_path: Path, where: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    before, after = save_in_namings(tmp_path / "saved", what)
    shutil.copytree(tmp_path / "saved", tmp_path / "read")
    if where == "in its metadata":
        settings = json.loads((tmp_path / "read" / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "read" / "adapter_model.safetensors")
        unet_tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in tensors.items()}
        unet_settings = {f"unet.{key}": settings[key] for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern")}
        save_file(
            unet_tensors,
            tmp_path / "read" / "adapter.safetensors",
            {"lora_adapter_metadata": json.dumps(unet_settings)},
        )
    path = tmp_path / "read" / ("adapter.safetensors" if where == "in its metadata" else "")
    assert check_lora_weights.main([str(path), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    norms = {module["name"].rpartition(".")[2]: module["update_norm"] for module in modules}
    assert norms == pytest.approx({name: float((after[name] - before[name]).norm()) for name in SAVED_LAYERS}, rel=1e-4)
