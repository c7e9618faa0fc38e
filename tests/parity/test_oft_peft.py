"""OFT against PEFT: equal angles give equal outputs, gradients, merged weights and files, in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.checkpoints.files import load_state_dict
from networks import oft_v2
from networks.core.changes.blocks import block_size_for
from networks.core.kinds.oft_v2 import ANGLES, OftV2, make_fresh
from networks.core.registry.layouts import make_change
from tests.parity.test_lora_merge import tiny_clip
from tests.tolerances import FLOAT32_DEEP, FLOAT64
from tools import merge_lora

peft: Any = pytest.importorskip("peft")

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (2, 5, 24)),
    "1x1": (lambda: nn.Conv2d(24, 10, 1), (2, 24, 4, 4)),
    "3x3": (lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1), (2, 8, 6, 6)),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"block_share": True},
    "limited": {"coft": True, "eps": 0.7},
    "limited and shared": {"coft": True, "eps": 0.4, "block_share": True},
}
LIMITED = {"rtol": 2e-6, "atol": 1e-7}  # PEFT's limit is a float32 number
CASES = [(name, form) for name in LAYERS for form in FORMS]


def theirs_on(name: str, form: str, layer: nn.Module) -> tuple[Any, nn.Parameter]:
    """Return PEFT's wrapped layer with random angles, and the angles."""
    wrapped = nn.Sequential(LAYERS[name][0]()).double()
    wrapped[0].load_state_dict(layer.state_dict())
    config = peft.OFTConfig(oft_block_size=8, target_modules=["0"], init_weights=False, **FORMS[form])
    theirs = peft.get_peft_model(wrapped, config).double()
    (angles,) = (parameter for key, parameter in theirs.named_parameters() if "oft_R" in key)
    return theirs, angles


@pytest.mark.parametrize(("name", "form"), CASES)
def test_outputs_gradients_and_merged_weights_match_peft(name: str, form: str) -> None:
    torch.manual_seed(6101 + CASES.index((name, form)))
    layer: Any = LAYERS[name][0]().double().requires_grad_(False)
    theirs, angles = theirs_on(name, form, layer)
    eps = FORMS[form].get("eps")
    close = FLOAT64 if eps is None else LIMITED
    ours = make_fresh(layer, 8, eps=eps, is_shared=FORMS[form].get("block_share", False)).double()
    ours.load({ANGLES: angles.detach()})
    x = torch.randn(LAYERS[name][1], dtype=torch.float64, requires_grad=True)
    y = ours.forward(x, layer, 1.0)
    (parameter,) = ours.parameters()
    if name == "3x3":  # PEFT rotates patches and sums where they overlap; compare with its merged weight
        theirs.base_model.model[0].oft_R["default"].get_weight()
    else:
        torch.testing.assert_close(y, theirs(x), **close)
    ours.rotation.limit_(1.0)  # type: ignore[attr-defined]
    torch.testing.assert_close(parameter.detach(), angles.detach(), **close)  # PEFT limits the angles when called
    if name != "3x3":
        grads = torch.autograd.grad(ours.forward(x, layer, 1.0).square().sum(), (x, parameter))
        their_grads = torch.autograd.grad(theirs(x).square().sum(), (x, angles))
        for one, other in zip(grads, their_grads, strict=True):
            torch.testing.assert_close(one, other, **close)
    merged = theirs.merge_and_unload()[0]
    torch.testing.assert_close(ours.merged(layer.weight), merged.weight, **close)
    torch.testing.assert_close(y, merged(x), **close)
    assert (y - layer(x)).abs().max() > 0.05


def test_gradients_of_a_rotated_convolution_match_its_merged_weight() -> None:
    torch.manual_seed(6121)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1).double().requires_grad_(False)
    change = make_fresh(layer, 6).double()
    with torch.no_grad():
        next(change.parameters()).normal_(std=0.2)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    learned = (x, *change.parameters())
    for strength in (1.0, 0.3):
        expected = nn.functional.conv2d(x, change.merged(layer.weight, strength), layer.bias, 2, 1)
        actual = change.forward(x, layer, strength)
        torch.testing.assert_close(actual, expected, **FLOAT64)
        wanted = torch.autograd.grad(expected.square().sum(), learned)
        for one, other in zip(torch.autograd.grad(actual.square().sum(), learned), wanted, strict=True):
            torch.testing.assert_close(one, other, **FLOAT64)


