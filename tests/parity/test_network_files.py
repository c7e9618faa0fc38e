"""Files of our network modules with Kohya names: in diffusers' models, merged, and in LyCORIS."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.architectures.flux.layers import NAMES
from library.architectures.lumina.layers import NAMES as LUMINA_NAMES
from library.architectures.sdxl.assembly import build
from library.architectures.sdxl.options import SdxlOptions
from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames, FileNaming
from library.commands.adapter_files import spec_for_file
from library.options.model import ModelOptions
from networks.core.files.adapter_file import adapter_tensors, parse_adapter, read_adapter_file, save_adapter_file
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from networks.lora import create_network, create_network_from_weights
from tests.parity.denoisers import save_trained
from tests.parity.test_conversions import predict_by_diffusers
from tests.tiny.base import Pair
from tests.tiny.bases import BASES
from tests.tolerances import EXACT, FLOAT32_DEEP
from tools.convert_lora import convert

KOHYA = [name for name, base in BASES.items() if base.is_flow and base.dit is None and base.pairs]
Arguments = Mapping[str, str]
NETWORKS: tuple[tuple[str, Arguments], ...] = (
    ("networks.lora", {"use_scalar": "True"}),
    ("networks.lora_fa", {}),
    ("networks.dylora", {"unit": "2"}),
)
CASES = [(name, *network) for name in KOHYA for network in ((BASES[name].module, BASES[name].everything), *NETWORKS)]


def pair_of(name: str) -> Pair:
    return next(iter(BASES[name].pairs.values()))()


@pytest.mark.parametrize(("name", "module", "arguments"), CASES, ids=str)
def test_diffusers_predicts_the_same_with_our_file(
    name: str, module: str, arguments: Arguments, tmp_path: Path
) -> None:
    pair, path = pair_of(name), tmp_path / "ours.safetensors"
    base, expected = save_trained(import_module(module), path, arguments, pair.seen, pair.predict)
    assert (expected - base).abs().max() > 0.01
    tensors = adapter_tensors(rename(read_adapter_file(path), pair.names, "diffusers").file)
    torch.testing.assert_close(predict_by_diffusers(pair, tensors), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("use", ["merge", "train further"])
@pytest.mark.parametrize(("naming", "more"), [("kohya", {"dora_wd": "True"}), ("generic", {}), ("diffusers", {})])
@pytest.mark.parametrize("name", KOHYA)
def test_a_file_in_any_naming_predicts_the_same_as_the_adapter(
    name: str, naming: FileNaming, more: Arguments, use: str, tmp_path: Path
) -> None:
    """DoRA has no other naming, and diffusers does not load it."""
    module: Any = import_module(BASES[name].module)
    pair, again = pair_of(name), pair_of(name)
    path, other = tmp_path / "ours.safetensors", tmp_path / "other.safetensors"
    _, expected = save_trained(module, path, {**BASES[name].everything, **more}, pair.seen, pair.predict)
    save_adapter_file(other, rename(read_adapter_file(path), pair.names, naming).file)
    is_merged = use == "merge"
    network, weights = module.create_network_from_weights(
        1.0, str(other), None, [], again.seen, for_inference=is_merged
    )
    if is_merged:
        network.merge_to([], again.seen, weights, torch.float32, "cpu")
    else:
        network.apply_to([], again.seen, False, True)
        network.load_weights(str(other))
        network.eval()
    torch.testing.assert_close(again.predict(), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("name", KOHYA)
def test_lycoris_finds_our_layers_by_class_name(name: str) -> None:
    lycoris, seen = pytest.importorskip("lycoris.kohya"), pair_of(name).seen
    preset = "full" if name == "anima" else "attn-mlp"
    network: Any = lycoris.create_network(1.0, 4, 2, None, [], seen, algo="lora", preset=preset)
    ours: Any = import_module(BASES[name].module).create_network(1.0, 4, 2, None, [], seen)
    assert set(ours.adapters) <= {module.lora_name for module in network.unet_loras}


@pytest.mark.parametrize(
    ("base", "names", "converter", "naming"),
    [
        ("flux", NAMES, "_convert_kohya_flux_lora_to_diffusers", "kohya"),
        ("lumina", LUMINA_NAMES, "_convert_non_diffusers_lumina2_lora_to_diffusers", "generic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_diffusers_converts_our_file_to_our_diffusers_names(
    base: str, names: BaseNames, converter: str, naming: FileNaming
) -> None:
    """Compare every module at full size, key by key and value by value. diffusers rejects Lumina's final layer."""
    import diffusers.loaders.lora_conversion_utils as utils

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    listing = BASES[base].listing
    assert listing is not None
    for key, shape in listing()["default"].items():
        if key.startswith("lora_unet") and (base == "flux" or "final_layer" not in key):
            tensors[key] = torch.full((), 2.0) if not shape else torch.randn(shape, generator=generator)
    file = parse_adapter(tensors, {}, "file")
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = getattr(utils, converter)
    theirs = convert(dict(adapter_tensors(rename(file, names, naming).file)))
    ours = adapter_tensors(rename(file, names, "diffusers").file)
    assert ours.keys() == {key for key in theirs if key.startswith("transformer.")}
    for path in {key.rpartition(".lora_")[0] for key in ours}:
        product = ours[f"{path}.lora_B.weight"][:64] @ ours[f"{path}.lora_A.weight"]
        their_product = theirs[f"{path}.lora_B.weight"][:64] @ theirs[f"{path}.lora_A.weight"]
        torch.testing.assert_close(product, their_product, **FLOAT32_DEEP)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_files_convert_as_in_diffusers(prefix: str) -> None:
    """Double blocks and outputs of single blocks are read; partial q, k, v layers of single blocks are rejected."""
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(3)
    sizes = {"qkv_lora1": (48, 16), "proj_lora1": (16, 16), "qkv_lora2": (48, 16), "proj_lora2": (16, 16)}
    layers = {f"double_blocks.{n}.processor.{name}": size for n in (0, 18) for name, size in sizes.items()}
    layers["single_blocks.37.processor.proj_lora"] = (16, 80)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs_) in layers.items():
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(4, inputs_, generator=generator)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(outputs, 4, generator=generator)
    file = add_model(parse_adapter(tensors, {}, "xlabs.safetensors"), [spec.names for spec in list_specs()])
    assert spec_for_file(file, "xlabs.safetensors").name == "flux"
    ours = rename(file, NAMES, "kohya").file.modules
    theirs = rename(parse_adapter(_convert_xlabs_flux_lora_to_diffusers(dict(tensors)), {}, ""), NAMES, "kohya")
    assert ours.keys() == theirs.file.modules.keys() and len(ours) == len(layers)
    for name, module in theirs.file.modules.items():
        assert torch.equal(ours[name].weight(), module.weight())
    more = {f"{prefix}single_blocks.0.processor.qkv_lora.{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
    file = add_model(parse_adapter({**tensors, **more}, {}, "xlabs.safetensors"), [NAMES])
    with pytest.raises(ValueError, match=r"no place for .*single_blocks\.0\.processor\.qkv_lora"):
        rename(file, NAMES, "kohya")


# Files with diffusers names train further and merge into base models like those with Kohya names.

Models = tuple[Any, Any]


@pytest.fixture
def models(tiny_sdxl_folder: Path) -> Models:
    arch = build(SdxlOptions(model=ModelOptions(pretrained_model_name_or_path=str(tiny_sdxl_folder))))
    return arch.view(arch.load.text_encoders(), arch.load.denoiser())


@pytest.fixture
def kohya_file(models: Models, tmp_path: Path) -> Path:
    """Write a LoRA of rank 4 and alpha 2 with random weights."""
    network = create_network(1.0, 4, 2.0, None, *models, conv_dim="4", conv_alpha="2")
    generator = torch.Generator().manual_seed(81)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(tmp_path / "kohya.safetensors"), None, {})
    return tmp_path / "kohya.safetensors"


