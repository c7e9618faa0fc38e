"""Recognition of a checkpoint's base model, and loading weights into modules."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.architectures.sdxl.load import CLIP_G_PREFIX, single_file_parts
from library.architectures.specs import list_specs
from library.base.errors import NotThere, UserError
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.base_model_spec import BaseModelSpec, Shapes, Sign
from library.checkpoints.recognition import recognise_adapter
from library.checkpoints.weights import Place, Weights, open_weights, select_weights
from library.commands.base_models import open_base_model
from library.memory.devices import move_to_device
from library.models import loading
from library.models.identify import (
    base_of_file,
    base_of_folder,
    find_spec,
    refuse_other_file,
    refuse_other_folder,
    refuse_other_model,
    suggest_fix,
)
from library.models.loading import Absent, cast, materialise
from library.models.unet.checkpoint_keys import UNET_PREFIX
from tests.contracts.full_size import checkpoint, facts
from tests.parity.test_what_others_read import file_of
from tests.running import SCRIPTS, Finished, make_images
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


# Diffusers folders of a pipeline that no script trains are refused with the name of that pipeline.

UNKNOWN = ("SanaPipeline", "QwenImagePipeline", "PixArtSigmaPipeline")


def write_folder(path: Path, class_name: str | None) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({} if class_name is None else {"_class_name": class_name}))
    return path


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {"diffusers_train_network"}))
@pytest.mark.parametrize("class_name", UNKNOWN[:2])
def test_no_script_accepts_the_folder_of_an_unknown_pipeline(
    train, tmp_path: Path, script: str, class_name: str
) -> None:
    folder = write_folder(tmp_path / "model", class_name)
    make_images(tmp_path / "data" / "1_a", 1)
    done: Finished = train(
        ["--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(tmp_path / "data"), "--resolution",
         "64", "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora"], script=script,
    )  # fmt: skip
    assert done.status == 1 and "Traceback" not in done.stderr
    assert f"{folder}: its model_index.json names {class_name}, which has no script of its own" in done.stderr
    assert "try diffusers_train_network.py" in done.stderr


def test_the_error_for_a_known_pipeline_names_its_script_and_unnamed_folders_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this is an SDXL model; use sdxl_train_network\.py"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "a", "StableDiffusionXLPipeline"), "flux")
    with pytest.raises(UserError, match=r"this is an SD 1\.x model; use train_network\.py"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "b", "StableDiffusionPipeline"), "flux")
    refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "c", "FluxPipeline"), "flux")
    refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "d", None), "flux")
    with pytest.raises(UserError, match=r"this is a Chroma model; add --model_type chroma"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "f", "ChromaPipeline"), "flux")
    custom = write_folder(tmp_path / "e", "SomebodysOwnPipeline")
    (custom / "unet").mkdir()
    refuse_other_folder(list_specs(), "--x", custom, "sd1")  # its U-Net takes precedence over its name


@pytest.mark.parametrize("class_name", UNKNOWN)
def test_the_folder_of_a_pipeline_without_its_denoiser_is_refused(tmp_path: Path, class_name: str) -> None:
    with pytest.raises(UserError, match=rf"--sd_model .* names no model of {class_name} that draws"):
        open_base_model("--sd_model", write_folder(tmp_path / "model", class_name))


# Loading weights into modules.


def random_weights(dtype: torch.dtype) -> Weights:
    tensors = {"weight": torch.arange(6).reshape(2, 3).to(dtype), "bias": torch.arange(2).float()}
    return Weights("model.safetensors", {key: tuple(t.shape) for key, t in tensors.items()}, tensors.__getitem__)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_a_quantised_checkpoint_is_refused_by_name(dtype: torch.dtype) -> None:
    """Integer weights are meaningless without their scales."""
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"model.safetensors: weight holds integers \(.*\).*quantised checkpoint"):
        materialise(layer, random_weights(dtype), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_floats_of_every_width_are_loaded(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    loaded = materialise(layer, random_weights(dtype), torch.float32)
    assert torch.equal(loaded.get_parameter("weight"), torch.arange(6).reshape(2, 3).float())


@pytest.mark.parametrize("has_frames", [False, True], ids=["pictures", "frames"])
def test_convolution_weights_are_loaded_in_their_final_memory_format(has_frames: bool) -> None:
    """Moving the model then copies nothing; a model with 3-D convolutions stays contiguous."""
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Conv2d(3, 5, 2), *([nn.Conv3d(2, 2, 2)] if has_frames else [])]
        model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(4120)
    tensors = {
        name: torch.randn(weight.shape, generator=generator).half() for name, weight in model.state_dict().items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    loaded = materialise(model, Weights("model.safetensors", shapes, tensors.__getitem__), torch.float32)
    weight = loaded.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is not has_frames
    assert torch.equal(weight, tensors["0.weight"].float())
    assert move_to_device(loaded, torch.device("cpu")).get_parameter("0.weight").data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("layout", [torch.preserve_format, torch.channels_last], ids=["as it is", "channels last"])
@pytest.mark.parametrize("bytes_at_once", [100, 1 << 19], ids=["in parts", "whole"])
def test_every_float16_is_rounded_to_the_nearest_bfloat16(
    layout: torch.memory_format, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "BYTES_IN_CACHE", bytes_at_once)
    bits = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(83)).to(torch.int32)
    value = bits.to(torch.int16).view(torch.float16).reshape(64, 32, 8, 4)
    actual = cast(value, torch.bfloat16, layout)
    assert actual.is_contiguous(memory_format=torch.channels_last) == (layout is torch.channels_last)
    # Round to nearest, ties to even: bfloat16 is the upper half of float32, which represents every float16.
    upper = value.float().numpy().view(np.uint32).astype(np.uint64)
    nearest = (upper + 0x7FFF + ((upper >> 16) & 1)) >> 16
    is_number = ~value.isnan().numpy()
    assert np.array_equal(actual.contiguous().view(torch.uint16).numpy()[is_number], nearest[is_number])
    assert np.array_equal(actual.isnan().numpy(), ~is_number)


def test_scalar_and_empty_float16_tensors_are_cast() -> None:
    for value in (torch.tensor(0.1, dtype=torch.float16), torch.empty(0, 3, dtype=torch.float16)):
        actual = cast(value, torch.bfloat16, torch.preserve_format)
        assert actual.shape == value.shape
        assert torch.equal(actual, value.to(torch.bfloat16))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bytes_at_once", [64, 1 << 19], ids=["in parts", "whole"])
def test_weights_converted_while_loading_match_a_cast_by_torch(
    stored: torch.dtype, bytes_at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are converted through a reused buffer; some files store 1x1 kernels as matrices."""
    monkeypatch.setattr(loading, "BYTES_IN_CACHE", bytes_at_once)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(9, 4), nn.Conv2d(6, 8, 1, bias=False), nn.Embedding(0, 3))
    generator = torch.Generator().manual_seed(5107)
    tensors = {
        name: torch.randn(weight.shape, generator=generator).to(stored) for name, weight in model.state_dict().items()
    }
    tensors["2.weight"] = tensors["2.weight"].flatten(1)
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = materialise(model, open_weights(tmp_path / "a.safetensors"), torch.bfloat16).state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, tensors[name].to(torch.bfloat16).reshape(value.shape)), name
    assert loaded["0.weight"].is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_that_only_changes_its_layout_is_never_in_memory_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = nn.Conv2d(5, 7, 3, bias=False)
    kernel = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(5108))
    save_file({"weight": kernel}, tmp_path / "a.safetensors")
    monkeypatch.setattr(Place, "read", lambda place: pytest.fail("read as a whole, besides its copy"))
    loaded = materialise(model, open_weights(tmp_path / "a.safetensors"), torch.float32).state_dict()["weight"]
    assert torch.equal(loaded, kernel) and loaded.is_contiguous(memory_format=torch.channels_last)
