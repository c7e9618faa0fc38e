"""Adapter files in other programs' names compute the same in their model as in ours.

Every named layer has random values, so a wrong name, row order or strength is detected.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd import layers as sd_layers
from library.architectures.sdxl import layers as sdxl_layers
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.adapter_names import BaseNames, FileNaming
from library.checkpoints.files import load_state_dict
from library.checkpoints.recognition import recognise_adapter
from library.checkpoints.saving import save_safetensors
from networks import lora
from networks.core.files.adapter_file import adapter_tensors, parse_adapter
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from tests.tiny.base import Base, Pair, layers_of
from tests.tiny.bases import BASES
from tests.tiny.flux import build_tiny_flux
from tests.tiny.sd3 import CONFIGS
from tests.tolerances import FLOAT32_DEEP
from tools import convert_lora, merge_lora

SEED = 7
Tensors = dict[str, Tensor]


PAIRS: Mapping[str, Callable[[], Pair]] = {size: pair for base in BASES.values() for size, pair in base.pairs.items()}
UNNAMED: Mapping[str, str] = {size: base.unnamed for base in BASES.values() for size in base.pairs}
NIGHTLY = {"sd2", "sdxl", *CONFIGS} - {min(CONFIGS)}  # sizes and relatives of others
FUSED = [  # one layer here is several in diffusers
    next(iter(base.pairs)) for base in BASES.values() if base.pairs and any(m.pieces for m in base.spec.names.modules)
]
NAMED = [name for name in FUSED if UNNAMED[name] == Base.unnamed]


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.nightly if n in NIGHTLY else ()) for n in PAIRS])
def pair(request: pytest.FixtureRequest) -> Pair:
    built: Pair = PAIRS[request.param]()
    unnamed = [path for path, layer in layers_of(built.seen) if layer not in built.layers.values()]
    assert all(re.match(UNNAMED[request.param], path) for path in unnamed)
    if not unnamed:
        assert len(built.their_layers) == sum(len(list(layers_of(part))) for part in built.theirs.values())
    torch.testing.assert_close(built.predict(), built.their_prediction(), **FLOAT32_DEEP)
    return built


def factors(layer: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random (up, down) whose product has about the size of the layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    outputs, inputs, *kernel = weight.shape
    up = torch.randn(outputs, rank, *(1,) * len(kernel), generator=generator)
    down = torch.randn(rank, inputs, *kernel, generator=generator)
    size = float(weight.std()) if weight.numel() > 1 else 1.0
    return up * 0.3 * size, down


def kohya_file(pair: Pair) -> Tensors:
    """Return a LoRA of rank 3 and alpha 2 on every layer."""
    generator = torch.Generator().manual_seed(11)
    tensors: Tensors = {}
    for name, layer in pair.layers.items():
        up, down = factors(layer, 3, generator)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    return tensors


def diffusers_file(pair: Pair) -> Tensors:
    """Return a LoRA on every diffusers layer, with different ranks for neighbours."""
    generator = torch.Generator().manual_seed(12)
    tensors: Tensors = {}
    for number, (name, layer) in enumerate(pair.their_layers.items()):
        up, down = factors(layer, 2 + number % 3, generator)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def convert(tensors: Tensors, names: BaseNames, to: FileNaming) -> Tensors:
    return adapter_tensors(rename(parse_adapter(tensors, {}, "a.safetensors"), names, to).file)


@torch.no_grad()
def merge_by_hand(layers: Mapping[str, nn.Module], tensors: Tensors) -> None:
    """Add a file's changes to the named layers by hand; every key must belong to one of them."""
    for name, module in parse_adapter(tensors, {}, "a.safetensors").modules.items():
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        weight += module.weight().reshape(weight.shape)


def predict_by_diffusers(pair: Pair, tensors: Tensors) -> Tensor:
    """Return the prediction of diffusers' models after its loader, which drops the prefix, has applied the file."""
    tensors = {re.sub(r"^diffusion_model\.", "transformer.", key): tensor for key, tensor in tensors.items()}
    for prefix, part in pair.theirs.items():
        part_tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}.")}
        part.load_lora_adapter(part_tensors, prefix=prefix)
    assert all(key.split(".")[0] in pair.theirs for key in tensors)
    return pair.their_prediction()


