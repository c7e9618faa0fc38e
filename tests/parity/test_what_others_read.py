"""Files that diffusers and ComfyUI read: our claims about them, and our files in their loaders."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.flux.layers import CHROMA_NAMES
from library.architectures.sd.layers import view
from library.architectures.sd.layers import view as sd_view
from library.architectures.sdxl.layers import build_view
from library.architectures.specs import list_specs
from library.checkpoints.adapter_keys import AdapterKey, is_of_text_encoder
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.compatibility import Reading, readings
from library.checkpoints.saving import save_safetensors
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, sort_tensors
from networks.core.files.renaming import rename
from networks.core.network.network import AdapterNetwork
from networks.lora import create_network
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes
from tests.tiny.base import InDiffusers
from tests.tiny.bases import BASES
from tests.tiny.sdxl import UNET_LAYOUT
from tests.tolerances import FLOAT32_DEEP
from tools.convert_lora import convert

# Our claims about diffusers against its loader, with full-size transformer files, key by key.
# Each tensor is filled with a unique number to trace it through diffusers' renaming.

Shapes = dict[str, list[int]]
LOADED: Mapping[str, InDiffusers] = {n: base.in_diffusers for n, base in BASES.items() if base.in_diffusers is not None}


@cache
def weights_of(base: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every layer that diffusers can adapt, by model prefix and path."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = LOADED[base].models()
        for number, width in enumerate(LOADED[base].clip_widths):
            sizes = {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": 12 if width == 768 else 32,
            }
            clip = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_attention_heads=width // 64))
            models[clip_name(number)] = clip
    return {
        f"{part}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
        for part, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def used_by_diffusers(base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of a file that reach a layer of diffusers' models; none if it rejects the file."""
    import diffusers.loaders.lora_pipeline as loaders

    numbered = {key: n for n, key in enumerate(tensors, 1)}
    filled = {
        key: tensor if key.endswith(".alpha") else torch.full(tensor.shape, float(numbered[key]))
        for key, tensor in tensors.items()
    }
    try:
        converted = getattr(loaders, LOADED[base].mixin).lora_state_dict(filled)
    except (ValueError, KeyError):
        return set()
    if not all("lora" in key for key in converted):  # load_lora_weights rejects these
        return set()
    layers, used_keys = weights_of(base), set()
    for key, tensor in named_by_peft(base, converted).items():
        path, _, leaf = key.partition(".lora_")
        weight = layers.get(path)
        if weight is not None:
            axis = 1 if leaf == "A.weight" else 0
            assert tensor.shape[axis] == weight[axis], f"{key} does not fit"
            used_keys.add(int(tensor.flatten()[0]))
    used = {key for key, number in numbered.items() if number in used_keys}
    downs = {key: key.replace(".alpha", ".lora_down.weight") for key in tensors if key.endswith(".alpha")}
    return used | {alpha for alpha, down in downs.items() if down in used}


def named_by_peft(base: str, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict as diffusers passes it to PEFT, without the level text_model, which some classes lack."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    peft_state = {key: tensor for key, tensor in converted.items() if not key.startswith("text_encoder")}
    for part in map(clip_name, range(len(LOADED[base].clip_widths))):  # T5 is not adapted
        part_state = {key.removeprefix(f"{part}."): t for key, t in converted.items() if key.startswith(f"{part}.")}
        if part_state:
            part_state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part_state))
        peft_state |= {f"{part}.{key.removeprefix('text_model.')}": tensor for key, tensor in part_state.items()}
    return peft_state


def clip_name(number: int) -> str:
    return "text_encoder" if number == 0 else f"text_encoder_{number + 1}"


def of_rank_one(key: str, shape: list[int]) -> list[int]:
    """Return the shape of a factor reduced to rank 1, which suffices here."""
    if key.endswith(".lora_down.weight"):
        return [1, *shape[1:]]
    return [shape[0], 1, *shape[2:]] if key.endswith(".lora_up.weight") else shape


