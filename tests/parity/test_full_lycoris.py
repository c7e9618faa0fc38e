"""Full weight differences in LyCORIS's `full` format merge as in LyCORIS, with tools and --base_weights."""

import pytest
import torch
from torch import Tensor, nn

from networks import lora, oft
from networks.core.files.adapter_file import COMPUTED, parse_adapter, require_layouts
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import toy_models

full = pytest.importorskip("lycoris.modules.full")

PATHS = {
    "lora_unet_mid_attention_to_q": "mid.attention.to_q",
    "lora_unet_mid_attention_proj_in": "mid.attention.proj_in",
    "lora_unet_mid_resnet_conv1": "mid.resnet.conv1",
    "lora_unet_mid_attention_norm": "mid.attention.norm",  # written by extractions, but not by LyCORIS
}


def file_by_lycoris(unet: nn.Module, strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (a file by LyCORIS, the merged parameters by name)."""
    generator = torch.Generator().manual_seed(611)
    tensors, after = {}, {}
    for name, path in PATHS.items():
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
    tensors, after = file_by_lycoris(unet, strength)
    file = parse_adapter(tensors, {}, "a.safetensors")
    require_layouts(file, COMPUTED, "merged")
    for name, path in PATHS.items():
        for parameter in ("weight", "bias"):
            if (wanted := after.get(f"{path}.{parameter}")) is None:
                assert not file.modules[name].changes(parameter)
                continue
            base = unet.get_parameter(f"{path}.{parameter}")
            actual = file.modules[name].merged(base, strength, parameter=parameter)
            assert (actual - base).norm() > 0.1
            torch.testing.assert_close(actual, wanted, **FLOAT32_SAME_MATH)
    network, weights = lora.create_network_from_weights(strength, "a", None, text, unet, tensors, for_inference=True)
    assert network.adapters.keys() == PATHS.keys()
    network.merge_to(text, unet, weights, torch.float32, "cpu")
    for name, wanted in after.items():
        torch.testing.assert_close(unet.get_parameter(name).data, wanted, **FLOAT32_SAME_MATH)


def test_continued_training_is_rejected() -> None:
    text, unet = toy_models(613)
    tensors, _ = file_by_lycoris(unet, 1.0)
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