def test_our_file_in_diffusers_names_computes_the_same_in_diffusers(pair: Pair) -> None:
    ours = kohya_file(pair)
    base = pair.predict()
    merge_by_hand(pair.layers, ours)
    expected = pair.predict()
    assert (expected - base).abs().max() > 0.1 * base.abs().max()
    actual = predict_by_diffusers(pair, convert(ours, pair.names, "diffusers"))
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)


def test_the_generic_naming_contains_the_same_changes(pair: Pair) -> None:
    """Its names are the paths of the original checkpoint, whose layout our model uses."""
    ours = kohya_file(pair)
    before = parse_adapter(ours, {}, "a.safetensors").modules
    after = parse_adapter(convert(ours, pair.names, "generic"), {}, "b.safetensors").modules
    assert len(after) == len(before) == len(pair.layers)
    for module in pair.names.modules:
        if module.kohya in before:
            torch.testing.assert_close(after[module.generic].weight(), before[module.kohya].weight())


@pytest.mark.parametrize("to", ["kohya", "generic"])
def test_a_diffusers_file_computes_the_same_in_our_model(pair: Pair, to: FileNaming) -> None:
    theirs = diffusers_file(pair)
    here = pair.layers
    if to == "generic":
        here = {module.generic: here[module.kohya] for module in pair.names.modules if module.kohya in here}
    merge_by_hand(here, convert(theirs, pair.names, to))
    expected = pair.predict()
    torch.testing.assert_close(predict_by_diffusers(pair, theirs), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("use", ["train further", "merge"])
def test_network_weights_and_base_weights_accept_diffusers_names(pair: Pair, tmp_path: Path, use: str) -> None:
    """Every layer that an argument can adapt is covered, which excludes embedders of U-Nets."""
    seen, path = network_view(pair), str(tmp_path / "theirs.safetensors")
    save_safetensors(path, diffusers_file(pair))
    loaded, _ = lora.create_network_from_weights(1.0, path, None, [], seen, for_inference=True)
    theirs = {
        key: tensor
        for key, tensor in diffusers_file(pair).items()
        if place(pair.names, key.rpartition(".lora_")[0]) in loaded.adapters
    }
    save_safetensors(path, theirs)
    network, weights = lora.create_network_from_weights(1.0, path, None, [], seen, for_inference=use == "merge")
    if use == "merge":
        network.merge_to([], seen, weights, torch.float32, "cpu")
    else:
        network.apply_to([], seen, False, True)
        network.load_weights(path)
        network.eval()
    actual = pair.predict()
    torch.testing.assert_close(actual, predict_by_diffusers(pair, theirs), **FLOAT32_DEEP)


def network_view(pair: Pair) -> nn.Module:
    """Return our denoiser as networks see it, with names for its layout if it is a tiny U-Net."""
    layers = {"sd1": sd_layers, "sd2": sd_layers, "sdxl": sdxl_layers}.get(pair.names.base)
    if layers is not None:
        pair.seen.adapter_targets = replace(layers.TARGETS, names=pair.names)  # type: ignore[assignment]
    return pair.seen


def place(names: BaseNames, name: str) -> str:
    module = names.find(name)
    assert module is not None
    return module.kohya


SPELLINGS: Mapping[
    str, Callable[[str, str], str]
] = {  # (the model in diffusers' pipeline, the path in it) -> as in a file
    "OneTrainer": lambda model, path: f"lora_{model}_{path.replace('.', '_')}.lora_{{}}.weight",
    "SimpleTuner": lambda model, path: f"lycoris_{path.replace('.', '_')}.lora_{{}}.weight",
    "PEFT": lambda model, path: f"base_model.model.{path}.lora_{{}}.weight",
    "PEFT in a pipeline": lambda model, path: f"{model}.base_model.model.{path}.lora_{{}}.default.weight",
    "no prefix": lambda model, path: f"{path}.lora_{{}}.weight",
}
OF_KOHYA = ("OneTrainer", "SimpleTuner")  # these call the factors lora_down and lora_up


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_without_a_model_prefix_are_resolved(pair: Pair, spelling: str) -> None:
    """Modules found by path give the tensors of diffusers' names and the same base model."""
    denoiser = next(iter(pair.theirs))  # paths of the text adapter begin like those of Anima's blocks
    theirs = {key: tensor for key, tensor in diffusers_file(pair).items() if key.startswith(f"{denoiser}.")}
    spelled = {}
    for key, tensor in theirs.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        ending = {"A": "down", "B": "up"}[factor] if spelling in OF_KOHYA else factor
        spelled[SPELLINGS[spelling](*name.split(".", 1)).format(ending)] = tensor
    assert len(spelled) == len(theirs)
    file = add_model(parse_adapter(spelled, {}, "a.safetensors"), [pair.names])
    actual, wanted = adapter_tensors(rename(file, pair.names, "kohya").file), convert(theirs, pair.names, "kohya")
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in wanted.items())
    specs = list_specs()
    shapes, like = ({k: tuple(t.shape) for k, t in tensors.items()} for tensors in (spelled, theirs))
    assert recognise_adapter(specs, shapes, {}) is recognise_adapter(specs, like, {})


