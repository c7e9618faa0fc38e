"""Files of our network modules with Kohya names: in diffusers' models, merged, and in LyCORIS."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.flux.layers import NAMES
from library.architectures.lumina.layers import NAMES as LUMINA_NAMES
from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames, FileNaming
from library.commands.adapter_files import spec_for_file
from networks.core.files.adapter_file import adapter_tensors, parse_adapter, read_adapter_file, save_adapter_file
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.parity.test_conversions import predict_by_diffusers
from tests.tiny.base import Pair
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_DEEP

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
