"""Initialisation of LoRA factors against PEFT: values, the trained layer, and the file for the unchanged base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from networks.core.changes.init import INITS, FromStart, make_starting_delta
from networks.core.changes.low_rank import LowRank
from tests.tolerances import EXACT, FLOAT32_SAME_MATH
from tests.unit.networks.one_layer import adapter_on, module_of

peft: Any = pytest.importorskip("peft")
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
