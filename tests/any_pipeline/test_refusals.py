"""Pipelines that cannot be trained are refused before weights are read; code in a folder runs only if allowed."""

import argparse
import json
import py_compile
import random
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from library.architectures.any_pipeline.convention import Target
from library.architectures.any_pipeline.folder import list_arguments, open_folder
from library.architectures.any_pipeline.folder import open_for_merging as open_pipeline
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.refusals import find_cause
from library.architectures.any_pipeline.training import PipelinePredict, build_objective
from library.architectures.any_pipeline.watch import Refused
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.base_model_spec import bases_of_pipeline
from library.commands.base_models import open_base_model
from library.environment import packages
from library.train_photos.base import recognise
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.test_convention import measured
from tests.any_pipeline.test_training import SCRIPT, arguments, weights
from tests.hiding import hide, lazily
from tests.running import Finished
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

diffusers = lazily("diffusers")
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
        ("StableDiffusionPipeline", "ScoreSdeVeScheduler", {}, "which has no single step"),
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
    stand_in = lazily("diffusers.utils").DummyObject("SongPipeline", (), {"_backends": ["torch", "no_songs"]})
    monkeypatch.setattr("diffusers.SongPipeline", stand_in, raising=False)
    done = train(arguments(write_index(tmp_path / "model", "SongPipeline"), tmp_path), script=SCRIPT)
    assert done.status == 1 and "SongPipeline needs the package no_songs, which is not installed: pip" in done.stderr