def test_numbered_projections_of_a_fused_layer_are_resolved() -> None:
    """OneTrainer's backups use OMI's format: paths of the original checkpoint plus numbered pieces."""
    pair = PAIRS["flux"]()
    pieces = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}
    theirs = {
        key: tensor
        for key, tensor in diffusers_file(pair).items()
        if key.startswith("transformer.transformer_blocks.0.") and any(f".{piece}." in key for piece in pieces)
    }
    spelled = {}
    for key, tensor in theirs.items():
        path, _, factor = key.removeprefix("transformer.transformer_blocks.0.").partition(".lora_")
        ending = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[factor]
        spelled[f"transformer.double_blocks.0.img_attn.qkv.{pieces[path]}.{ending}"] = tensor
    file = add_model(parse_adapter(spelled, {}, "a.safetensors"), [pair.names])
    actual, wanted = adapter_tensors(rename(file, pair.names, "kohya").file), convert(theirs, pair.names, "kohya")
    assert len(spelled) == 6 and actual.keys() == wanted.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in wanted.items())


def test_network_weights_accept_names_without_a_model_prefix(tmp_path: Path) -> None:
    """OneTrainer writes such files for FLUX.1, with a text encoder."""
    pair = PAIRS["flux"]()
    names = {module.kohya for module in pair.names.modules if "_double_blocks_0_" in module.kohya}
    theirs = {
        key: tensor
        for key, tensor in diffusers_file(pair).items()
        if place(pair.names, key.rpartition(".lora_")[0]) in names
    }
    spelled = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 5),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(5, 2),
    }
    for key, tensor in theirs.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        ending = {"A": "lora_down.weight", "B": "lora_up.weight"}[factor]
        spelled[f"lora_{name.replace('.', '_')}.{ending}"] = tensor
        spelled[f"lora_{name.replace('.', '_')}.alpha"] = torch.tensor(float(theirs[f"{name}.lora_A.weight"].shape[0]))
    save_safetensors(tmp_path / "a.safetensors", spelled)
    network, _ = lora.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, [], network_view(pair))
    network.apply_to([], pair.seen, False, True)
    network.load_weights(str(tmp_path / "a.safetensors"))
    network.eval()
    assert network.adapters.keys() == names
    torch.testing.assert_close(pair.predict(), predict_by_diffusers(pair, theirs), **FLOAT32_DEEP)


def test_a_rehearsal_on_the_meta_device_accepts_other_programs_names(pair: Pair, tmp_path: Path) -> None:
    """Each run first creates its network without weights; q, k and v are fused and alphas created."""
    path = str(tmp_path / "theirs.safetensors")
    save_safetensors(path, diffusers_file(pair))
    seen = network_view(pair)
    wanted, values = lora.create_network_from_weights(1.0, path, None, [], seen)
    with torch.device("meta"):
        network, weights = lora.create_network_from_weights(1.0, path, None, [], seen)
    assert {name: p.shape for name, p in network.named_parameters()} == {
        name: p.shape for name, p in wanted.named_parameters()
    }
    assert weights.keys() == values.keys() and all(torch.equal(weights[key], value) for key, value in values.items())


