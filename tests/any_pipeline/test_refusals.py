"""Pipelines that cannot be trained are refused with a sentence, before weights are read where their class shows it."""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.utils import DummyObject

from library.architectures.any_pipeline.convention import Target
from library.architectures.any_pipeline.folder import list_arguments
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.refusals import find_cause
from library.architectures.any_pipeline.training import PipelinePredict, build_objective
from library.architectures.any_pipeline.watch import Refused
from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import bases_of_pipeline
from library.environment import packages
from tests.any_pipeline.test_convention import measured
from tests.any_pipeline.test_training import SCRIPT, arguments
from tests.hiding import hide
from tests.running import Finished
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

Train = Callable[..., Finished]


def write_index(folder: Path, class_name: object, scheduler: str = "DDIMScheduler", **config: object) -> Path:
    """Write the JSON files of a pipeline without any weights."""
    (folder / "scheduler").mkdir(parents=True)
    index = {"_class_name": class_name, "scheduler": ["diffusers", scheduler]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("class_name", "scheduler", "config", "sentence"),
    [
        ("StableDiffusionInpaintPipeline", "DDIMScheduler", {}, "is for inpainting"),
        ("StableDiffusionImg2ImgPipeline", "DDIMScheduler", {}, "draws from other images"),
        ("DDPMPipeline", "DDPMScheduler", {}, "does not draw from text"),
        ("LatentConsistencyModelPipeline", "LCMScheduler", {}, "distilled to a few steps"),
        ("SanaSprintPipeline", "SCMScheduler", {}, "distilled to a few steps"),
        ("IFPipeline", "DDPMScheduler", {"variance_type": "learned_range"}, "predicts the variance of the noise too"),
        ("NoSuchPipeline", "DDIMScheduler", {}, "install a newer version that has it"),
        (
            "StableDiffusionXLPipeline",
            "EDMDPMSolverMultistepScheduler",
            {},
            "draws with EDMDPMSolverMultistepScheduler",
        ),
        ("FluxControlNetPipeline", "FlowMatchEulerDiscreteScheduler", {}, "is steered by a ControlNet"),
        ("QwenImageEditPipeline", "FlowMatchEulerDiscreteScheduler", {}, "draws from other images"),
        ("KandinskyPipeline", "DDIMScheduler", {}, "draws from what a prior model makes of a text"),
        ("KandinskyCombinedPipeline", "DDIMScheduler", {}, "joins a prior and a decoder"),
        ("StableDiffusionAttendAndExcitePipeline", "DDIMScheduler", {}, "needs token_indices beside a caption"),
        ("FluxControlPipeline", "FlowMatchEulerDiscreteScheduler", {}, "that sees an image"),
        ("StableDiffusionXLInstructPix2PixPipeline", "DDIMScheduler", {}, "draws from other images"),
        ("LTX2Pipeline", "FlowMatchEulerDiscreteScheduler", {}, "makes sound"),
    ],
)
def test_the_class_of_a_pipeline_shows_that_it_cannot_be_trained(
    class_name: str, scheduler: str, config: dict[str, object], sentence: str, tmp_path: Path, train: Train
) -> None:
    model = write_index(tmp_path / "model", class_name, scheduler, **config)
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 1
    assert f"--pretrained_model_name_or_path {model}: {class_name} " in done.stderr and sentence in done.stderr


def list_pipelines() -> dict[str, type[Any]]:
    import diffusers

    named = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    kinds = {name: kind for name, kind in named.items() if isinstance(kind, type)}
    # Others stand for classes whose packages are missing, or choose one of several classes.
    return {
        n: kind for n, kind in kinds.items() if issubclass(kind, diffusers.DiffusionPipeline) and n == kind.__name__
    }


@pytest.mark.slow
def test_every_class_of_diffusers_is_measured_or_refused_for_its_kind() -> None:
    causes = {name: find_cause(kind, tuple(list_arguments(kind)), "", {}) for name, kind in list_pipelines().items()}
    assert len(causes) > 150
    kinds = {"ControlNet": "is steered by a ControlNet", "Inpaint": "is for inpainting", "Img2Img": "draws from other"}
    for part, sentence in kinds.items():
        another = [other for other in kinds if other != part] + ["Kandinsky", "Audio"]
        named = [name for name in causes if part in name and not any(other in name for other in another)]
        others = {name: causes[name] for name in named if not (causes[name] or "").startswith(sentence)}
        assert len(named) > 5 and others == {}
    measured = {name.split()[0] for name in (*PIPELINES, *MORE)} & causes.keys()
    assert len(measured) > 40 and {name: causes[name] for name in measured if causes[name]} == {}


