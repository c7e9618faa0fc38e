"""Recognition of a checkpoint's base model."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.architectures.sdxl.load import CLIP_G_PREFIX, single_file_parts
from library.architectures.specs import list_specs
from library.base.errors import NotThere
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.base_model_spec import BaseModelSpec, Shapes, Sign
from library.checkpoints.recognition import recognise_adapter
from library.checkpoints.weights import Weights, select_weights
from library.models.identify import (
    base_of_file,
    base_of_folder,
    find_spec,
    refuse_other_file,
    refuse_other_folder,
    refuse_other_model,
    suggest_fix,
)
from library.models.loading import Absent
from library.models.unet.checkpoint_keys import UNET_PREFIX
from tests.contracts.full_size import checkpoint, facts
from tests.parity.test_what_diffusers_reads import file_of
from tests.tiny.bases import BASES

ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PROJECTION = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


SPECS = list_specs()


def name_of(spec: BaseModelSpec | None) -> str | None:
    return spec.name if spec else None


def weights(*names: str) -> Weights:
    return Weights("a.safetensors", dict.fromkeys(names, (2, 2)), lambda name: torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({ATTENTION: (320, 768)}, "sd1"),
        ({ATTENTION: (320, 1024)}, "sd2"),
        ({ATTENTION: (16, 32), PROJECTION: (16, 16, 1, 1)}, "sd1"),
        ({ATTENTION: (16, 32), PROJECTION: (16, 16)}, "sd2"),
    ],
)
def test_sd1_and_sd2_are_distinguished_by_text_width_and_projections(shapes, expected):
    assert name_of(base_of_file(SPECS, shapes)) == expected


def test_a_file_without_a_unet_has_no_base_model():
    assert base_of_file(SPECS, {"encoder.conv_in.weight": (1,)}) is None


def test_a_size_embedding_or_an_sdxl_pipeline_identifies_sdxl():
    assert name_of(base_of_folder(SPECS, "", {"add_embedding.linear_1.weight": (4, 4)})) == "sdxl"
    assert name_of(base_of_folder(SPECS, "StableDiffusionXLImg2ImgPipeline", {})) == "sdxl"


def test_the_suggested_fix_is_a_flag_or_another_script():
    sd1, sd2, sdxl, flux = (find_spec(SPECS, name) for name in ("sd1", "sd2", "sdxl", "flux"))
    assert suggest_fix(sd2, sd1) == "add --v2"
    assert suggest_fix(sd1, sd2) == "remove --v2"
    prompts = "or train_leco.py to train from prompts alone"
    assert suggest_fix(sd2, sdxl) == f"use train_network.py with --v2, {prompts}"
    assert suggest_fix(flux, sdxl) == f"use flux_train_network.py, {prompts}"


def test_the_error_for_the_sdxl_refiner_names_it():
    refiner = weights("conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight")
    with pytest.raises(ValueError, match=r"--flag a\.safetensors: this is the SDXL refiner; only the base model can"):
        refuse_other_file(SPECS, "--flag", refiner, "sdxl")


def test_the_error_for_an_sdxl_file_without_its_second_text_encoder_names_it():
    weights_of_file = checkpoint("sdxl")
    weights_of_file = select_weights(
        weights_of_file, {name: name for name in weights_of_file.shapes if not name.startswith(CLIP_G_PREFIX)}
    )
    with pytest.raises(ValueError, match=r"has a U-Net but no text encoder .*conditioner.embedders.1.model"):
        single_file_parts("--flag", weights_of_file)


@pytest.mark.parametrize("expected", ["sd1", "sdxl"])
def test_a_file_of_an_unknown_transformer_is_not_recognised_as_a_unet(expected: str) -> None:
    """Combined files give the denoiser the same prefix for every model."""
    file_weights = weights("model.diffusion_model.blocks.0.attn.qkv.weight", "vae.encoder.conv_in.weight")
    assert base_of_file(SPECS, file_weights.shapes) is None
    with pytest.raises(ValueError, match=r"its denoiser belongs to no supported model .*blocks\.0\.attn\.qkv"):
        refuse_other_file(SPECS, "--flag", file_weights, expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_errors_for_chroma_and_flux_suggest_model_type(prefix: str) -> None:
    blocks = f"{prefix}double_blocks.0.img_attn.qkv.weight"
    chroma, flux = weights(blocks, f"{prefix}distilled_guidance_layer.in_proj.weight"), weights(blocks)
    for expected, actual, message in (
        ("lumina", chroma, r"Chroma model; use flux_train_network\.py with --model_type chroma"),
        ("flux", chroma, "Chroma model; add --model_type chroma"),
        ("chroma", flux, "FLUX model; remove --model_type chroma"),
    ):
        with pytest.raises(ValueError, match=f"this is a {message}"):
            refuse_other_model(SPECS, "--flag", "a.safetensors", actual.shapes, expected)
    refuse_other_model(SPECS, "--flag", "a.safetensors", chroma.shapes, "chroma")
    with pytest.raises(ValueError, match="this is a Chroma Radiance model, which has no latents"):
        refuse_other_model(SPECS, "--flag", "a", weights(*chroma.shapes, f"{prefix}nerf_image_embedder.x").shapes, "x")


def test_an_unnamed_folder_with_two_text_encoders_is_recognised_as_sdxl(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=r"this is an SDXL model; use sdxl_train_network\.py"):
        refuse_other_folder(SPECS, "--flag", tmp_path, "sd1")
    refuse_other_folder(SPECS, "--flag", tmp_path, "sdxl")


ONE_FILE = {title: name for name, base in BASES.items() for title in base.full_size}
OTHER_SIZES = [  # (file of names, path to them in it, base model)
    ("sd21", ("checkpoint",), "sd2"),
    ("sd3", ("mmdit", "sd3.5-medium"), "sd3"),
    ("sd3", ("mmdit", "sd3.5-large"), "sd3"),
]


def strongest(shapes: Shapes, signs_of: Callable[[BaseModelSpec], Sequence[Sign]]) -> list[str]:
    """Return the base models with the strongest sign in a file."""
    found = {spec.name: max((s.certainty for s in signs_of(spec) if s.is_in(shapes)), default=0) for spec in SPECS}
    return [name for name, certainty in found.items() if certainty == max(found.values()) > 0]


def denoiser_header(arguments: list[str]) -> Shapes:
    """Return the shapes in the base model's file, of which no weights are read."""
    with Path(arguments[arguments.index("--pretrained_model_name_or_path") + 1]).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("title", ONE_FILE)
