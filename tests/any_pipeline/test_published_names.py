"""Adapter files of pipelines without a script, under the names of the model's publisher and back."""

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from library.architectures.any_pipeline.published_names import TABLES, names_of
from library.architectures.any_pipeline.targets import with_targets
from library.checkpoints.files import load_state_dict
from networks.core.targets.targets import adaptation_kind
from tests.any_pipeline.test_convention import attach_adapter, load_into, measured, predict
from tests.any_pipeline.test_training import SCRIPT, Train, arguments
from tests.tiny.pipelines import build_tiny_pipeline
from tests.tolerances import FLOAT32_SAME_MATH
from tools import convert_lora, draw, merge_lora

# The layers of the blocks of AIDC-AI/Ovis-Image (ovis_image/model/layers.py) and of Sana's checkpoints as
# diffusers' converter reads them: (blocks at full size, layers).
PUBLISHED = {
    "OvisImagePipeline": {
        "double_blocks": (6, [
            f"{stream}_{layer}" for stream in ("img", "txt")
            for layer in ("mod.lin", "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]),
        "single_blocks": (27, ["linear1", "linear2", "modulation.lin"]),
    },
    "SanaPipeline": {
        "blocks": (20, [
            "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj",
            "mlp.inverted_conv.conv", "mlp.depth_conv.conv", "mlp.point_conv.conv"]),
    },
}  # fmt: skip
MODELS = {"OvisImagePipeline": "OvisImageTransformer2DModel", "SanaPipeline": "SanaTransformer2DModel"}


def convert(source: Path, target: Path, to: str) -> None:
    assert convert_lora.main(["--model", str(source), "--save_to", str(target), "--to", to]) == 0


def change_of(state: dict[str, Tensor], path: str) -> Tensor:
    """Return what a file adds to the weight of a layer, as rows of outputs."""
    down, up = (state[f"{path}.lora_{letter}.weight"].double().flatten(1) for letter in "AB")
    return up @ down


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_table_has_every_layer_of_the_full_model_once_and_the_publishers_alone(name: str) -> None:
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, MODELS[name])()
    blocks = set(with_targets(model, "transformer").adapter_targets.denoiser.blocks)  # type: ignore[union-attr]
    paths = [
        f"transformer.{block}.{path}" for block, part in model.named_modules() if type(part).__name__ in blocks
        for path, layer in part.named_modules() if adaptation_kind(layer) is not None
    ]  # fmt: skip
    names = names_of(name, paths)
    assert names is not None and len(paths) > 100
    places = [part.kohya for path in paths for part in names.find_parts(path)] + [
        f"{module.kohya} {module.piece_of(path)}" for path in paths if (module := names.find(path)) is not None
    ]
    assert len(places) == len(set(places)) >= len(paths)
    used = {place.partition(" ")[0] for place in places}
    expected = {
        f"diffusion_model.{list_}.{number}.{layer}"
        for list_, (count, layers) in PUBLISHED[name].items() for number in range(count) for layer in layers
    }  # fmt: skip
    assert {module.generic for module in names.modules if module.kohya in used} == expected


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_file_in_the_publishers_names_has_the_same_changes_and_loads_when_it_is_renamed_back(
    name: str, tmp_path: Path
) -> None:
    _, convention, maps = measured(name)
    pipe, files = build_tiny_pipeline(name), [tmp_path / f"{word}.safetensors" for word in ("own", "theirs", "back")]
    own, theirs, back = files
    network: Any = attach_adapter(pipe.transformer, "transformer")
    metadata = {"ss_base_model_version": "any_pipeline", "modelspec.architecture": f"{name}/lora"}
    network.save_weights(str(own), None, metadata)
    trained = predict(pipe, "transformer", maps.kwargs)
    convert(own, theirs, "generic")
    convert(theirs, back, "diffusers")
    state, published = load_state_dict(own), load_state_dict(theirs)
    stems = "|".join(PUBLISHED[name])
    assert all(re.match(rf"diffusion_model\.({stems})\.\d+\.[\w.]+\.lora_[AB]\.weight$", key) for key in published)
    for (their_list, own_list), layers in TABLES[name].items():
        for path, parts in layers.items():
            if "conv_depth" in parts:  # adapters target such convolutions with conv_dim alone
                continue
            if "net.0." in parts:  # one layer of diffusers is two: up, then gate
                joined = change_of(state, f"transformer.{own_list}.0.{re.sub('(up|gate)$', 'proj', parts)}")
                expected = joined.chunk(2)[parts.endswith("gate")]
            else:
                expected = torch.cat(
                    [change_of(state, f"transformer.{own_list}.0.{part.split(':')[0]}") for part in parts.split()]
                )
            actual = change_of(published, f"diffusion_model.{their_list}.0.{path}")
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    fresh = build_tiny_pipeline(name)
    load_into(fresh, convention.denoiser, back)
    torch.testing.assert_close(predict(fresh, "transformer", maps.kwargs), trained, **FLOAT32_SAME_MATH)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_file_in_the_publishers_names_is_read_directly(name: str, tmp_path: Path, train: Train) -> None:
    """Its metadata is removed, as in a file of another program."""
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    train(arguments(tmp_path / "model", tmp_path, "--learning_rate", "1"), script=SCRIPT).ok()
    own, theirs = tmp_path / "out" / "mine.safetensors", tmp_path / "theirs.safetensors"
    convert(own, theirs, "generic")
    save_file(load_state_dict(theirs), theirs)
    said = f"{theirs}: converted from the names of the model's publisher to those of diffusers"

    frozen = ["--learning_rate", "1e-12", "--dim_from_weights", "--max_train_steps", "1"]
    for file, word in ((own, "a"), (theirs, "b")):
        words = [*frozen, "--output_name", word, "--network_weights", str(file)]
        done = train(arguments(tmp_path / "model", tmp_path, *words), script=SCRIPT).ok()
        assert (said in done.stderr) == (file == theirs)
    states = [load_state_dict(tmp_path / "out" / f"{word}.safetensors") for word in "ab"]
    stems = {key.partition(".lora_")[0] for key in states[0]}
    assert stems == {key.partition(".lora_")[0] for key in states[1]} and len(stems) > 10
    for stem in stems:
        torch.testing.assert_close(change_of(states[1], stem), change_of(states[0], stem), rtol=1e-4, atol=1e-5)

    images, merged = [], []
    for file, word in ((own, "c"), (theirs, "d")):
        drawing = [str(tmp_path / "model"), "--prompt", "a red bird --w 64 --h 64 --s 2 --l 1 --d 11", "--no_half_vae"]
        assert draw.main([*drawing, "--adapter", str(file), "--output", str(tmp_path / word)]) == 0
        images += [np.asarray(Image.open(next((tmp_path / word).glob("*.png"))), dtype=float)]
        target = tmp_path / f"merged {word}"
        words = ["--sd_model", str(tmp_path / "model"), "--models", str(file), "--save_to", str(target)]
        assert merge_lora.main(words) == 0
        merged.append(load_state_dict(next((target / "transformer").glob("*.safetensors"))))
        joined = ["--models", str(file), str(file), "--concat", "--save_to", str(tmp_path / f"{word}.safetensors")]
        assert merge_lora.main(joined) == 0
    assert np.abs(images[0] - images[1]).max() <= 1.0
    base = load_state_dict(next((tmp_path / "model" / "transformer").glob("*.safetensors")))
    changed = {key for key in base if not torch.equal(base[key], merged[0][key])}
    assert len(changed) == len(stems)
    for key in base:
        torch.testing.assert_close(merged[1][key], merged[0][key], rtol=1e-4, atol=1e-5)
    twice = load_state_dict(tmp_path / "d.safetensors")
    for stem in stems:
        torch.testing.assert_close(change_of(twice, stem), 2 * change_of(states[0], stem), rtol=1e-4, atol=1e-4)


def test_a_pipeline_without_a_table_keeps_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, path = build_tiny_pipeline("AuraFlowPipeline"), tmp_path / "own.safetensors"
    network: Any = attach_adapter(pipe.transformer, "transformer")
    metadata = {"ss_base_model_version": "any_pipeline", "modelspec.architecture": "AuraFlowPipeline/lora"}
    network.save_weights(str(path), None, metadata)
    words = ["--model", str(path), "--save_to", str(tmp_path / "b.safetensors"), "--to", "generic"]
    assert convert_lora.main(words) == 1
    assert "no program reads adapters of any pipeline of diffusers in that naming" in capsys.readouterr().err