def file_of(base: str, variant: str, naming: FileNaming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of an adapter file whose alphas equal the ranks, so that values stay unchanged."""
    listing = listing_of(base)
    shapes: Shapes = listing["default"] if variant == "default" else listed_shapes(listing, variant)
    tensors = {key: torch.ones(()).expand(of_rank_one(key, shape)) for key, shape in shapes.items()}
    file = AdapterFile(
        "x", sort_tensors(tensors, {}, "").modules, {"ss_base_model_version": BASES[base].written[0]}, {}
    )
    return adapter_tensors(rename(file, BASES[base].spec.names, naming).file), dict(file.metadata)


def listing_of(base: str) -> Mapping[str, Any]:
    listing = BASES[base].listing
    assert listing is not None
    return listing()


CASES = [
    (base, variant, naming) for base, loaded in LOADED.items() for variant in loaded.variants for naming in NAMINGS
]


def claim_about(program: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Reading:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    (claim,) = (reading for reading in readings(list_specs(), shapes, metadata) if reading.program == program)
    return claim


@pytest.mark.parametrize(("base", "variant", "naming"), CASES)
def test_the_keys_we_claim_diffusers_uses_are_those_that_reach_a_layer(
    base: str, variant: str, naming: FileNaming
) -> None:
    tensors, metadata = file_of(base, variant, naming)
    claim = claim_about("diffusers", tensors, metadata)
    assert tensors.keys() - set(claim.unused) == used_by_diffusers(base, tensors)


@pytest.mark.parametrize("naming", NAMINGS)
def test_an_adapted_approximator_loads_under_diffusers_names(naming: FileNaming) -> None:
    shapes = {name: shape for name, shape in facts("chroma")["components"]["dit"].items() if name.endswith("weight")}
    tensors: dict[str, Tensor] = {"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.ones(())}
    for module in CHROMA_NAMES.modules:
        rows, columns = shapes.get(f"{module.generic.removeprefix('diffusion_model.')}.weight", (0, 0))
        if module.kohya.startswith(("lora_unet_distilled", "lora_unet_double")):
            tensors[f"{module.kohya}.lora_down.weight"] = torch.ones(()).expand(1, columns)
            tensors[f"{module.kohya}.lora_up.weight"] = torch.ones(()).expand(rows, 1)
    file = AdapterFile("x", sort_tensors(tensors, {}, "").modules, {}, {})
    tensors = adapter_tensors(rename(file, CHROMA_NAMES, naming).file)
    used = used_by_diffusers("chroma", tensors)
    assert tensors.keys() - set(claim_about("diffusers", tensors, {}).unused) == used
    assert any("distilled" in key for key in used) == (naming == "diffusers")


@pytest.mark.parametrize(
    ("left_out", "num_used"),
    [("final_layer", 356), ("layers_25_|final_layer", 344), ("layers_3_|final_layer", 0), ("mod|final_layer", 0)],
)
def test_diffusers_reads_only_complete_leading_blocks_of_generic_lumina_files(left_out: str, num_used: int) -> None:
    tensors, metadata = file_of("lumina", "network_train_unet_only", "generic")
    remaining = {key: tensor for key, tensor in tensors.items() if not re.search(left_out, key.replace(".", "_"))}
    assert len(remaining) < len(tensors)
    used = used_by_diffusers("lumina", remaining)
    assert len(used) == num_used
    assert remaining.keys() - set(claim_about("diffusers", remaining, metadata).unused) == used


# Our claims about ComfyUI against the names that its loader looked up for each checkpoint.

VARIANTS = {name: base.in_comfyui for name, base in BASES.items() if base.in_comfyui}


@cache
def names_found(base: str) -> list[frozenset[str]]:
    """Return the module names that ComfyUI looks up, for each layout of the checkpoint."""
    return [frozenset(names) for names in facts("comfyui_names")["names"][base]]


def used_by_comfyui(base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys that ComfyUI uses with every layout of the checkpoint."""
    modules = {key: adapter_key.module for key in tensors if (adapter_key := AdapterKey.parse(key)) is not None}
    return {key for key, module in modules.items() if all(module in names for names in names_found(base))}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("base", VARIANTS)
def test_the_keys_we_claim_comfyui_uses_are_those_it_looks_up(base: str, naming: FileNaming) -> None:
    tensors, metadata = file_of(base, VARIANTS[base], naming)
    denoiser = {key: tensor for key, tensor in tensors.items() if not is_of_text_encoder(key)}
    assert len(denoiser) > 200
    claim = claim_about("ComfyUI", denoiser, metadata)
    assert denoiser.keys() - set(claim.unused) == used_by_comfyui(base, denoiser)


@pytest.mark.parametrize(("stem", "is_used"), [("diffusion_model.", [False, True]), ("transformer.", [False, False])])
def test_a_fused_gate_is_looked_up_as_in_the_checkpoint(stem: str, is_used: list[bool]) -> None:
    module = f"{stem}transformer_blocks.0.img_mlp.gate_up"
    assert [module in names for names in names_found("qwen_image_21")] == is_used


# diffusers loads every key of our files, in Kohya and diffusers naming, and computes the same as the adapter.

MODULES = {"attention": {}, "attention and convolutions": {"conv_dim": "2", "conv_alpha": "1.5"}}


def load_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)


