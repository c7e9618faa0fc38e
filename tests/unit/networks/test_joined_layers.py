"""Layers that are joined in the original checkpoint and separate in diffusers, and split_qkv."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames, Piece
from library.models.layer_keys import LayerKeys, Stack, name_layer
from networks import dylora, lora, lora_fa
from networks.core.changes.qkv_split import SplitRank, expand, fold
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, parse_adapter
from networks.core.files.foreign_names import to_own_names
from networks.core.files.renaming import rename
from networks.core.network.network import AdapterNetwork
from tests.contracts.full_size import weights_of_shapes
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tests.unit.networks.toy_transformer import ToyTransformer, toy_transformer

WHOLE, PARTS = "ff.net.0.proj", ("ff.up", "ff.gate")
BLOCK = {"mlp.up_proj": (PARTS[0],), "mlp.gate_proj": (PARTS[1],), "mlp.down_proj": ("ff.net.2",)}
KEYS = LayerKeys({}, (Stack("blocks", "transformer_blocks", BLOCK),), joined=((WHOLE, PARTS),))
NAMES = BaseNames(
    "gated",
    tuple(name_layer(path, KEYS.sources(path)) for path in KEYS.linear_paths({"blocks": 2})),
    joined=KEYS.joined,
)
UP, GATE, DOWN = (f"lora_unet_blocks_1_mlp_{name}_proj" for name in ("up", "gate", "down"))
JOINED = "transformer.transformer_blocks.1.ff.net.0.proj"


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_of(module: str, seed: int, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": draw(rank, 6, seed=seed),
        f"{module}.lora_up.weight": draw(8, rank, seed=seed + 1),
        f"{module}.alpha": torch.tensor(1.0),
    }


def file_of(tensors: dict[str, Tensor]) -> AdapterFile:
    return parse_adapter(tensors, {}, "mine.safetensors")


def change_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    down, up = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"]
    return tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))) / len(down) * up @ down


def test_a_checkpoint_in_diffusers_layout_is_split() -> None:
    shapes = {f"transformer_blocks.0.{name}.weight": shape for name, shape in ((WHOLE, (16, 6)), ("ff.net.2", (6, 8)))}
    weights = KEYS.from_diffusers(weights_of_shapes(shapes))
    assert dict(weights.shapes) == {
        "blocks.0.mlp.up_proj.weight": (8, 6),
        "blocks.0.mlp.gate_proj.weight": (8, 6),
        "blocks.0.mlp.down_proj.weight": (6, 8),
    }


@pytest.mark.parametrize("missing", [None, UP, GATE])
def test_a_file_in_diffusers_names_has_the_joined_layer_with_the_same_effect(missing: str | None) -> None:
    parts = [name for name in (UP, GATE) if name != missing]
    ours = {key: tensor for n, name in enumerate((*parts, DOWN)) for key, tensor in lora_of(name, 10 * n).items()}
    theirs = adapter_tensors(rename(file_of(ours), NAMES, "diffusers").file)
    assert {key.partition(".lora_")[0] for key in theirs} == {JOINED, "transformer.transformer_blocks.1.ff.net.2"}
    change = theirs[f"{JOINED}.lora_B.weight"] @ theirs[f"{JOINED}.lora_A.weight"]
    zero = torch.zeros(8, 6)
    wanted = [change_of(ours, name) if name in parts else zero for name in (UP, GATE)]
    torch.testing.assert_close(change, torch.cat(wanted), **FLOAT32_SAME_MATH)


def test_a_file_with_the_joined_layer_is_read_as_its_parts() -> None:
    theirs = {f"{JOINED}.lora_A.weight": draw(3, 6, seed=1), f"{JOINED}.lora_B.weight": draw(16, 3, seed=2)}
    ours = adapter_tensors(to_own_names(file_of(theirs), NAMES))
    change = theirs[f"{JOINED}.lora_B.weight"] @ theirs[f"{JOINED}.lora_A.weight"]
    for name, rows in ((UP, change[:8]), (GATE, change[8:])):
        torch.testing.assert_close(change_of(ours, name), rows, **FLOAT32_SAME_MATH)


def dora_of(module: str, seed: int) -> dict[str, Tensor]:
    return {**lora_of(module, seed), f"{module}.dora_scale": draw(8, 1, seed=seed + 2)}


def test_magnitudes_of_both_parts_are_joined_too() -> None:
    ours = {**dora_of(UP, 1), **dora_of(GATE, 20)}
    theirs = adapter_tensors(rename(file_of(ours), NAMES, "diffusers").file)
    (magnitudes,) = (tensor for key, tensor in theirs.items() if "magnitude" in key)
    assert torch.equal(magnitudes.flatten(), torch.cat([ours[f"{name}.dora_scale"] for name in (UP, GATE)]).flatten())


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            dora_of(UP, 1),
            rf"diffusers has {UP} and others as one layer, {re.escape(JOINED)}, and DoRA of parts cannot be",
        ),
        ({f"{UP}.lokr_w1": draw(2, 2, seed=1), f"{UP}.lokr_w2": draw(4, 3, seed=2)}, "has no place"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused_by_name(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.safetensors: .*{reason}"):
        rename(file_of(tensors), NAMES, "diffusers")


# Layers that are fused in the original checkpoint and separate in diffusers.

FUSED = ModuleNames(
    "lora_unet_blocks_0_linear1",
    "diffusion_model.blocks.0.linear1",
    (Piece("transformer.b.0.to_q", 1), Piece("transformer.b.0.to_k", 1), Piece("transformer.b.0.mlp", 2)),
)
FUSED_NAMES = BaseNames("toy", (FUSED,))
FUSED_WHOLE = FUSED.kohya


def whole(seed: int, rank: int = 4, alpha: float = 2.0, num_outputs: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{FUSED_WHOLE}.alpha": torch.tensor(alpha),
        f"{FUSED_WHOLE}.lora_down.weight": torch.randn(rank, 5, generator=generator),
        f"{FUSED_WHOLE}.lora_up.weight": torch.randn(num_outputs, rank, generator=generator),
    }


def renamed(tensors: dict[str, Tensor], to: FileNaming) -> dict[str, Tensor]:
    return adapter_tensors(rename(parse_adapter(tensors, {}, "x"), FUSED_NAMES, to).file)


def change(tensors: dict[str, Tensor]) -> Tensor:
    (module,) = parse_adapter(tensors, {}, "x").modules.values()
    return module.weight(torch.float64)


def test_each_piece_gets_its_rows() -> None:
    tensors = whole(970)
    pieces = renamed(tensors, "diffusers")
    products = [
        pieces[f"{piece.diffusers}.lora_B.weight"].double() @ pieces[f"{piece.diffusers}.lora_A.weight"].double()
        for piece in FUSED.pieces
    ]
    assert [product.shape[0] for product in products] == [3, 3, 6]
    torch.testing.assert_close(torch.cat(products), change(tensors), rtol=0, atol=1e-12)


def test_splitting_and_fusing_again_keeps_rank_and_change() -> None:
    tensors = whole(971)
    back = renamed(renamed(tensors, "diffusers"), "kohya")
    assert back.keys() == tensors.keys() and back[f"{FUSED_WHOLE}.lora_down.weight"].shape == (4, 5)
    assert torch.equal(change(back), change(tensors))


def piece_of(name: str, rank: int, num_outputs: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, 5, generator=generator),
        f"{name}.lora_B.weight": torch.randn(num_outputs, rank, generator=generator),
    }


@pytest.mark.parametrize("to", ["kohya", "generic"])
def test_separately_trained_pieces_are_fused_with_the_sum_of_their_ranks(to: FileNaming) -> None:
    """diffusers trains the pieces separately. The file has them in another order and lacks to_k."""
    mlp, q = piece_of("transformer.b.0.mlp", 2, 6, 972), piece_of("transformer.b.0.to_q", 3, 3, 973)
    joined = renamed({**mlp, **q}, to)
    (module,) = parse_adapter(joined, {}, "x").modules.values()
    assert (module.rank, module.scale) == (5, 1.0)
    expected = torch.cat([change(q), torch.zeros(3, 5, dtype=torch.float64), change(mlp)])
    torch.testing.assert_close(module.weight(torch.float64), expected, rtol=0, atol=1e-12)


def test_pieces_stay_separate_in_the_diffusers_naming() -> None:
    mlp, q = piece_of("transformer.b.0.mlp", 2, 6, 974), piece_of("transformer.b.0.to_q", 3, 3, 975)
    after = renamed({**mlp, **q}, "diffusers")
    assert after.keys() == mlp.keys() | q.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in {**mlp, **q}.items())


def test_sizes_that_do_not_match_are_errors() -> None:
    with pytest.raises(ValueError, match="has 10 outputs, which is no multiple of 4"):
        renamed(whole(976, num_outputs=10), "diffusers")
    q, mlp = piece_of("transformer.b.0.to_q", 3, 3, 977), piece_of("transformer.b.0.mlp", 2, 8, 978)
    with pytest.raises(ValueError, match=f"sizes of the pieces of {FUSED_WHOLE} do not fit"):
        renamed({**q, **mlp}, "kohya")


def test_a_piece_next_to_its_fused_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"has the module {FUSED_WHOLE} twice"):
        renamed({**whole(979), **piece_of("transformer.b.0.to_q", 3, 3, 980)}, "kohya")


# split_qkv: an adapter for each projection of a fused layer, saved in files that every program reads as plain LoRA.

X_BTC = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


def trained(network_module: ModuleType, model: ToyTransformer, **arguments: str) -> AdapterNetwork:
    network: AdapterNetwork = network_module.create_network(1.0, 3, 2, None, None, model, split_qkv="True", **arguments)
    randomize(network, 7)
    network.apply_to(None, model, False, True)
    network.eval()
    return network


def test_expanding_puts_each_projection_on_its_own_columns_and_folding_reverses_it() -> None:
    up_OR = torch.arange(1.0, 11).view(5, 2)
    wide = expand(up_OR, (2, 3))
    assert torch.equal(wide[:2, :2], up_OR[:2]) and torch.equal(wide[2:, 2:], up_OR[2:])
    assert not wide[:2, 2:].any() and not wide[2:, :2].any()
    assert torch.equal(fold(wide, (2, 3)), up_OR)  # type: ignore[arg-type]
    wide[0, 3] = 1
    assert fold(wide, (2, 3)) is None
    assert fold(up_OR, (2, 4)) is None


def test_q_k_v_and_the_rest_are_split_and_other_layers_are_not() -> None:
    network = trained(lora, toy_transformer(0))
    widths = {
        name: adapter.change.delta.widths
        for name, adapter in network.adapters.items()
        if isinstance(adapter.change.delta, SplitRank)  # type: ignore[union-attr]
    }
    assert set(widths) == {
        *(f"lora_unet_doubles_{n}_attn_qkv" for n in range(2)),
        *(f"lora_unet_single_{n}_linear1" for n in range(3)),
    }
    assert set(widths.values()) == {(12, 12, 12), (12, 12, 12, 20)}


@pytest.mark.parametrize("network_module", [lora, lora_fa])
@pytest.mark.parametrize(
    "arguments", [{}, {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "True"}, {"use_scalar": "True"}], ids=str
)
def test_the_file_is_a_plain_lora_with_the_trained_strength(
    network_module: ModuleType, arguments: dict[str, str], tmp_path: Path
) -> None:
    model = toy_transformer(0)
    base = model(X_BTC)
    network = trained(network_module, model, **arguments)
    expected = model(X_BTC)
    assert (expected - base).abs().max() > 1e-2
    path = tmp_path / "split.safetensors"
    network.save_weights(str(path), None, {})
    file = load_file(path)
    assert file["lora_unet_doubles_0_attn_qkv.lora_up.weight"].shape == (36, 9)
    assert file["lora_unet_single_0_linear1.lora_down.weight"].shape == (12, 12)
    assert float(file["lora_unet_single_0_linear1.alpha"]) == 8  # 2 for each of four projections of rank 3
    plain_model = toy_transformer(0)
    plain, weights = lora.create_network_from_weights(1.0, str(path), None, None, plain_model)
    plain.apply_to(None, plain_model, False, True)
    plain.load_weights(str(path))
    torch.testing.assert_close(plain.eval() and plain_model(X_BTC), expected, **FLOAT32_SAME_MATH)
    merged_model = toy_transformer(0)
    merged, weights = lora.create_network_from_weights(1.0, str(path), None, None, merged_model, for_inference=True)
    merged.merge_to(None, merged_model, weights, torch.float32, "cpu")
    torch.testing.assert_close(merged_model(X_BTC), expected, rtol=1e-4, atol=1e-5)  # the whole weight is rebuilt


@pytest.mark.parametrize("from_weights", [False, True])
def test_the_file_loads_back_as_split(from_weights: bool, tmp_path: Path) -> None:
    model = toy_transformer(0)
    network = trained(lora, model)
    expected = model(X_BTC)
    path = tmp_path / "split.safetensors"
    network.save_weights(str(path), None, {})
    again_model = toy_transformer(0)
    if from_weights:
        reloaded, _ = lora.create_network_from_weights(1.0, str(path), None, None, again_model, split_qkv="True")
    else:
        reloaded = lora.create_network(1.0, 3, 2, None, None, again_model, split_qkv="True")
    reloaded.apply_to(None, again_model, False, True)
    reloaded.load_weights(str(path))
    assert {key: tensor.shape for key, tensor in reloaded.state_dict().items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }
    torch.testing.assert_close(reloaded.eval() and again_model(X_BTC), expected, **FLOAT32_SAME_MATH)


def test_gradients_match_separate_layers() -> None:
    """Compare with explicit matrices: each projection's change is its own product."""
    model = toy_transformer(0)
    network = trained(lora, model)
    name = "lora_unet_doubles_0_attn_qkv"
    delta = network.adapters[name].change.delta  # type: ignore[union-attr]
    ups: list[Tensor] = [part.detach().requires_grad_() for part in delta.lora_up.weight.split(12)]
    downs: list[Tensor] = [part.detach().requires_grad_() for part in delta.lora_down.weight.split(3)]
    layer = model.doubles[0].attn_qkv
    expected = torch.cat([x @ (up @ down).T for x in [X_BTC] for up, down in zip(ups, downs, strict=True)], -1) * 2 / 3
    (expected + torch.nn.functional.linear(X_BTC, layer.weight, layer.bias)).square().sum().backward()
    layer(X_BTC).square().sum().backward()
    torch.testing.assert_close(delta.lora_up.weight.grad, torch.cat([u.grad for u in ups]), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(delta.lora_down.weight.grad, torch.cat([d.grad for d in downs]), **FLOAT32_SAME_MATH)


def test_the_norm_limit_applies_to_split_modules() -> None:
    model = toy_transformer(0)
    network = trained(lora, model)
    network.apply_max_norm_regularization(0.01, "cpu")
    change = network.adapters["lora_unet_doubles_0_attn_qkv"].change.weight().detach()  # type: ignore[union-attr]
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-4)


