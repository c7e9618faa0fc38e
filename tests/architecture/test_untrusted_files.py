"""The promises of docs/security.md: untrusted files are data and never run code."""

import ast
import re
from pathlib import Path

import pytest

from tests.architecture.sources import python_files, text_of

FILES = python_files("library", "networks", "tools")
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Data for workers is pickled by the process that starts them and passed in memory, never in a file.
FOR_WORKERS = "library/data/batches/shared.py"
# With --trust_remote_code alone, which tests/any_pipeline/test_refusals.py shows.
ON_REQUEST = "library/architectures/any_pipeline/classes.py"

RUNNING = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "torch.jit.load", "torch.hub.load"}
WORDS = (*PICKLING, *RUNNING, "shell", "load", "allow_pickle", "trust_remote_code", "import_own_class", "Pipeline")
SUSPECT = re.compile("|".join(map(re.escape, WORDS)))  # only files with one of these words are parsed


def dangers_of(source: str) -> list[str]:
    """Return the calls in this source that would run code from a file, with their lines."""
    dangers = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            dangers += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLING]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in RUNNING or keywords.get("shell", "False") != "False":
            dangers.append(f"{node.lineno}: calls {name}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            dangers.append(f"{node.lineno}: calls torch.load without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            dangers.append(f"{node.lineno}: allows pickles")
        if keywords.get("trust_remote_code", "False") != "False":
            dangers.append(f"{node.lineno}: trusts remote code")
        if name == "import_own_class":
            dangers.append(f"{node.lineno}: runs code of a model")
        if name.endswith("Pipeline.from_pretrained"):  # before diffusers 0.38 it runs files of a folder unasked
            dangers.append(f"{node.lineno}: opens the folder of a pipeline")
    return dangers


def test_no_untrusted_file_runs_code() -> None:
    suspects = [path for path in FILES if SUSPECT.search(text_of(path))]
    dangers_by_file = {
        path.as_posix(): [danger.partition(": ")[2] for danger in dangers_of(text_of(path))] for path in suspects
    }
    assert {path: dangers for path, dangers in dangers_by_file.items() if dangers} == {
        FOR_WORKERS: ["imports pickle"],
        ON_REQUEST: ["runs code of a model"],
    }


def test_pickled_data_for_workers_never_comes_from_a_file() -> None:
    tree = ast.parse(text_of(Path(FOR_WORKERS)))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    of_files = {name for name in called if name.split(".")[-1].startswith(("open", "read", "load", "Path"))}
    assert of_files == {"pickle.loads"} and "pickle.dumps" in called


def test_torch_load_is_called_in_one_place() -> None:
    calls = [
        path.as_posix()
        for path in FILES
        if "load" in text_of(path)
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load")
    ]
    assert calls == ["library/checkpoints/files.py"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
        "torch.jit.load(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "diffusers.DiffusionPipeline.from_pretrained(folder)",
        "import_own_class(file, name)",
    ],
)
def test_dangerous_calls_are_detected(source: str) -> None:
    assert SUSPECT.search(source) and len(dangers_of(source)) == 1