def install_random_network(pipeline: Any, seed: int, **args: str) -> AdapterNetwork:
    """Install a network of rank 3 and alpha 2 with random weights on the pipeline's models."""
    models = view([pipeline.text_encoder], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models, **args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.apply_to(*models)
    return network


@torch.no_grad()
def predict(pipeline: Any, seed: int) -> Tensor:
    """Return the outputs of the U-Net for random latents and of the text encoder for random tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    ids_BT = torch.randint(0, 90, (2, 77), generator=generator)
    text_BTC = pipeline.text_encoder(ids_BT).last_hidden_state
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample


def num_adapted(pipeline: Any) -> int:
    """Return the number of modules on which diffusers has installed a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = (pipeline.unet, pipeline.text_encoder)
    return sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())


MAGNITUDES = {"dora_wd": "True", "wd_on_output": "True", "conv_dim": "2"}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", MODULES)
def test_diffusers_predicts_the_same_with_our_file(
    tiny_sd_folder: Path, tmp_path: Path, naming: Any, kind: str
) -> None:
    seed = 7000 + 10 * list(MODULES).index(kind) + len(naming)
    pipeline = load_pipeline(tiny_sd_folder)
    alone = predict(pipeline, seed)
    network = install_random_network(pipeline, seed + 1, **MODULES[kind])
    ours = predict(pipeline, seed)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", naming, drop_unsupported=False)
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert num_adapted(pipeline) == len(network.adapters)
    torch.testing.assert_close(predict(pipeline, seed), ours, **FLOAT32_DEEP)


def test_output_magnitudes_load_as_pefts_dora_in_diffusers_and_convert_back(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(tiny_sd_folder)
    alone = predict(pipeline, 7061)
    network = install_random_network(pipeline, 7062, **MAGNITUDES)
    ours = predict(pipeline, 7061)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "diffusers", drop_unsupported=False)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "theirs.safetensors").items()}
    assert sum(key.endswith(".lora_magnitude_vector.weight") for key in shapes) == len(network.adapters)
    (reading_of_diffusers,) = (
        reading for reading in readings(list_specs(), shapes, {}) if reading.program == "diffusers"
    )
    assert reading_of_diffusers.amount == "all"
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert num_adapted(pipeline) == len(network.adapters)
    torch.testing.assert_close(predict(pipeline, 7061), ours, **FLOAT32_DEEP)
    convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "kohya", drop_unsupported=False)
    first, back = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "back.safetensors")
    for key in (key for key in first if key.endswith("dora_scale")):
        torch.testing.assert_close(back[key], first[key], rtol=0, atol=0)


UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
NORM = "lora_unet_conv_norm_out"
OWN = "unet.down_blocks.0.attentions.0.proj_in"
GENERIC = "diffusion_model.input_blocks.1.1.proj_in"
LORA = {f"{UNET}.lora_down.weight": torch.ones(2, 16, 1, 1), f"{UNET}.lora_up.weight": torch.ones(16, 2, 1, 1)}
LORA_AB = {f"{OWN}.lora_A.weight": torch.ones(2, 16, 1, 1), f"{OWN}.lora_B.weight": torch.ones(16, 2, 1, 1)}
ODD_FILES: dict[str, dict[str, Tensor]] = {
    "Tucker": {**LORA, f"{UNET}.lora_mid.weight": torch.ones(2, 2, 1, 1)},
    "norms": {**LORA, f"{NORM}.w_norm": torch.ones(16), f"{NORM}.b_norm": torch.ones(16)},
    "LoKr": {f"{UNET}.lokr_w1": torch.ones(4, 4), f"{UNET}.lokr_w2": torch.ones(4, 4), f"{UNET}.alpha": torch.ones(())},
    "alpha in its own naming": {**LORA_AB, f"{OWN}.alpha": torch.ones(())},
    "two namings": {**LORA, **{key.replace(OWN, GENERIC): tensor for key, tensor in LORA_AB.items()}},
    "DoRA": {**LORA, f"{UNET}.dora_scale": torch.ones(1, 16, 1, 1)},
    "DoRA by PEFT": {**LORA_AB, f"{OWN}.lora_magnitude_vector": torch.ones(1, 16, 1, 1)},
    "LoRA": LORA,
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_our_claims_about_diffusers_match_its_behaviour(tiny_sd_folder: Path, tmp_path: Path, what: str) -> None:
    tensors = ODD_FILES[what]
    save_safetensors(tmp_path / "odd.safetensors", tensors)
    shapes = {key: t.shape for key, t in tensors.items()}
    (claim,) = (reading for reading in readings(list_specs(), shapes, {}) if reading.program == "diffusers")
    pipeline = load_pipeline(tiny_sd_folder)
    try:
        pipeline.load_lora_weights(tmp_path, weight_name="odd.safetensors")
    except ValueError:
        assert claim.amount == "none"
    assert num_adapted(pipeline) == (0 if claim.amount == "none" else 1)
    assert claim.amount == {"LoRA": "all", "DoRA by PEFT": "all", "DoRA": "some"}.get(what, "none")


# diffusers loads every key of our SDXL and SD 2.x files and computes the same as the adapter.


def randomise(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def predict_sdxl(pipeline: Any) -> Tensor:
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(["a red cat", "dog"], do_classifier_free_guidance=False)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    sizes_B6 = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)
    added_conditions = {"text_embeds": pooled_BP, "time_ids": sizes_B6}
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTW, added_cond_kwargs=added_conditions).sample


@torch.no_grad()
def predict_sd2(pipeline: Any) -> Tensor:
    text_BTW, _ = pipeline.encode_prompt(["a red cat", "dog"], torch.device("cpu"), 1, False)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTW).sample


def num_adapted_xl(*parts: torch.nn.Module) -> int:
    """Return the number of modules on which diffusers has installed a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())


@pytest.mark.parametrize("kind", MODULES)
def test_diffusers_predicts_the_same_with_our_sdxl_file(tiny_sdxl_folder: Path, tmp_path: Path, kind: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    alone = predict_sdxl(pipeline)
    models = build_view(UNET_LAYOUT)([pipeline.text_encoder, pipeline.text_encoder_2], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models, **MODULES[kind])
    randomise(network, 71)
    network.apply_to(*models)
    ours = predict_sdxl(pipeline)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    torch.testing.assert_close(predict_sdxl(pipeline), alone, rtol=0, atol=0)
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert num_adapted_xl(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) == len(network.adapters)
    torch.testing.assert_close(predict_sdxl(pipeline), ours, **FLOAT32_DEEP)


def test_diffusers_predicts_the_same_with_our_sd2_file(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        tiny_sd2_folder, safety_checker=None, feature_extractor=None
    )
    alone = predict_sd2(pipeline)
    models = sd_view([pipeline.text_encoder], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models)
    randomise(network, 72)
    network.apply_to(*models)
    ours = predict_sd2(pipeline)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert num_adapted_xl(pipeline.unet, pipeline.text_encoder) == len(network.adapters)
    torch.testing.assert_close(predict_sd2(pipeline), ours, **FLOAT32_DEEP)