def test_code_of_the_model_itself_runs_only_if_it_is_trusted(tmp_path: Path, train: Train) -> None:
    model = write_index(tmp_path / "model", ["pipeline", "OwnPipeline"])
    (model / "pipeline.py").write_text("raise RuntimeError('this code ran')\n")
    refused = train(arguments(model, tmp_path), script=SCRIPT)
    assert refused.status == 1 and "Read that file, and add --trust_remote_code to run it" in refused.stderr
    assert "this code ran" not in refused.stderr
    trusted = train(arguments(model, tmp_path, "--trust_remote_code"), script=SCRIPT)
    assert "--trust_remote_code runs " in trusted.stderr and "this code ran" in trusted.stderr


def test_a_folder_of_no_pipeline_is_refused(tmp_path: Path, train: Train) -> None:
    (tmp_path / "model").mkdir()
    done = train(arguments(tmp_path / "model", tmp_path), script=SCRIPT)
    assert done.status == 1 and "has no model_index.json that names one" in done.stderr


def test_a_folder_without_one_of_its_parts_is_refused(tmp_path: Path, train: Train) -> None:
    model = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)
    index = json.loads((model / "model_index.json").read_text())
    del index["scheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 1 and f"--pretrained_model_name_or_path {model} is not complete: AuraFlow" in done.stderr


def test_a_class_whose_package_is_missing_names_it(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = DummyObject("SongPipeline", (), {"_backends": ["torch", "no_songs"]})
    monkeypatch.setattr(diffusers, "SongPipeline", stand_in, raising=False)
    done = train(arguments(write_index(tmp_path / "model", "SongPipeline"), tmp_path), script=SCRIPT)
    assert done.status == 1 and "SongPipeline needs the package no_songs, which is not installed: pip" in done.stderr


def test_a_pipeline_whose_part_lacks_its_package_names_it(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Cosmos build a checker of what they draw, unless they are given one."""
    from diffusers.pipelines.cosmos.pipeline_cosmos2_text2image import CosmosSafetyChecker

    model, begin = tmp_path / "model", diffusers.AuraFlowPipeline.__init__
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)

    def build(self: Any, **parts: Any) -> None:
        CosmosSafetyChecker()
        begin(self, **parts)

    monkeypatch.setattr(diffusers.AuraFlowPipeline, "__init__", wraps(begin)(build))
    done = train(arguments(model, tmp_path), script=SCRIPT)
    sentence = ": AuraFlowPipeline needs the package cosmos_guardrail, which is not installed: pip install"
    assert done.status == 1 and sentence in done.stderr and "download the whole folder" not in done.stderr


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        (("sentencepiece", "google"), "needs the packages sentencepiece protobuf, which are not installed: pip"),
        (("google",), "needs the package protobuf, which is not installed: pip install protobuf"),
    ],
)
def test_a_tokenizer_whose_packages_are_missing_names_them(
    lacking: tuple[str, ...], sentence: str, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers names another package, or the file."""
    model = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)
    (model / "tokenizer" / "tokenizer.json").unlink()
    (model / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    monkeypatch.setattr(packages, "version_of", lambda name: "1")
    for name in ("sentencepiece", "google"):
        hide(name, monkeypatch, None if name in lacking else ImportError())
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 1 and sentence in done.stderr and "download the whole folder" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--network_train_text_encoder_only"], "the text encoders of a pipeline are not trained by this script"),
        (["--vae", "x"], "what is measured of the pipeline belongs to its own VAE"),
    ],
)
def test_options_for_other_models_are_refused(words: list[str], sentence: str, tmp_path: Path, train: Train) -> None:
    done = train(arguments(write_index(tmp_path / "model", "AuraFlowPipeline"), tmp_path, *words), script=SCRIPT)
    assert done.status == 1 and sentence in done.stderr


@pytest.mark.slow
def test_what_needs_all_samples_in_one_call_is_refused(tmp_path: Path, train: Train) -> None:
    build_tiny_pipeline("QwenImagePipeline").save_pretrained(tmp_path / "model")
    words = ["--network_module", "networks.tlora"]
    done = train(arguments(tmp_path / "model", tmp_path, *words), script=SCRIPT)
    assert done.status == 1
    assert (
        "T-LoRA does not work with QwenImagePipeline: captions of different lengths cannot share a call" in done.stderr
    )


def test_arguments_that_follow_caption_and_size_in_no_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_tiny_pipeline("ChromaPipeline")
    ordered = pipe._prepare_attention_mask

    def reverse(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = ordered(*args, **kwargs)
        return mask if mask is None else mask.flip(1)

    monkeypatch.setattr(type(pipe), "_prepare_attention_mask", reverse)
    sentence = "attention_mask follows caption and size together, so captions cannot be cached"
    with pytest.raises(Refused, match=sentence):
        measure(watch_pipeline(pipe), (64, 64))


@pytest.mark.slow
def test_every_refusal_is_a_sentence_of_words_that_says_what_to_use() -> None:
    """None quotes an error of Python, and a pipeline that is named as the one to use is not refused itself."""
    kinds = list_pipelines()
    causes = {name: find_cause(kind, tuple(list_arguments(kind)), "", {}) for name, kind in kinds.items()}
    refused = {name: cause for name, cause in causes.items() if cause is not None}
    assert len(refused) > 200
    for name, cause in refused.items():
        assert re.match(r"(is|draws?|makes|needs|has|joins|does|enlarges|computes) ", cause), (name, cause)
        assert not re.search(r"Error|Exception|None|[{}]", cause), (name, cause)
        instead = re.search(r"\b(\w+Pipeline)\b", cause)
        assert instead is None or (causes[instead[1]] is None and name != instead[1]), (name, cause)
        if re.search("draws from other|ControlNet|inpainting|prior|refiner|enlarges", cause):
            assert "use a model that" in cause, (name, cause)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("AnimateDiffVideoToVideoPipeline", "; use a model that AnimateDiffPipeline draws with"),
        ("StableDiffusionXLControlNetPAGPipeline", "; use a model that StableDiffusionXLPipeline draws with"),
        ("Kandinsky5I2VPipeline", "; use a model that Kandinsky5T2VPipeline draws with"),
        ("FluxImg2ImgPipeline", "; flux_train_network.py trains it, also with pairs of images; use a model that "
                                "FluxPipeline draws with"),
        ("QwenImage21Pipeline", "; qwen_image_21_train_network.py trains it, also with pairs of images; use a model "
                                "that draws from a caption alone"),
        ("HunyuanImageRefinerPipeline", "is a refiner, which starts from the image of another model; use a model that "
                                        "HunyuanImagePipeline draws with"),
        ("LatentConsistencyModelImg2ImgPipeline", "; use a model that draws from a caption alone"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_to_use(name: str, end: str) -> None:
    kind = getattr(diffusers, name)
    cause = find_cause(kind, tuple(list_arguments(kind)), "", {})
    assert cause is not None and cause.endswith(end), cause


def test_a_pipeline_belongs_to_the_base_model_whose_whole_words_begin_its_name() -> None:
    found = {
        name: {spec.name for spec in bases_of_pipeline(list_specs(), f"{name}Pipeline")}
        for name in ("AnimateDiff", "Anima", "Flux", "Flux2Klein")
    }
    assert found["AnimateDiff"] == set() and found["Anima"] == {"anima"}
    assert found["Flux"] != found["Flux2Klein"] and len(found["Flux2Klein"]) == 1


def test_a_pipeline_without_a_vae_is_refused_before_weights_are_read(tmp_path: Path, train: Train) -> None:
    build_tiny_pipeline("IFPipeline").save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    done = train(arguments(tmp_path / "model", tmp_path), script=SCRIPT)
    assert done.status == 1
    start = f"--pretrained_model_name_or_path {tmp_path / 'model'}: IFPipeline "
    assert f"{start}draws without a VAE, which this script does not train" in done.stderr


@pytest.mark.parametrize("is_check", [True, False])
def test_a_pipeline_that_draws_at_no_size_is_refused_before_weights_are_read(
    is_check: bool, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own words are the reason, not an error of Python."""
    model = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()

    def check_inputs(*_: Any, **__: Any) -> None:
        if is_check:
            raise ValueError("`image` has to be given")
        len(None)  # type: ignore[arg-type]

    monkeypatch.setattr(diffusers.AuraFlowPipeline, "check_inputs", check_inputs)
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 1 and "AuraFlowPipeline cannot be trained: it draws no image of 64x64" in done.stderr
    reason = "`image` has to be given" if is_check else "its code fails, as --console_log_level DEBUG shows"
    assert f"from a caption alone: {reason}" in done.stderr and "TypeError" not in done.stderr


@pytest.mark.parametrize(("name", "target"), [("FluxPipeline", "noise"), ("StableDiffusionPipeline", "latent")])
def test_a_target_that_no_objective_has_is_refused(name: str, target: Target) -> None:
    watched, convention, _ = measured(name)
    text: Any = None  # no captions
    predict = PipelinePredict(watched, replace(convention, target=target), text)
    options = PipelineOptions.from_args(argparse.Namespace(**PipelineOptions.defaults()))
    with pytest.raises(Refused, match=f"{name} predicts {target} of a"):
        build_objective(options, predict)