def halves(size: int) -> tuple[int, int]:
    return (2, size // 2) if size % 2 == 0 else (1, size)


def file_of_kind(pair: Pair, kind: str) -> tuple[Tensors, dict[str, Tensor]]:
    """Return (a file in SimpleTuner's names on every diffusers layer, the expected weights in float64)."""
    generator = torch.Generator().manual_seed(13)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors, after = {}, {}
    for name, layer in pair.their_layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        stem, (num_rows, num_columns) = f"lycoris_{name.split('.', 1)[1].replace('.', '_')}", weight.flatten(1).shape
        if kind == "LoKr":
            (outer, inner), (columns, n) = halves(num_rows), halves(num_columns)
            leaves = {"lokr_w1": randn(outer, columns), "lokr_w2_a": randn(inner, 2), "lokr_w2_b": randn(2, n)}
            change = torch.kron(leaves["lokr_w1"].double(), leaves["lokr_w2_a"].double() @ leaves["lokr_w2_b"].double())
            scale = 0.25
        elif kind == "LoHa":
            sizes = {"hada_w1_a": (num_rows, 2), "hada_w1_b": (2, num_columns)}
            sizes |= {leaf.replace("w1", "w2"): shape for leaf, shape in sizes.items()}
            leaves = {leaf: randn(*shape) for leaf, shape in sizes.items()}
            a1, b1, a2, b2 = (tensor.double() for tensor in leaves.values())
            change, scale = (a1 @ b1) * (a2 @ b2), 0.25
        else:
            leaves = {"lora_down.weight": randn(2, num_columns), "lora_up.weight": randn(num_rows, 2)}
            change, scale = leaves["lora_up.weight"].double() @ leaves["lora_down.weight"].double(), 0.25
        size = 0.3 * float(weight.std()) if weight.numel() > 1 else 0.3
        first = next(iter(leaves))
        leaves[first] = leaves[first] * size
        changed = weight.double() + size * scale * change.view(weight.shape)
        if kind == "DoRA":
            wide = (-1, *(1,) * (weight.dim() - 1))
            leaves["dora_scale"] = (
                weight.flatten(1).norm(dim=1).view(wide) * (1 + 0.2 * randn(num_rows).view(wide)).abs()
            )
            changed = changed / changed.flatten(1).norm(dim=1).view(wide) * leaves["dora_scale"]
        tensors |= {f"{stem}.{leaf}": tensor for leaf, tensor in leaves.items()}
        tensors[f"{stem}.alpha"] = torch.tensor([0.5])  # for rank 2
        after[name] = changed
    return tensors, after


@pytest.mark.parametrize("name", NAMED)
def test_output_magnitudes_of_all_parts_of_a_fused_layer_are_joined(name: str, tmp_path: Path) -> None:
    """Such a file can be trained further and is saved under Kohya names."""
    pair = PAIRS[name]()
    tensors, after = file_of_kind(pair, "DoRA")
    path = str(tmp_path / "a.safetensors")
    save_safetensors(path, tensors)
    network, _ = lora.create_network_from_weights(1.0, path, None, [], network_view(pair))
    network.load_weights(path)
    network.apply_to([], pair.seen, False, True)
    known = {name for name in after if place(pair.names, name) in network.adapters}
    with torch.no_grad():
        for name in known:
            weight = pair.their_layers[name].weight
            assert isinstance(weight, Tensor)
            weight.copy_(after[name])
    torch.testing.assert_close(pair.predict(), pair.their_prediction(), **FLOAT32_DEEP)


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
@pytest.mark.parametrize("name", FUSED)
def test_training_continues_from_other_kinds_on_parts_of_a_fused_layer(name: str, kind: str, tmp_path: Path) -> None:
    """The file is saved under its original names."""
    pair = PAIRS[name]()
    tensors, after = file_of_kind(pair, kind)
    unnamed = [f"lycoris_{n.split('.', 1)[1].replace('.', '_')}." for n in after if pair.names.find(n) is None]
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(unnamed))}
    path, again = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_safetensors(path, tensors)
    network_module = import_module(f"networks.{kind.lower()}")
    network, _ = network_module.create_network_from_weights(1.0, path, None, [], network_view(pair), use_scalar="True")
    network.load_weights(path)
    network.save_weights(again, None, {})
    saved = load_state_dict(Path(again))
    known = {name for name in after if place(pair.names, name) in network.adapters}
    stems = {f"lycoris_{name.split('.', 1)[1].replace('.', '_')}" for name in known}
    assert saved.keys() == {key for key in tensors if key.partition(".")[0] in stems}
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, tensors[key].view(tensor.shape), rtol=0, atol=0)
    network.apply_to([], pair.seen, False, True)
    ours = pair.predict()
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(ours.square().sum(), list(named.values()))
    still = {name for name, gradient in zip(named, gradients, strict=True) if not gradient.any()}
    assert all("joint_blocks_1_context_block_attn_qkv.rows_0_1" in name for name in still)  # SD3 discards this output
    with torch.no_grad():
        for name in known:
            weight = pair.their_layers[name].weight
            assert isinstance(weight, Tensor)
            weight.copy_(after[name])
    torch.testing.assert_close(ours, pair.their_prediction(), **FLOAT32_DEEP)
    generator = torch.Generator().manual_seed(3771)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    moved = pair.predict()
    network.save_weights(again, None, {})
    network.remove()
    other, weights = network_module.create_network_from_weights(
        1.0, again, None, [], network_view(pair), for_inference=True
    )
    other.merge_to([], pair.seen, weights, torch.float32, "cpu")
    torch.testing.assert_close(pair.predict(), moved, **FLOAT32_DEEP)
    assert (moved - ours).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