def test_dropouts_work_on_split_modules() -> None:
    model = toy_transformer(0)
    network = trained(lora, model, rank_dropout="0.5", dropout="0.3")
    network.train()
    torch.manual_seed(0)
    first = model(X_BTC)
    assert not torch.equal(first, model(X_BTC)) and first.isfinite().all()


def test_an_unsplit_file_cannot_be_trained_further_as_split(tmp_path: Path) -> None:
    model = toy_transformer(0)
    plain = lora.create_network(1.0, 9, 2, None, None, model)
    randomize(plain, 1)
    path = tmp_path / "plain.safetensors"
    plain.save_weights(str(path), None, {})
    split = lora.create_network(1.0, 3, 2, None, None, model, split_qkv="True")
    with pytest.raises(ValueError, match=r"one adapter for all 3 projections .* split_qkv=False"):
        split.load_weights(str(path))
    with pytest.raises(ValueError, match="leave split_qkv out to train it further as it is"):
        lora.create_network_from_weights(1.0, str(path), None, None, model, split_qkv="True")


def test_dylora_refuses_split_qkv() -> None:
    with pytest.raises(ValueError, match="split_qkv does not work with this --network_module: a file cut"):
        dylora.create_network(1.0, 3, 2, None, None, toy_transformer(0), split_qkv="True")
