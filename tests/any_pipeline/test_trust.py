"""Python files in a model's folder run only with --trust_remote_code, with any version of diffusers."""

import json
import py_compile
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.folder import open_for_merging as open_pipeline
from library.base.errors import UserError
from library.commands.base_models import open_base_model
from library.train_photos.base import recognise
from tests.any_pipeline.test_training import SCRIPT, arguments
from tests.running import Finished
from tests.tiny.pipelines import build_tiny_pipeline

Train = Callable[..., Finished]
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
    done = train(arguments(model, tmp_path), script=SCRIPT)
    assert done.status == 0, done.stderr
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
    done = train(arguments(model, tmp_path, "--trust_remote_code"), script=SCRIPT)
    assert done.status == 0, done.stderr
    assert mark.exists()
    for ran in (path, path.with_name(f"own_{part}.py")):
        assert f"--trust_remote_code runs {ran}, which has all rights that you have" in done.stderr