def test_one_base_model_claims_a_full_size_checkpoint(title: str, tmp_path: Path) -> None:
    base = BASES[ONE_FILE[title]]
    shapes = denoiser_header(base.full_size[title][1](tmp_path))
    assert strongest(shapes, lambda spec: spec.checkpoint) == [base.spec.name]
    stripped = {name.removeprefix(UNET_PREFIX): shape for name, shape in shapes.items()}
    if base.is_flow:  # the denoiser alone, under its own names
        assert strongest(stripped, lambda spec: spec.checkpoint) == [base.spec.name]


@pytest.mark.parametrize(("file", "path", "base"), OTHER_SIZES)
def test_one_base_model_claims_other_sizes(file: str, path: tuple[str, ...], base: str) -> None:
    content = facts(file)
    for step in path:
        content = content[step]
    shapes = {name: tuple(shape) for name, shape in content.items()}
    assert strongest(shapes, lambda spec: spec.checkpoint) == [base]


@pytest.mark.parametrize("name", BASES)
def test_one_base_model_claims_a_tiny_checkpoint(name: str, tmp_path: Path) -> None:
    base, arguments = BASES[name], BASES[name].build(tmp_path)
    path = Path(arguments[arguments.index("--pretrained_model_name_or_path") + 1])
    if path.is_dir():
        shapes = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
        named = {f"unet.{key}": tuple(tensor.shape) for key, tensor in shapes.items()}
        assert strongest(named, lambda spec: spec.checkpoint) in ([base.spec.name], ["sd1", base.spec.name])
    else:
        assert strongest(denoiser_header(arguments), lambda spec: spec.checkpoint) == [base.spec.name]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base.listing])
def test_a_full_size_adapter_is_recognised_without_metadata(name: str, naming: FileNaming) -> None:
    """Chroma's default layers are a part of FLUX.1's, so its metadata decides."""
    tensors, _ = file_of(name, "default", naming)
    spec = recognise_adapter(SPECS, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
    assert name_of(spec) == ("flux" if name == "chroma" else BASES[name].spec.name)


def test_a_unet_alone_loads_where_the_text_encoders_are_optional() -> None:
    """The file alone does not determine the size embedding, so the width of bigG in every SDXL model is assumed."""
    full_file = checkpoint("sdxl")
    unet_file = select_weights(full_file, {name: name for name in full_file.shapes if name.startswith(UNET_PREFIX)})
    full, unet_only = single_file_parts("--flag", full_file), single_file_parts("--flag", unet_file, may_lack_text=True)
    assert unet_only.unet.config == full.unet.config
    assert all(isinstance(clip, Absent) for clip in unet_only.clips)
    with pytest.raises(NotThere, match=r"--flag sdxl has a U-Net but no text encoder.*use a full checkpoint"):
        unet_only.clips[1].config  # noqa: B018