def test_blocks_equal_the_cayley_transform_up_to_the_fifth_power() -> None:
    """The truncated series of (1 + Q) / (1 - Q), with half of its next term, has an error of about |Q|^4."""
    torch.manual_seed(6131)
    for size in (1e-3, 1e-2):
        rotation = OftV2(torch.randn(3, 10, dtype=torch.float64) * size)
        skew = rotation.angles(1.0)[0]
        assert torch.equal(skew, -skew.mT)
        identity = torch.eye(5, dtype=torch.float64)
        exact = torch.linalg.solve(identity - skew, identity + skew)
        error = (identity + rotation.residuals(skew[None])[0] - exact).abs().max().item()
        assert 0 < error < 3 * skew.norm(dim=(1, 2)).max().item() ** 4


def test_sizes_are_adjusted_as_in_peft() -> None:
    adjust = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for num_columns in (6, 24, 40, 320, 768, 1280, 2880, 3072):
        for wanted in (2, 3, 5, 7, 12, 31, 32, 33, 64, 5000):
            nearest = wanted if num_columns % wanted == 0 else adjust(None, num_columns, wanted)
            expected = nearest if nearest > 1 else block_size_for(num_columns, 2, True)
            assert block_size_for(num_columns, wanted, True) == expected, (num_columns, wanted)


@torch.no_grad()
def test_a_folder_saved_by_peft_is_merged_and_trained_further(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    config = peft.OFTConfig(oft_block_size=4, target_modules=["to_q", "to_out.0", "proj_in"], init_weights=False)
    torch.manual_seed(6141)
    theirs = peft.get_peft_model(unet, config)
    theirs.save_pretrained(str(tmp_path / "saved"))
    generator = torch.Generator().manual_seed(6142)
    unet_inputs: Any = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([31, 742]),
        torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator),
    )
    expected: Tensor = theirs(*unet_inputs).sample
    words = ["--sd_model", str(tiny_sd_folder), "--models", str(tmp_path / "saved"), "--save_to"]
    assert merge_lora.main([*words, str(tmp_path / "merged")]) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet")
    alone = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    assert (alone(*unet_inputs).sample - expected).abs().max() > 0.05
    torch.testing.assert_close(merged(*unet_inputs).sample, expected, **FLOAT32_DEEP)

    text, seen = view([tiny_clip(6144, torch.float32)], alone)
    file = str(tmp_path / "saved" / "adapter_model.safetensors")
    network, weights = oft_v2.create_network_from_weights(1.0, file, None, text, seen)
    network.apply_to(text, seen, False, True)
    network.load_weights(file)
    network.eval()
    torch.testing.assert_close(alone(*unet_inputs).sample, expected, **FLOAT32_DEEP)
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    back = {key: t for key, t in load_state_dict(tmp_path / "ours.safetensors").items()}
    saved = load_state_dict(file)
    assert len(back) == len(saved) == len(weights)
    for key, tensor in saved.items():
        name = "lora_unet_" + key.removeprefix("base_model.model.").removesuffix(f".{ANGLES}").replace(".", "_")
        assert torch.equal(back[f"{name}.{ANGLES}"], tensor)
    assert make_change({ANGLES: next(iter(back.values()))}).stored_tensors().keys() == {ANGLES}
    # PEFT also loads our file, converted to its names.
    torch.manual_seed(6143)
    fresh_unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    reading = peft.get_peft_model(fresh_unet, config)
    state = {key: back["lora_unet_" + key.removeprefix("base_model.model.").removesuffix(f".{ANGLES}").replace(".", "_")
                       + f".{ANGLES}"] for key in saved}  # fmt: skip
    peft.set_peft_model_state_dict(reading, state)
    torch.testing.assert_close(reading(*unet_inputs).sample, expected, **FLOAT32_DEEP)