def convert_to_diffusers_paths(file: Path, to: Path) -> Path:
    """Rewrite Kohya keys with the paths of diffusers' U-Net, as other trainers write SDXL files."""
    from library.architectures.sdxl.layers import NAMES

    aliases = {module.kohya: module.aliases[0] for module in NAMES.modules if module.kohya.startswith("lora_unet_")}
    tensors = {}
    for key, tensor in load_file(file).items():
        module, _, leaf = key.partition(".")
        tensors[f"{aliases.get(module, module)}.{leaf}"] = tensor
    save_file(tensors, to)
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_") for key in tensors)
    return to


@pytest.mark.parametrize("naming", ["diffusers", "generic", "diffusers paths"])
def test_foreign_files_load_into_a_network(models: Models, kohya_file: Path, tmp_path: Path, naming: Any) -> None:
    other = tmp_path / "other.safetensors"
    if naming == "diffusers paths":
        convert_to_diffusers_paths(kohya_file, other)
    else:
        convert(kohya_file, other, naming, drop_unsupported=False)
    assert not load_file(other).keys() & {k for k in load_file(kohya_file) if "unet" in k}
    network = create_network(1.0, 4, 2.0, None, *models, conv_dim="4", conv_alpha="2")
    network.load_weights(str(other))
    wanted = load_file(kohya_file)
    for name, adapter in network.adapters.items():
        strength = float(wanted[f"{name}.alpha"]) / 4
        up, down = (wanted[f"{name}.{leaf}.weight"].flatten(1) for leaf in ("lora_up", "lora_down"))
        change = strength * (up @ down)
        state = adapter.change.state_dict()
        scale = adapter.change.alpha_value / 4  # type: ignore[union-attr]
        actual = scale * (state["lora_up.weight"].flatten(1) @ state["lora_down.weight"].flatten(1))
        torch.testing.assert_close(actual, change, **EXACT)  # scales are powers of two


@pytest.mark.parametrize("naming", ["diffusers", "diffusers paths"])
def test_foreign_files_merge_into_the_base_model(
    models: Models, kohya_file: Path, tmp_path: Path, tiny_sdxl_folder: Path, naming: Any
) -> None:
    other = tmp_path / "other.safetensors"
    if naming == "diffusers paths":
        convert_to_diffusers_paths(kohya_file, other)
    else:
        convert(kohya_file, other, naming, drop_unsupported=False)
    text, unet = models
    start = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merged = []
    for file in (kohya_file, other):
        unet.load_state_dict(start)
        network, weights = create_network_from_weights(0.5, str(file), None, text, unet, for_inference=True)
        network.merge_to(text, unet, weights)
        merged.append({name: tensor.clone() for name, tensor in unet.state_dict().items()})
    assert any(not torch.equal(merged[0][name], start[name]) for name in start)
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in start)


def test_keys_without_a_layer_in_the_base_model_are_named(models: Models, kohya_file: Path, tmp_path: Path) -> None:
    tensors = load_file(convert_to_diffusers_paths(kohya_file, tmp_path / "other.safetensors"))
    for leaf in ("lora_down.weight", "lora_up.weight"):
        tensors[f"lora_unet_down_blocks_9_attentions_0_proj_in.{leaf}"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "odd.safetensors")
    network = create_network(1.0, 4, 2.0, None, *models)
    with pytest.raises(ValueError, match="has no place for lora_unet_down_blocks_9_attentions_0_proj_in"):
        network.load_weights(str(tmp_path / "odd.safetensors"))
