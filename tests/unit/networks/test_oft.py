"""networks.oft, oft_v2 and boft: arguments, block sizes, the COFT limit, memory and files."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import boft, loha, oft, oft_flux, oft_v2
from networks.core.changes.orthogonal import Orthogonal
from networks.core.files.adapter_file import read_adapter_file
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds.oft_v2 import ANGLES, OftV2, make_fresh
from networks.core.network.network import AdapterNetwork
from tests.parity.test_dit_lora import tiny_clip, tiny_unet
from tests.tiny.flux import tiny_flux
from tests.tolerances import FLOAT32_DEEP, FLOAT64
from tests.unit.networks.test_dora import Largest
from tests.unit.networks.test_forms import CONV, LINEAR, outputs, perturb
from tests.unit.networks.toy import toy_models


def make_network(seed: int, dim: int | None = None, **arguments: str) -> AdapterNetwork:
    text, unet = toy_models(seed)
    return oft_v2.create_network(1.0, dim, 1.0, None, text, unet, **arguments)


def shape_of(network: AdapterNetwork, name: str) -> list[int]:
    return list(network.adapters[name].change.stored_tensors()[ANGLES].shape)


@pytest.mark.parametrize(
    ("dim", "arguments", "shape"),
    [
        (4, {}, [2, 6]),  # 8 inputs in 2 blocks of 4, of 4 * 3 / 2 angles
        (4, {"oft_block_size": "2"}, [4, 1]),
        (None, {"block_size": "8"}, [1, 28]),
        (None, {}, [1, 28]),  # 32 is more than there are
        (5, {}, [2, 6]),
        (4, {"oft_block_share": "True"}, [1, 6]),
    ],
)
def test_block_sizes_follow_from_the_arguments(dim: int | None, arguments: dict[str, str], shape: list[int]) -> None:
    assert shape_of(make_network(8001, dim, **arguments), LINEAR) == shape


def test_blocks_of_larger_kernels_cover_all_their_columns() -> None:
    assert shape_of(make_network(8011, 4, enable_conv="True"), CONV) == [
        54 // 3,
        3,
    ]  # 6 * 3 * 3, of which 4 is no divisor
    assert shape_of(make_network(8012, 4, enable_conv="True", conv_dim="9"), CONV) == [6, 36]
    assert CONV not in make_network(8013, 4).adapters


def test_a_block_size_that_does_not_divide_the_layer_can_be_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"is 5, which does not divide the 7 inputs of a layer, and .*auto_adjust=False"
    ):
        make_network(8021, 5, auto_adjust="False")
    with pytest.raises(ValueError, match="one input has nothing to turn"):
        make_fresh(nn.Linear(1, 4), 4)


def test_include_patterns_exclude_everything_else() -> None:
    chosen = make_network(8031, 4, include_patterns=r"['.*to_q', 'mid\\..*']", exclude_patterns="up.*").adapters
    assert {adapter.target.path for adapter in chosen.values()} == {
        "down.0.attention.to_q",
        "mid.attention.proj_in",
        "mid.attention.to_q",
        "up.0.attention.to_q",
    }


def test_arguments_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        make_network(8041, 4, block_size="2", conv_alpha="2", conv_dim="2", block_share="1", dropout="0.1")
    for message in (
        "OFT: --network_dim is the size of the blocks; --network_alpha does not count",
        "--network_dim 4 has no effect: --network_args block_size=2",
        "--network_args conv_alpha has no effect: a rotation has no alpha",
        "--network_dropout has no effect with block_share",
    ):
        assert message in caplog.text
    loha.create_network(1.0, 3, 2.0, None, *toy_models(8042), coft="True", enable_conv="1")
    assert "--network_args coft has no effect; it belongs to networks.oft_v2" in caplog.text
    assert (
        "--network_args enable_conv has no effect; it belongs to networks.boft, networks.oft and networks.oft_v2"
        in caplog.text
    )


def test_a_file_overrides_the_number_of_factors_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(8047)
    network = boft.create_network(1.0, 2, 1.0, None, text, unet, boft_n_butterfly_factor="2", include_patterns=".*to_q")
    weights = network.state_dict()
    boft.create_network_from_weights(
        1.0, "file", None, text, unet, dict(weights), boft_n_butterfly_factor="3", auto_adjust="0"
    )
    assert "boft_n_butterfly_factor, auto_adjust has no effect" in caplog.text


def test_boft_refuses_two_block_sizes_and_logs_which_one_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="block_size=4 and boft_block_num=2 say the same in two ways"):
        boft.create_network(1.0, None, 1.0, None, *toy_models(8046), boft_block_size="4", boft_block_num="2")
    with caplog.at_level("INFO"):
        network = boft.create_network(1.0, 3, 1.0, None, *toy_models(8046), boft_block_num="1", boft_dropout="0.2")
    assert "boft_block_num gives the sizes of blocks; --network_dim and --network_alpha do not count" in caplog.text
    change: Any = network.adapters[LINEAR].change
    assert list(change.boft_R.shape) == [1, 1, 8, 8] and change.drops.neuron == 0.2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"boft_R": (1, 2, 4, 4)}, "without its boft_s"),
        ({"boft_s": (6, 1)}, "without its boft_R"),
        ({"boft_R": (2, 3, 2, 2), "boft_s": (6, 1)}, "of the shape [2, 3, 2, 2]; it needs (factors, blocks, b, b)"),
        ({"boft_R": (8, 4, 4), "boft_s": (6, 1)}, "of the shape [8, 4, 4]; it needs (factors, blocks, b, b)"),
        ({"boft_R": (1, 2, 4, 4), "boft_s": (6, 2)}, "it needs one number for each output"),
    ],
)
def test_tensors_that_are_not_boft_are_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    tensors_of_file = {f"{LINEAR}.{leaf}": torch.ones(shape) for leaf, shape in tensors.items()}
    save_safetensors(tmp_path / "x.safetensors", tensors_of_file, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "arguments", [{"dropout": "0.1", "dropout_probability": "0.2"}, {"block_size": "4", "oft_block_size": "2"}]
)
def test_two_names_of_one_argument_must_agree(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="mean the same"):
        make_network(8051, 4, **arguments)


def test_the_coft_limit_is_enforced_before_each_step_and_in_the_file(tmp_path: Path) -> None:
    network = make_network(8061, 4, coft="True", coft_eps="0.05")
    perturb(network, 8062)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    saved = load_state_dict(tmp_path / "x.safetensors")
    network.on_optimizer_step_start(1, 0)
    for name, adapter in network.adapters.items():
        change: Any = adapter.change
        lengths = change.rotation.angles(1.0).detach().norm(dim=(2, 3))
        assert lengths.max() <= 0.05 / lengths.shape[1] ** 0.5 * (1 + 1e-6)
        assert lengths.max() == pytest.approx(0.05 / lengths.shape[1] ** 0.5, rel=1e-5)
        torch.testing.assert_close(saved[f"{name}.{ANGLES}"], change.get_parameter(ANGLES).detach())


@pytest.mark.parametrize("shape", [(5, 96), (2, 96, 4, 4)])
def test_neither_pass_creates_a_tensor_as_large_as_the_weight(shape: tuple[int, ...]) -> None:
    layer: Any = nn.Linear(96, 640) if len(shape) == 2 else nn.Conv2d(96, 640, 1)
    change = make_fresh(layer.requires_grad_(False), 8)
    x = torch.randn(shape, requires_grad=True)
    with Largest() as largest:
        change.forward(x, lambda turned: turned, 1.0).square().sum().backward()
    assert 0 < largest.num_values <= max(96 * 8, x.numel()) < layer.weight.numel()


def test_a_rotated_convolution_saves_its_input_and_no_weight() -> None:
    layer = nn.Conv2d(32, 64, 3, padding=1).requires_grad_(False)
    change = make_fresh(layer, 8)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        change.forward(torch.randn(1, 32, 2, 2, requires_grad=True), layer, 1.0)
    assert max(tensor.numel() for tensor in saved) < layer.weight.numel() / 4


def test_norms_count_shared_blocks_once_per_use() -> None:
    torch.manual_seed(8071)
    layer = nn.Linear(24, 4).double().requires_grad_(False)
    angles = torch.randn(1, 6, dtype=torch.float64) * 1e-4
    shared, apart = Orthogonal(layer, OftV2(angles)), Orthogonal(layer, OftV2(angles.expand(6, 6).clone()))
    torch.testing.assert_close(shared.norm(), apart.norm(), **FLOAT64)
    identity = torch.eye(24, dtype=torch.float64)
    assert shared.norm().item() == pytest.approx((shared.merged(identity) - identity).norm().item(), rel=1e-6)


def test_dropped_blocks_are_the_identity_and_others_are_not() -> None:
    torch.manual_seed(8081)
    layer = nn.Linear(12, 12, bias=False).requires_grad_(False)
    network = oft_v2.create_network(1.0, 4, 1.0, None, *toy_models(8082), dropout_probability="0.5")
    assert {adapter.change.drops.neuron for adapter in network.adapters.values()} == {0.5}  # type: ignore[attr-defined]
    change = Orthogonal(layer, OftV2(torch.randn(3, 6) * 0.3), drops=next(iter(network.adapters.values())).change.drops)  # type: ignore[attr-defined]
    layer.weight.data = torch.eye(12)
    x = torch.randn(1, 12)
    full = change.eval().forward(x, layer, 1.0).view(3, 4)
    patterns = set()
    for _ in range(200):
        actual = change.train().forward(x, layer, 1.0).view(3, 4)
        is_left = [torch.allclose(block, alone) for block, alone in zip(actual, x.view(3, 4), strict=True)]
        for block, turned, dropped in zip(actual, full, is_left, strict=True):
            assert dropped or torch.allclose(block, turned)
        patterns.add(tuple(is_left))
    assert len(patterns) == 8


def test_a_block_size_that_differs_from_the_file_is_named_with_a_fix(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    network = make_network(8091, 2)
    perturb(network, 8092)
    network.save_weights(path, None, {})
    with pytest.raises(
        ValueError, match=r"has blocks of 2 in .*give it blocks of 3; add --dim_from_weights.*--network_dim=2"
    ):
        make_network(8091, 4).load_weights(path)
    with pytest.raises(ValueError, match=r"it needs \[1, 1\]; add --dim_from_weights"):
        make_network(8091, 2, block_share="True").load_weights(path)


@pytest.mark.parametrize("shape", [(2, 4), (6,), (2, 0)])
def test_tensors_that_are_not_angles_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_safetensors(tmp_path / "x.safetensors", {f"{LINEAR}.{ANGLES}": torch.ones(shape)}, {})
    with pytest.raises(ValueError, match=re.escape(f"has {LINEAR}.{ANGLES} of the shape {list(shape)}")):
        read_adapter_file(tmp_path / "x.safetensors")


def test_the_summary_counts_blocks(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(8101)
    network = oft_v2.create_network(1.0, 4, 1.0, None, text, unet, train_norm="True")
    with caplog.at_level("INFO"):
        network.apply_to(text, unet)
    assert "denoiser: 6 modules adapted, blocks of 3, 4, 90 parameters; 3 norms" in caplog.text
    assert len(outputs(text, unet, 8102)) == 2


@pytest.mark.parametrize(
    "leaves", [{"oft_R.weight": (2, 6)}, {"boft_R": (1, 2, 4, 4), "boft_s": (6, 1)}, {"oft_blocks": (2, 3, 3)}]
)
def test_magnitudes_next_to_a_rotation_are_refused_and_never_dropped(leaves: dict[str, tuple[int, ...]]) -> None:
    tensors = {leaf: torch.zeros(shape) for leaf, shape in leaves.items()}
    module = ModuleWeights("lora_unet_x", {**tensors, "dora_scale": torch.ones(6, 1)}, {})
    with pytest.raises(ValueError, match="lora_unet_x: dora_scale beside a rotation is not computed here"):
        module.merged(torch.zeros(6, 8), 1.0)


# New adapters of networks.oft and networks.oft_flux: placement, outputs and files.


def on_sd(seed: int, blocks: int = 4, alpha: float = 1e-3, **arguments: str) -> tuple[AdapterNetwork, Any]:
    models = view([tiny_clip(seed, torch.float32)], tiny_unet(seed, torch.float32))
    return oft.create_network(1.0, blocks, alpha, None, *models, **arguments), models


def test_only_attention_layers_are_adapted_unless_all_are_requested() -> None:
    names = {name.partition(".")[0] for name in on_sd(701)[0].state_dict()}
    assert names and all("_attn1_" in name or "_attn2_" in name for name in names)
    every = {name.partition(".")[0] for name in on_sd(701, enable_all_linear="True")[0].state_dict()}
    assert names < every and any("_ff_net_" in name for name in every - names)
    conv = {name.partition(".")[0] for name in on_sd(701, enable_conv="True")[0].state_dict()}
    assert (
        names < conv and any(name.endswith("_conv1") for name in conv) and not any("_ff_net_" in name for name in conv)
    )
    assert not any(name.startswith("lora_te") for name in every | conv)


def test_fused_projections_of_flux_are_rotated_separately() -> None:
    network = oft_flux.create_network(1.0, 4, 1e-3, None, [], tiny_flux(702), enable_all_linear="True")
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    width = tiny_flux(702).double_blocks[0].img_attn.qkv.in_features
    rest = tiny_flux(702).single_blocks[0].linear1.out_features - 3 * width
    qkv, linear1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    assert [shapes[f"{qkv}.oft_blocks.{i}"] for i in range(3)] == [[4, width // 4, width // 4]] * 3
    assert shapes[f"{linear1}.oft_blocks.3"] == [4, rest // 4, rest // 4] and f"{qkv}.oft_blocks.3" not in shapes
    alone = oft_flux.create_network(1.0, 4, 1e-3, None, [], tiny_flux(702))
    assert {name.split("_")[2] for name in alone.state_dict()} == {"double"}


def rotate(weight: Tensor, blocks_Dbb: Tensor, limit: float) -> Tensor:
    """Return the rotated weight by definition, in float64: each block of rows times (1 + Q) / (1 - Q)."""
    skew = (blocks_Dbb - blocks_Dbb.mT).double()
    skew = skew * min(1.0, limit * len(weight) / float(skew.norm()))
    identity = torch.eye(skew.shape[1], dtype=torch.float64)
    rotations_Dbb = (identity + skew) @ torch.linalg.inv(identity - skew)
    rows = weight.double().unflatten(0, blocks_Dbb.shape[:2])
    return torch.einsum("knm,knp->kmp", rotations_Dbb, rows).flatten(0, 1)


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_angles_rotate_the_rows_of_a_weight_within_the_limit(alpha: float) -> None:
    network, (_, unet) = on_sd(703, alpha=alpha)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    network.apply_to(None, unet, False, True)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(705))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    blocks = network.get_parameter("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks")
    with torch.no_grad():
        blocks.normal_(generator=torch.Generator().manual_seed(706))
    expected = nn.functional.linear(x.double(), rotate(layer.weight.detach(), blocks.detach(), alpha))
    torch.testing.assert_close(layer(x).double(), expected, **FLOAT32_DEEP)


def test_a_saved_network_is_trained_further(tmp_path: Path) -> None:
    network, models = on_sd(707)
    network.apply_to(*models, True, True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(708))
    network.save_weights(str(tmp_path / "oft.safetensors"), None, {})
    saved = load_file(tmp_path / "oft.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"oft_blocks", "alpha"}
    file = str(tmp_path / "oft.safetensors")
    reloaded, weights = oft.create_network_from_weights(1.0, file, None, *on_sd(707)[1])
    reloaded.load_weights(file)
    assert reloaded.state_dict().keys() == network.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in reloaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_keeps_the_limit_of_its_alpha(dtype: torch.dtype) -> None:
    first, second = (on_sd(708, alpha=alpha)[0].to(dtype) for alpha in (1e-3, 1e-4))
    second.load_state_dict(first.state_dict())
    limits = {adapter.change.limit for adapter in second.adapters.values()}  # type: ignore[union-attr]
    assert limits == {float(torch.tensor(1e-3))}


@pytest.mark.parametrize(("blocks", "fits"), [(5, 4), (3, 2), (16, 8)])
def test_blocks_that_do_not_divide_a_layer_are_refused_with_a_number_that_does(blocks: int, fits: int) -> None:
    message = rf"--network_dim {blocks} is the number of blocks .*attn1\.to_q has 16 of them; .* such as {fits},"
    with pytest.raises(UserError, match=message):
        on_sd(709, blocks=blocks)


def test_a_lora_alpha_is_no_limit_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    on_sd(710, alpha=1.0)
    assert "--network_alpha 1 limits no angle" in caplog.text


def test_adapters_can_be_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert (
            on_sd(711)[0]
            .get_parameter("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks")
            .is_meta
        )