def test_a_pipeline_whose_part_lacks_its_package_names_it(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosmos' classes build a checker of the drawn images, unless they are given one."""
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


# Classes of diffusers that no table of tests lists, built by one rule, are trained and draw.

TRAINED = (
    "AnimateDiffPAGPipeline", "AnimateDiffPipeline", "AnimateDiffSDXLPipeline", "CogVideoXPipeline",
    "EasyAnimatePipeline", "HunyuanVideo15Pipeline", "HunyuanVideoPipeline", "Kandinsky5T2VPipeline", "LTXPipeline",
    "LattePipeline", "MochiPipeline", "SemanticStableDiffusionPipeline", "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2Pipeline", "StableDiffusionModelEditingPipeline", "StableDiffusionPanoramaPipeline",
    "StableDiffusionPipelineSafe", "TextToVideoSDPipeline",
)  # fmt: skip
NOT_TRAINED = {
    "AltDiffusionPipeline": "its text encoder is a class of its own module",
    "Cosmos2TextToImagePipeline": "needs torchvision and cosmos_guardrail, which the tests do without",
    "Cosmos2_5_PredictBasePipeline": "needs torchvision and cosmos_guardrail, which the tests do without",
    "CosmosTextToWorldPipeline": "draws with EDMEulerScheduler, whose scaling by the noise level is not trained",
    "IFPipeline": "draws without a VAE",
    "LDMTextToImagePipeline": "its text encoder is a class of its own module",
    "MotifVideoPipeline": "its text encoder, T5Gemma 2, is not built by the tests",
    "PRXPixelPipeline": "draws without a VAE",
    "StableDiffusionSAGPipeline": "is measured and trained; its preview reads attention that guidance alone computes",
    "VersatileDiffusionTextToImagePipeline": "its denoiser is a class of its own module",
}
"""Classes that are made to draw from a text and that this test does not train, and why."""
SHOWN = (
    "AllegroPipeline", "AmusedPipeline", "AnyFlowFARPipeline", "AnyFlowPipeline", "Cosmos3OmniPipeline",
    "DreamLiteMobilePipeline", "GlmImagePipeline", "HeliosPipeline", "HeliosPyramidPipeline",
    "LTXI2VLongMultiPromptPipeline", "LatentConsistencyModelPipeline", "OmniGenPipeline", "SanaSprintPipeline",
    "StableCascadePriorPipeline", "StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline",
    "StableDiffusionLDM3DPipeline", "StableDiffusionParadigmsPipeline", "StableDiffusionPix2PixZeroPipeline",
    "TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline", "UniDiffuserPipeline", "WanVACEPipeline",
    "WuerstchenPriorPipeline", "ZImageOmniPipeline",
)  # fmt: skip
"""Others, which their class refuses."""
SOME = random.Random(7).sample(TRAINED, 10)  # in the slow tier


def test_every_class_that_draws_from_text_is_trained_or_has_a_reason() -> None:
    """A new version of diffusers brings classes: they are added to one of the two lists."""
    kinds = list_pipelines()
    open_ = {name for name, kind in kinds.items() if find_cause(kind, tuple(list_arguments(kind)), "", {}) is None}
    assert open_ - set(PIPELINES) - set(MORE) - set(TRAINED) == set(NOT_TRAINED)
    assert not set(TRAINED) & set(NOT_TRAINED) and not set(SHOWN) & open_ and set(SHOWN) <= kinds.keys()
    assert len(open_ & (set(PIPELINES) | set(MORE) | set(TRAINED))) >= 60


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SOME else pytest.mark.nightly) for n in TRAINED]
)
def test_a_class_that_the_rule_builds_is_trained_and_draws(
    name: str, tmp_path: Path, train: Callable[..., Finished]
) -> None:
    """The scheduler is the published one. Those of videos draw one frame."""
    build_published(find_model(name), name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 64 --s 3 --l 2.5 --n blurred\n")
    words = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2")
    done = train(arguments(tmp_path / "model", tmp_path, *words), script=SCRIPT).ok()
    assert "failed, training continues" not in done.stderr, done.stderr
    trained = weights(tmp_path / "out" / "mine.safetensors")
    assert trained and all(tensor.isfinite().all() for tensor in trained.values())
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1


# Python files in a model's folder run only with --trust_remote_code, with any version of diffusers.

NAMES = ("None", "diffusers", "transformers", "pipeline", "custom_pipeline", "modeling", "tokenizer", "generate")
OWN_CODE = [["diffusers", "AuraFlowPipeline"], ["pipeline", "AuraFlowPipeline"], ["None", "None"]]
NO_CLASS = [
    "../pipeline", "pipeline.py", "os.path", "", " ", "AuraFlowPipeline.mro", 3, 0, True, None, {}, [], ["pipeline"],
    {"file": "pipeline"}, ["diffusers", "AuraFlowPipeline", "x"], [None, None], ["pipeline", None], [["pipeline"], "x"],
    ["../model/pipeline", "AuraFlowPipeline"], ["model.pipeline", "AuraFlowPipeline"], ["/pipeline", "A"], "x" * 5000,
    "ModularPipeline", "AutoModel", "__loader__", "AutoPipelineForText2Image", "UNet2DConditionModel", "utils",
]  # fmt: skip
NO_COMPONENT = [
    "diffusers", ["diffusers"], ["diffusers", 3], ["diffusers", "A", "B"], ["os", "system"], ["builtins", "eval"],
    ["modeling", "Own"], ["diffusers", "NoSuchClass"], ["../modeling", "Own"], ["transformer.modeling", "Own"],
    ["diffusers_modules", "Own"], ["pipeline_utils", "Path"], ["diffusers", "AutoModel"], ["transformers", "AutoModel"],
    ["diffusers", "DiffusionPipeline"], ["diffusers", "AuraFlowPipeline"], ["diffusers", "ModularPipeline"],
    ["diffusers", "load_image"], [None, None], ["None", "None"], None, {}, 3, [1, 2],
]  # fmt: skip


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that every Python file of the model writes when it runs."""
    return tmp_path / "code ran"


@pytest.fixture
def model(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with Python files everywhere and configurations that name them, read as diffusers 0.32 to 0.37 does."""
    folder = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for part in [folder, folder / "custom_generate", *(path for path in folder.iterdir() if path.is_dir())]:
        part.mkdir(exist_ok=True)
        for name in NAMES:
            (part / f"{name}.py").write_text(code)
    (folder / "text_encoder" / "custom_generate").symlink_to(folder / "custom_generate")
    autos = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoScheduler")
    for file in [*folder.glob("*/*config.json"), folder / "model_index.json"]:
        change_json(file, auto_map={auto: "modeling.Own" for auto in autos}, custom_pipeline="pipeline")
    (folder / "modular_model_index.json").write_text(
        '{"_class_name": "AuraFlowModularPipeline", "_blocks": "pipeline"}'
    )

    def from_pretrained(cls: Any, path: Any, **_: Any) -> None:
        name = json.loads((Path(path) / "model_index.json").read_text())["_class_name"]
        for file in ("None.py", f"{name[0]}.py"):
            if (Path(path) / file).is_file():
                runpy.run_path(str(Path(path) / file))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    return folder


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refusal(model: Path, mark: Path) -> str:
    """Return the error of every command that opens folders. None may run the folder's code."""
    errors = []
    for command in (
        lambda: open_folder(str(model), False).build_stage(),
        lambda: open_pipeline("--model", model),
        lambda: open_base_model("--model", model),
        lambda: recognise(str(model)),
    ):
        try:
            command()
        except UserError as error:
            errors.append(str(error))
    assert not mark.exists()
    return "\n".join(errors)


def test_a_folder_full_of_python_files_trains_and_runs_none(
    model: Path, mark: Path, tmp_path: Path, train: Train
) -> None:
    train(arguments(model, tmp_path), script=SCRIPT).ok()
    assert not mark.exists() and refusal(model, mark) == ""


def test_a_pipeline_that_is_no_class_of_diffusers_is_refused(model: Path, mark: Path) -> None:
    for entry in [*OWN_CODE, *NO_CLASS]:
        change_json(model / "model_index.json", _class_name=entry)
        assert str(model) in refusal(model, mark), entry


def test_the_flag_for_code_of_the_model_is_named(model: Path, mark: Path, tmp_path: Path, train: Train) -> None:
    change_json(model / "model_index.json", _class_name=["diffusers", "AuraFlowPipeline"])
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 1 and "add --trust_remote_code to run it" in done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("part", ["transformer", "tokenizer", "scheduler"])
def test_a_component_that_is_no_class_of_a_library_is_refused(part: str, model: Path, mark: Path) -> None:
    for entry in NO_COMPONENT:
        change_json(model / "model_index.json", **{part: entry})
        error = refusal(model, mark)
        assert str(model) in error and part in error, entry


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_refused(key: str, model: Path, mark: Path) -> None:
    change_json(model / "text_encoder" / "config.json", text_config={key: "someone/kernel"})
    assert f"asks for {key} someone/kernel, code that transformers would download" in refusal(model, mark)


def test_a_part_that_is_missing_is_not_looked_up_on_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list((model / "tokenizer").iterdir()):
        name.unlink()
    (model / "tokenizer").rmdir()
    monkeypatch.chdir(model.parent)
    with pytest.raises(UserError, match=r"is not complete: AuraFlowPipeline .*no folder tokenizer"):
        open_folder("model", False).build_stage()


def test_files_of_equal_names_stay_apart_and_no_compiled_code_replaces_them(model: Path) -> None:
    index = {}
    for part, (_, key, base) in OWN.items():
        folder = model / ("" if part == "pipeline" else part)
        (folder / "modeling.py").write_text(
            f"{base}\nfrom .other import NAME\n\n\nclass Own(Base):\n    name_of = NAME\n"
        )
        (folder / "other.py").write_text("NAME = 'compiled'\n")
        py_compile.compile(str(folder / "other.py"), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        (folder / "other.py").write_text(f"NAME = {part!r}\n")
        index[key] = ["modeling", "Own"]
    change_json(model / "model_index.json", **index)
    folder = open_folder(str(model), True)
    assert {"pipeline": folder.kind.name_of} | {
        name: kind.name_of for name, kind in folder.parts.items() if name in OWN
    } == {part: part for part in OWN}
    folder.build_stage()
    change_json(model / "model_index.json", scheduler=["modeling", "Missing"])
    with pytest.raises(UserError, match=r"modeling\.py has no class Missing"):
        open_folder(str(model), True)


OWN = {
    "pipeline": ("pipeline", "_class_name", "from diffusers import AuraFlowPipeline as Base"),
    "transformer": ("modeling", "transformer", "from diffusers import AuraFlowTransformer2DModel as Base"),
    "text_encoder": ("modeling", "text_encoder", "from transformers import UMT5EncoderModel as Base"),
    "scheduler": ("diffusers", "scheduler", "from diffusers import FlowMatchEulerDiscreteScheduler as Base"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", OWN)
def test_code_that_is_trusted_trains_and_is_named(
    part: str, model: Path, mark: Path, tmp_path: Path, train: Train
) -> None:
    file, key, base = OWN[part]
    path = model / ("" if part == "pipeline" else part) / f"{file}.py"
    path.write_text(
        f"{path.read_text()}{base}\nfrom .own_{part} import NAME\n\n\nclass Own{part}(Base):\n    name = NAME\n"
    )
    path.with_name(f"own_{part}.py").write_text("NAME = 'own'\n")
    change_json(model / "model_index.json", **{key: [file, f"Own{part}"]})
    assert "add --trust_remote_code" in refusal(model, mark)
    done = train(arguments(model, tmp_path, "--trust_remote_code"), script=SCRIPT).ok()
    assert mark.exists()
    for ran in (path, path.with_name(f"own_{part}.py")):
        assert f"--trust_remote_code runs {ran}, which has all rights that you have" in done.stderr
