"""OFT and BOFT against PEFT: equal angles give equal outputs, gradients, merged weights and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.checkpoints.files import load_state_dict
from networks import boft, oft_v2
from networks.core.changes.blocks import block_size_for
from networks.core.changes.orthogonal import Orthogonal, rotate
from networks.core.files.adapter_file import read_adapter_file
from networks.core.kinds.boft import BLOCKS, SCALES, Boft, fits, read, sizes_for
from networks.core.kinds.boft import make_fresh as make_fresh_boft
from networks.core.kinds.oft_v2 import ANGLES, OftV2, make_fresh
from networks.core.registry.layouts import make_change
from tests.hiding import lazily
from tests.parity.test_dit_lora import tiny_clip
from tests.tolerances import FLOAT32_DEEP, FLOAT64
from tests.unit.networks.test_dora import Largest
from tools import merge_lora

peft = lazily("peft")

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


# BOFT against PEFT: equal parameters give equal outputs, gradients, merged weights and files, in both directions.
# Without a CUDA compiler PEFT supports one factor. Products of several are compared with its permutations and Cayley
# transform, multiplied as dense matrices.

BOFT_LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (2, 5, 24)),
    "no bias": (lambda: nn.Linear(24, 10, bias=False), (2, 5, 24)),
    "1x1": (lambda: nn.Conv2d(24, 10, 1), (2, 24, 4, 4)),
    "3x3": (lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1), (2, 8, 6, 6)),
}
FLOAT32_SOLVE = {"rtol": 1e-5, "atol": 1e-6}  # PEFT's identity matrix is float32


@pytest.mark.parametrize("name", BOFT_LAYERS)
def test_outputs_gradients_and_merged_weights_of_boft_match_peft(name: str) -> None:
    torch.manual_seed(6201 + list(BOFT_LAYERS).index(name))
    layer: Any = BOFT_LAYERS[name][0]().requires_grad_(False)
    wrapped = nn.Sequential(BOFT_LAYERS[name][0]())
    wrapped[0].load_state_dict(layer.state_dict())
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False)
    theirs: Any = peft.get_peft_model(wrapped, config)
    parameters = {key.split(".")[-2]: value for key, value in theirs.named_parameters() if "boft" in key}
    leaves = {leaf: value.detach().clone() for leaf, value in parameters.items()}
    ours = make_fresh_boft(layer, 4)
    assert {leaf: value.numel() for leaf, value in ours.stored_tensors().items()} == {
        k: v.numel() for k, v in leaves.items()
    }
    ours.load({**leaves, SCALES: leaves[SCALES].view(-1, 1)})
    x = torch.randn(BOFT_LAYERS[name][1], requires_grad=True)
    y, their_y = ours.forward(x, layer, 1.0), theirs(x)
    torch.testing.assert_close(y, their_y, **FLOAT32_SOLVE)
    assert (y - layer(x)).abs().max() > 0.05
    grads = torch.autograd.grad(y.square().sum(), (x, *ours.parameters()))
    their_grads = torch.autograd.grad(their_y.square().sum(), (x, *parameters.values()))
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other.view_as(one), rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(ours.merged(layer.weight), merged, **FLOAT32_SOLVE)
    torch.testing.assert_close(read(leaves, None).merged(layer.weight), merged, **FLOAT32_SOLVE)


def dense_rotation(blocks_FDbb: Tensor) -> Tensor:
    """Return R as a dense matrix from PEFT's permutations and Cayley transform."""
    theirs = peft.tuners.boft.layer.BOFTLayer
    num_factors, num_blocks, size, _ = blocks_FDbb.shape
    rotation = torch.eye(num_blocks * size, dtype=blocks_FDbb.dtype)
    for i in range(num_factors):
        order = theirs.block_butterfly_perm(None, len(rotation), num_blocks // 2**i, size // 2, num_factors - 1)
        moved = theirs.perm2mat(None, order).to(rotation)
        skew = (blocks_FDbb[i] - blocks_FDbb[i].mT) / 2
        identity = torch.eye(size, dtype=rotation.dtype)
        blocks = torch.linalg.solve(identity + skew, (identity - skew).expand_as(skew), left=False)
        rotation = moved @ torch.block_diag(*blocks) @ moved.t() @ rotation
    return rotation


@pytest.mark.parametrize(
    ("num_columns", "size", "num_factors"), [(24, 4, 1), (24, 4, 2), (48, 4, 3), (64, 8, 4), (40, 2, 3)]
)
def test_products_of_factors_match_peft(num_columns: int, size: int, num_factors: int) -> None:
    torch.manual_seed(6211 + num_columns + num_factors)
    layer = nn.Linear(num_columns, 6).double().requires_grad_(False)
    change = make_fresh_boft(layer, size, num_factors=num_factors).double()
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.4)
    rotation = dense_rotation(change.get_parameter(BLOCKS).detach())
    identity = torch.eye(num_columns, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.t(), identity, **FLOAT64)
    residuals = change.rotation.residuals(change.rotation.angles(1.0)).detach()
    torch.testing.assert_close(rotate(identity, residuals), rotation, **FLOAT64)
    torch.testing.assert_close(rotate(identity, residuals, is_transposed=True), rotation.t(), **FLOAT64)
    expected = change.get_parameter(SCALES) * (rotation @ layer.weight.t()).t()
    torch.testing.assert_close(change.merged(layer.weight), expected, **FLOAT64)
    x = torch.randn(3, num_columns, dtype=torch.float64, requires_grad=True)
    actual = change.forward(x, layer, 1.0)
    wanted = nn.functional.linear(x, change.merged(layer.weight), layer.bias)
    torch.testing.assert_close(actual, wanted, **FLOAT64)
    learned = (x, *change.parameters())
    wanted_grads = torch.autograd.grad(wanted.square().sum(), learned)
    for mine, other in zip(torch.autograd.grad(actual.square().sum(), learned), wanted_grads, strict=True):
        torch.testing.assert_close(mine, other, **FLOAT64)