@pytest.mark.parametrize("name", NAMED)
def test_other_kinds_on_parts_of_a_fused_layer_are_merged(name: str, kind: str, tmp_path: Path) -> None:
    """This includes layers whose row halves are swapped in diffusers."""
    pair = PAIRS[name]()
    tensors, after = file_of_kind(pair, kind)
    path = str(tmp_path / "a.safetensors")
    save_safetensors(path, tensors)
    network, weights = lora.create_network_from_weights(1.0, path, None, [], network_view(pair), for_inference=True)
    with pytest.raises(UserError, match=f"Use --network_module networks.{kind.lower()}"):
        lora.create_network_from_weights(1.0, path, None, [], network_view(pair))
    known = {name for name in after if place(pair.names, name) in network.adapters}
    assert any(pair.names.find(name).piece_of(name) is not None for name in known)  # type: ignore[union-attr]
    network.merge_to([], pair.seen, weights, torch.float32, "cpu")
    with torch.no_grad():
        for name in known:
            weight = pair.their_layers[name].weight
            assert isinstance(weight, Tensor)
            weight.copy_(after[name])
    torch.testing.assert_close(pair.predict(), pair.their_prediction(), **FLOAT32_DEEP)


def test_unmerged_modules_of_base_weights_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = PAIRS["sd1"]()
    save_safetensors(tmp_path / "a.safetensors", kohya_file(pair))
    network, weights = lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [], network_view(pair), for_inference=True
    )
    network.merge_to([], pair.seen, weights, torch.float32, "cpu")
    assert f"--base_weights {tmp_path / 'a.safetensors'} has weights for 4 modules such as lora_unet_conv_in and" in (
        caplog.text
    )


def test_merge_lora_accepts_lokr_on_parts_of_a_fused_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merge such FLUX.1 files of SimpleTuner and ai-toolkit into a checkpoint, and into one LoRA of full rank."""
    pair = PAIRS["flux"]()
    tensors, after = file_of_kind(pair, "LoKr")
    model, file = build_tiny_flux(tmp_path / "model", SEED)[1], str(tmp_path / "a.safetensors")
    save_safetensors(file, tensors)
    merged, single = str(tmp_path / "merged.safetensors"), str(tmp_path / "one.safetensors")
    assert merge_lora.main(["--sd_model", model, "--models", file, "--save_to", merged]) == 0
    as_lora = ["--base_model", model, "--models", file, "--new_rank", "999", "--save_to", single]
    assert merge_lora.main(as_lora) == 0
    again = str(tmp_path / "again.safetensors")
    assert merge_lora.main(["--sd_model", model, "--models", single, "--save_to", again]) == 0
    with torch.no_grad():
        for name, layer in pair.their_layers.items():
            layer.weight.copy_(after[name])  # type: ignore[union-attr, operator]
    for path in (merged, again):
        pair.seen.load_state_dict(load_state_dict(path))
        torch.testing.assert_close(pair.predict(), pair.their_prediction(), **FLOAT32_DEEP)
    words = ["--model", file, "--save_to", str(tmp_path / "kohya.safetensors"), "--to", "kohya"]
    assert convert_lora.main(words) == 1
    assert "is LoKr of a part of lora_unet_" in capsys.readouterr().err
    assert convert_lora.main([*words, "--drop_unsupported"]) == 0
