"""(IA)^3 and GLoRA files merge as in LyCORIS, with tools and --base_weights."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import lora
from networks.core.files.adapter_file import AdapterFile, parse_adapter, read_adapter_file
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import toy_models
from tools import check_lora_weights, merge_lora, resize_lora

ia3 = pytest.importorskip("lycoris.modules.ia3")
glora = pytest.importorskip("lycoris.modules.glora")

PATHS = ("mid.attention.to_q", "mid.attention.proj_in", "mid.resnet.conv1", "up.0.resnet.time_emb_proj")
KINDS = {
    "ia3": (ia3.IA3Module, {}),
    "ia3 on inputs": (ia3.IA3Module, {"train_on_input": True}),
    "glora": (glora.GLoRAModule, {"lora_dim": 3, "alpha": 1.5}),
}


def name_of(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def file_by_lycoris(unet: nn.Module, kind: str, strength: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (a file by LyCORIS, the merged weights by path)."""
    generator, (make, settings) = torch.Generator().manual_seed(621), KINDS[kind]
    tensors, after = {}, {}
    for path in PATHS:
        theirs = make(name_of(path), unet.get_submodule(path), 1.0, **settings)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        tensors |= {f"{name_of(path)}.{leaf}": tensor.detach().clone() for leaf, tensor in theirs.state_dict().items()}
        after[path] = theirs.get_merged_weight(multiplier=strength)[0].detach()
    return tensors, after


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_match_lycoris(kind: str, strength: float) -> None:
    text, unet = toy_models(622)
    tensors, after = file_by_lycoris(unet, kind, strength)
    file = parse_adapter(tensors, {}, "a.safetensors")
    for path, wanted in after.items():
        base = unet.get_submodule(path).weight
        assert isinstance(base, Tensor)
        module = file.modules[name_of(path)]
        actual = module.merged(base, strength)
        assert (actual - base).norm() > 0.1 and not module.changes("bias")
        torch.testing.assert_close(actual, wanted, **FLOAT32_SAME_MATH)
        twice = module.change(torch.float64)  # a copy; the file is unchanged
        twice.scale_(torch.tensor(2.0))  # scaling, as used to limit norms, doubles the change
        expected = base + 2 * (actual - base)
        torch.testing.assert_close(twice.merged(base.double(), strength).float(), expected, rtol=1e-4, atol=1e-5)
    network, weights = lora.create_network_from_weights(strength, "a", None, text, unet, tensors, for_inference=True)
    assert network.adapters.keys() == {name_of(path) for path in PATHS}
    network.merge_to(text, unet, weights, torch.float32, "cpu")
    for path, wanted in after.items():
        torch.testing.assert_close(unet.get_submodule(path).weight.data, wanted, **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("kind", KINDS)
def test_they_merge_into_checkpoints_and_convert_to_a_full_rank_lora(
    kind: str, tmp_path: Path, tiny_sd_file: Path
) -> None:
    """Run the commands: merge into a checkpoint, and convert to an equivalent LoRA of full rank."""
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    before = load_state_dict(tiny_sd_file)
    layer = nn.Linear(*reversed(before[key].shape), bias=False)
    layer.weight.data = before[key].clone()
    make, settings = KINDS[kind]
    theirs, generator = make(name_of(path), layer, 1.0, **settings), torch.Generator().manual_seed(628)
    for parameter in theirs.parameters():
        parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    file, out = str(tmp_path / "a.safetensors"), str(tmp_path / "out.safetensors")
    save_safetensors(file, {f"{name_of(path)}.{leaf}": t.detach() for leaf, t in theirs.state_dict().items()})
    words = ["--models", file, "--ratios", "0.7", "--save_to", out]
    assert merge_lora.main([*words, "--sd_model", str(tiny_sd_file)]) == 0
    after = load_state_dict(out)
    wanted = theirs.get_merged_weight(multiplier=0.7)[0].detach()
    torch.testing.assert_close(after[key], wanted, **FLOAT32_SAME_MATH)
    assert all(torch.equal(after[other], tensor) for other, tensor in before.items() if other != key)
    rank = str(min(wanted.shape))
    assert merge_lora.main([*words, "--base_model", str(tiny_sd_file), "--new_rank", rank]) == 0
    actual = read_adapter_file(out).modules[name_of(path)].merged(before[key], 1.0)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)  # obtained by a decomposition


@pytest.mark.parametrize("kind", KINDS)
def test_continued_training_is_rejected(kind: str) -> None:
    text, unet = toy_models(623)
    tensors, _ = file_by_lycoris(unet, kind, 1.0)
    with pytest.raises(ValueError, match="that this network module cannot use"):
        lora.create_network_from_weights(1.0, "a.safetensors", None, text, unet, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_tools_name_the_kind_and_its_limitations(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, unet = toy_models(624)
    file = tmp_path / "a.safetensors"
    save_safetensors(file, file_by_lycoris(unet, kind, 1.0)[0])
    assert check_lora_weights.main([str(file), "--json"]) == 0
    assert kind.split()[0] in capsys.readouterr().out
    words = [str(file), "--save_to", str(tmp_path / "b.safetensors"), "--new_rank", "2"]
    assert resize_lora.main(["--model", *words]) == 1
    assert f"is {'GLoRA' if kind == 'glora' else '(IA)^3'}, which has no rank to reduce" in capsys.readouterr().err
    assert merge_lora.main(["--models", *words]) == 1
    assert "whose change depends on the base weight; set --base_model to the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on_input": None}, "without its on_input"),
        ({"on_input": torch.tensor([0, 1])}, "it needs one number"),
        ({"weight": None}, "without its weight"),
    ],
)
def test_incomplete_modules_of_ia3_are_named(change: dict[str, Tensor | None], message: str) -> None:
    tensors, _ = file_by_lycoris(toy_models(625)[1], "ia3", 1.0)
    name = name_of(PATHS[0])
    changed = {**tensors, **{f"{name}.{leaf}": tensor for leaf, tensor in change.items()}}
    with pytest.raises(ValueError, match=message):
        parse_adapter({key: tensor for key, tensor in changed.items() if tensor is not None}, {}, "a")


def test_mismatched_factors_and_layers_are_named() -> None:
    _, unet = toy_models(626)
    for kind in KINDS:
        file: AdapterFile = parse_adapter(file_by_lycoris(unet, kind, 1.0)[0], {}, "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors: .* changes a weight of the shape"):
            file.modules[name_of(PATHS[0])].merged(torch.ones(9, 11), 1.0)
    tensors, _ = file_by_lycoris(unet, "glora", 1.0)
    key = f"{name_of(PATHS[0])}.b2.weight"
    with pytest.raises(ValueError, match=r"a1, a2, b1 and b2 are .*; LyCORIS before 2\.0 has others"):
        parse_adapter({**tensors, key: tensors[key][:2]}, {}, "a")
    del tensors[key]
    with pytest.raises(ValueError, match=r"without its b2\.weight"):
        parse_adapter(tensors, {}, "a")


def test_ia3_values_are_read_in_half_precision_and_flags_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    _, unet = toy_models(627)
    tensors, after = file_by_lycoris(unet, "ia3 on inputs", 1.0)
    halves = {k: tensor.half() if tensor.is_floating_point() else tensor for k, tensor in tensors.items()}
    module = parse_adapter(halves, {}, "a").modules[name_of(PATHS[0])]
    base = unet.get_submodule(PATHS[0]).weight
    assert isinstance(base, Tensor)
    torch.testing.assert_close(module.merged(base, 1.0), after[PATHS[0]], rtol=2**-10, atol=2**-10)
    assert not caplog.records