def test_several_factors_mix_inputs_across_blocks() -> None:
    torch.manual_seed(6221)
    for num_factors in (1, 2, 3):
        change = make_fresh_boft(nn.Linear(32, 4), 4, num_factors=num_factors)
        with torch.no_grad():
            change.get_parameter(BLOCKS).normal_()
        reached = (dense_rotation(change.get_parameter(BLOCKS).detach())[0].abs() > 1e-6).sum()
        assert reached == 4 * 2 ** (num_factors - 1)


@pytest.mark.parametrize("num_factors", [1, 3])
def test_no_dense_rotation_matrix_is_built(num_factors: int) -> None:
    layer = nn.Linear(256, 2).requires_grad_(False)
    change = make_fresh_boft(layer, 4, num_factors=num_factors)
    x = torch.randn(4, 256, requires_grad=True)
    with Largest() as largest:
        change.forward(x, layer, 1.0).square().sum().backward()
        change.merged(layer.weight)
    assert 0 < largest.num_values <= num_factors * 256 * 4
    assert not list(change.buffers())


def test_valid_block_sizes_match_peft() -> None:
    for num_columns in (24, 30, 36, 320):
        for num_factors in (1, 2, 3):
            for size in range(2, num_columns + 1):
                is_taken = num_columns % size == 0 and (
                    num_factors == 1 or (size % 2 == 0 and num_columns % (size * 2 ** (num_factors - 1)) == 0)
                )
                assert fits(num_columns, size, num_factors) == is_taken
    assert sizes_for(320, 4, 0, 3, True) == (80, 4)
    assert sizes_for(320, 7, 0, 2, True) == (40, 8)
    assert sizes_for(320, 0, 10, 1, False) == (10, 32)
    for wrong, message in (
        ((30, 4, 0, 3, True), "block_size=4.*30 inputs, of which sizes none"),
        ((320, 4, 7, 1, True), "boft_block_num=7 .*320 inputs"),
        ((320, 7, 0, 2, False), "block_size=7 .*sizes 2, 4, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            sizes_for(*wrong)


def test_scales_stay_in_float32_when_the_change_is_cast() -> None:
    change = Orthogonal(
        nn.Linear(8, 3), Boft(torch.zeros(1, 2, 4, 4), torch.tensor([[1.0009765625], [1.0], [0.9990234375]]))
    )
    change.to(torch.bfloat16)
    assert change.get_parameter(BLOCKS).dtype == torch.bfloat16
    assert change.get_parameter(SCALES).flatten().tolist() == [1.0009765625, 1.0, 0.9990234375]


def test_a_folder_saved_by_peft_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 6, 3))
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["0", "1"], init_weights=False)
    torch.manual_seed(6231)
    theirs: Any = peft.get_peft_model(model, config)
    theirs.save_pretrained(str(tmp_path))
    file = read_adapter_file(tmp_path)
    weights = [layer.weight.detach().clone() for layer in (theirs.base_model.model[0], theirs.base_model.model[1])]
    merged = theirs.merge_and_unload()
    assert [module.form for module in file.modules.values()] == ["boft", "boft"] and not file.unknown
    for i, module in enumerate(file.modules.values()):
        assert module.rank == 4
        torch.testing.assert_close(module.merged(weights[i], 1.0), merged[i].weight, **FLOAT32_SOLVE)


@torch.no_grad()
def test_peft_loads_our_files(tiny_sd_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    generator = torch.Generator().manual_seed(6241)
    unet_inputs: Any = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([31, 742]),
        torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator),
    )
    alone: Tensor = unet(*unet_inputs).sample
    text, seen = view([tiny_clip(6242, torch.float32)], unet)
    network = boft.create_network(1.0, 4, 1, None, text, seen, enable_conv="True")
    network.apply_to(text, seen, False, True)
    torch.manual_seed(6243)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    network.eval()
    expected: Tensor = unet(*unet_inputs).sample
    assert (alone - expected).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    saved = load_state_dict(tmp_path / "ours.safetensors")

    plain = UNet2DConditionModel.from_pretrained(tiny_sd_folder, subfolder="unet")
    names = {f"lora_unet_{name}".replace(".", "_"): name for name, _ in plain.named_modules()}
    targets = sorted({names[key.split(".")[0]] for key in saved})
    assert any(isinstance(plain.get_submodule(name), nn.Conv2d) for name in targets)
    config = peft.BOFTConfig(boft_block_size=4, target_modules=targets, init_weights=False)
    theirs: Any = peft.get_peft_model(plain, config)
    peft_tensors = {}
    for key, tensor in saved.items():
        module, leaf = key.split(".")
        is_row = leaf == SCALES and isinstance(unet.get_submodule(names[module]), nn.Conv2d)
        peft_tensors[f"base_model.model.{names[module]}.{leaf}"] = tensor.view(1, -1) if is_row else tensor
    loaded = peft.set_peft_model_state_dict(theirs, peft_tensors)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "boft_" in key]
    torch.testing.assert_close(theirs(*unet_inputs).sample, expected, **FLOAT32_DEEP)
