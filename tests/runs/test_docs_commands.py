"""The documented commands run page by page in order, for two steps each on tiny models.

Only model paths, sizes and lengths are replaced. tests/contracts checks the commands as written with the parsers.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors import safe_open

from library.training.command_line.recipes import FOLDER, list_recipes
from tests.contracts.test_docs import PAGES, ROOT, TOYS, commands_of
from tests.running import Finished, make_images
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tests.tiny.flux import build_tiny_flux
from tests.tiny.pipelines import build_tiny_pipeline
from tests.tiny.score_models import write_clip, write_dinov2
from tests.tiny.sd import build_tiny_sd
from tests.tiny.sd3 import build_tiny_sd3
from tests.tiny.sdxl import build_tiny_sdxl
from tools import convert_lora, merge_lora
from tools.recipes import main

Train = Callable[..., Finished]
NOT_RUN = {  # start of a command -> where it is tested, or why it cannot run here
    "source .venv/bin/activate": "a matter of the shell",
    "python3 tools/start.py": "tests/runs/test_toys.py and tests/unit/tools/test_start.py",
    "python3 -m pip": "a program of others",
    "python3 -m pytest": "a program of others",
    "python3 -m pre_commit": "a program of others",
    "python3 -m benchmarks gpu_step": "needs a card; tests/runs/test_memory_modes.py runs it in small",
    "python3 -m benchmarks.toys check_adapter": "tests/runs/test_toys.py and test_toy_preferences.py",
    "python3 -m benchmarks.toys check_edits": "tests/runs/test_toys.py",
    "python3 -m benchmarks.toys evidence": "tests/unit/tools/test_toy_evidence.py",
    "python3 tools/verify.py": "tests/runs/test_verify.py; with --fit auto it needs a GPU",
    "python3 tools/draw.py path/to/wan_2_2": "tests/any_pipeline/test_experts.py",
    "python3 tools/vote.py": "waits for a browser: tests/runs/test_choose_checkpoint.py",
    "python3 tools/front_end.py": "tests/runs/test_front_end.py",
    "python3 tools/report.py output/quickstart --serve": "tests/unit/training/test_report_live.py",
    **{
        f"python3 {base.script}.py --recipe": "tests/runs/test_docs_commands.py"
        for base in BASES.values()
        if base.script != "train_network"
    },
    "python3 train_network.py --recipe sd15_character --pretrained": "tests/runs/test_docs_commands.py",
    "python3 tools/translate.py": "tests/unit/tools/test_translate.py",
    "python3 train.py": "tests/train_photos",
    "seq 4 | xargs": "tests/runs/test_sweep.py",
    **{
        f"python3 tools/cache_{what}.py --{name}": "tests/runs/test_musubi_tuner_commands.py"
        for name in BASES
        for what in ("latents", "text_encoder_outputs")
    },
    "accelerate launch --multi_gpu": "tests/runs/test_processes.py",
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu": "tests/runs/test_processes.py",
}
BASE_OF_SCRIPT = {
    **{base.script: name for name, base in BASES.items() if not base.spec.script_flag},
    "train_leco": "sd",
    "sdxl_train_leco": "sdxl",
}
EXAMPLES_OF_PAIRS = ("pairs.toml", "preferences.toml", "toy_edits.toml", "toy_preferences.toml", "toy_sizes.toml")
MANY_TRAININGS = {
    TOYS,
    *(ROOT / "docs" / f"{name}.md" for name in (
        "file_format", "flux_2_train_network", "krea2_train_network", "networks", "paired_images", "preferences",
        "previews", "report", "resume", "sweep", "tools", "train_leco", "train_network",
    )),
}  # fmt: skip


def runnable(page: Path) -> list[str]:
    return [command for command in commands_of(page) if not command.startswith(tuple(NOT_RUN))]


def page_parameters() -> list[object]:
    pages = [page for page in PAGES if runnable(page)]
    return [pytest.param(p, id=p.stem, marks=pytest.mark.nightly if p in MANY_TRAININGS else ()) for p in pages]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with images and the shipped configurations at a small size."""
    make_images(tmp_path / "pictures" / "my_cat", 4)
    make_images(tmp_path / "pictures" / "10_mycat", 2)
    make_images(tmp_path / "regularisation" / "1_cat", 2)
    (tmp_path / "configs" / "examples").mkdir(parents=True)
    add_quickstart(tmp_path / "configs" / "quickstart")
    (tmp_path / "configs" / "leco").mkdir()
    for path in (ROOT / "configs" / "leco").glob("*.toml"):
        text = path.read_text(encoding="utf-8").replace("resolution = 512", "resolution = 64")
        (tmp_path / "configs" / "leco" / path.name).write_text(text.replace("resolution = 1024", "resolution = 64"))
    for name in ("dataset.toml", "musubi.toml", *EXAMPLES_OF_PAIRS, "toy_preservation.toml"):
        pairs = (ROOT / "configs" / "examples" / name).read_text(encoding="utf-8")
        pairs = pairs.replace("resolution = 1024", "resolution = 64\nmin_bucket_reso = 64")
        (tmp_path / "configs" / "examples" / name).write_text(pairs, encoding="utf-8")
    for number, folder in enumerate(("before", "after", "preferred", "rejected")):
        make_images(tmp_path / "pictures" / folder, 2, seed=number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_quickstart(folder: Path) -> None:
    """Add the quickstart's files, reduced to two prompts and two sampling steps to save minutes."""
    folder.mkdir()
    for path in (ROOT / "configs" / "quickstart").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "prompts.txt").unlink()
    lines = (ROOT / "configs" / "quickstart" / "prompts.txt").read_text(encoding="utf-8").splitlines()[1:3]
    assert all(" --s 20 " in line for line in lines)
    (folder / "prompts.txt").write_text("\n".join(line.replace(" --s 20 ", " --s 2 ") for line in lines))


def add_adapter_files(place: Path, train: Train) -> None:
    """Add the files that the tools pages need: a base model and adapters for it."""
    sd = build_tiny_sd(place / "sd", 51, layout="safetensors")
    shutil.copy(sd, "sd15.safetensors")
    build_tiny_sd(place / "sd15_folder", 51)
    build_tiny_sdxl(place, 53, layout="safetensors").rename("sdxl.safetensors")
    words = f"--pretrained_model_name_or_path {sd} --train_data_dir pictures --resolution 64 --caption_extension .txt "
    words += "--learning_rate 1e-2 --output_dir . --max_train_steps 1 "
    dylora = "--network_module networks.dylora --network_dim 32 --network_args unit=4 --output_name cat"
    oft = "--network_module networks.oft_v2 --network_dim 4 --output_name cat_oft"
    assert all(train([*words.split(), *adapter.split()]).status == 0 for adapter in (dylora, oft))
    for name in ("style", "my_cat"):
        shutil.copy("cat.safetensors", f"{name}.safetensors")
    assert convert_lora.main(shlex.split("--model cat.safetensors --save_to from_peft.safetensors --to diffusers")) == 0
    add_parts_of_models(place)
    merged = "--sd_model sd15.safetensors --models cat.safetensors --save_to tuned.safetensors"
    assert merge_lora.main(merged.split()) == 0


def add_parts_of_models(place: Path) -> None:
    """Add a FLUX.1 in the diffusers layout and an SD3 with separate text encoder files."""
    build_tiny_flux(place / "FLUX.1-dev", 55, "diffusers")
    build_tiny_sd3(place / "sd3", 57, with_text=False).rename("sd3.5_large.safetensors")
    for name, part in {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl_fp16": "t5xxl"}.items():
        (place / "sd3" / f"{part}.safetensors").rename(f"{name}.safetensors")


def add_result(page: Path, name: str, place: Path, train: Train) -> None:
    """Add the adapter that a page's first command, of train.py, saves; train.py has its own tests."""
    kind = BASE_OF_SCRIPT.get(page.stem, "sd")
    words = "--train_data_dir pictures --resolution 64 --min_bucket_reso 64 --caption_extension .txt --network_dim 4 "
    words += f"--network_module networks.lora --max_train_steps 1 --output_dir output/{name} --output_name {name}"
    train([*words.split(), *BASES[kind].build(place / "base_of_page")], BASES[kind].script).ok()


def with_tiny_models(words: list[str], folder: Path, script: str) -> list[str]:
    """Return the command line with a tiny model instead of the documented files, for two steps."""
    arguments: list[str] = []
    names_model = any("path/to/" in word for word in words)
    for word in words:
        if word.startswith("path/to/"):
            arguments.pop()  # its option name
        else:
            arguments.append(word)
    if names_model and script == "diffusers_train_network":
        build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
        arguments += ["--pretrained_model_name_or_path", str(folder)]
    elif names_model:
        kind = arguments[arguments.index("--model_type") + 1] if "--model_type" in arguments else BASE_OF_SCRIPT[script]
        kind = "flux" if script == "train_leco" and "--clip_l" in words else kind
        arguments += BASES[kind].build(folder)
    if "--resolution" in arguments:
        arguments[arguments.index("--resolution") + 1] = "64,64"
        arguments += ["--min_bucket_reso", "64"]
    if "--recipe" in arguments:
        arguments += [
            "--resolution",
            "64",
            "--min_bucket_reso",
            "64",
            "--mixed_precision",
            "no",
            "--sample_prompts",
            "",
        ]
    if "--system_prompt" in arguments:
        # The documented system prompt does not fit into the tiny limit of 32.
        arguments += ["--gemma2_max_token_length", "128"]
    arguments = [word.replace("512,512", "64,64").replace("step00000100", "step00000001") for word in arguments]
    for place, word in enumerate(arguments):
        if word.endswith("_n_steps"):
            arguments[place + 1] = "1"
    if "--prompts_file" in arguments:
        arguments += ["--max_denoising_steps", "4"]
    return [*arguments, "--max_train_epochs", "0", "--max_train_steps", "2"]


def run_command(command: str, place: Path, train: Train) -> None:
    """Run one command; raise AssertionError with its output unless it exits with 0."""
    words = shlex.split(command)
    words = words[2:] if words[0] == "accelerate" else words[1:]
    if words[0] == "-m":  # benchmarks, benchmarks.toys
        words = ["/".join([*words[1].split("."), f"{words[2]}.py"]), *words[3:]]
    script, arguments = Path(words[0]), words[1:]
    if script.parts[0] in ("tools", "benchmarks"):
        arguments = [word.removeprefix("path/to/") for word in arguments]
        if "--prompt" in arguments and "--w" not in " ".join(arguments):  # 512 pixels in 30 steps take minutes
            arguments[arguments.index("--prompt") + 1] += " --s 2 --w 64 --h 64"
        assert importlib.import_module(".".join(script.with_suffix("").parts)).main(arguments) == 0, command
        return
    if not {"--help", "--help_all", "--debug_dataset", "--output_config"} & set(arguments):
        arguments = with_tiny_models(arguments, place / f"base_{len(list(place.iterdir()))}", script.stem)
    done = train(arguments, script.stem)
    assert done.status == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", page_parameters())
def test_the_commands_of_a_page_run_in_order(page: Path, place: Path, train: Train) -> None:
    if page.name in ("tools.md", "file_format.md"):
        add_adapter_files(place, train)
    if page.name == "README.md":
        build_tiny_sd(place, 51, layout="safetensors").rename("sd15.safetensors")
    if page.name == "previews.md":  # in place of the hub
        write_dinov2(place / "facebook" / "dinov2-base")
        write_clip(place / "openai" / "clip-vit-base-patch32")
    if page.name == "scale.md":
        build_tiny_sdxl(place, 53, layout="safetensors").rename("sdxl.safetensors")
    if page.name == "memory.md":
        build_tiny_flux(place, 54)
        (place / "flux1.safetensors").rename("flux1-dev.safetensors")
    results = re.findall(r"output/(\w+)/\1\.safetensors", " ".join(runnable(page)))
    if page.name == "faults.md":  # its only training is a dry run of the quickstart
        train(["--config_file", "configs/quickstart/train.toml", "--max_train_steps", "1"], "train_network").ok()
    elif results and any(" train" in command for command in commands_of(page)):
        add_result(page, results[0], place, train)
    for command in runnable(page):
        run_command(command, place, train)


# docs/notebook.ipynb runs cell by cell on the toy base, as in a notebook service.


@pytest.mark.nightly
@pytest.mark.slow
def test_its_cells_train_and_show_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    images = make_images(tmp_path / "images", 2)
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    settings, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    values = {
        "IMAGES": str(images),
        "MODEL": str(ROOT / "configs" / "quickstart" / "toy_base"),
        "OUTPUT": str(tmp_path / "out"),
        "MORE": ["--steps", "2"],
    }
    assert values.keys() <= {line.split(" = ")[0] for line in settings.source.splitlines()}
    settings.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    image_outputs = [output for output in cells[-1].outputs if "image/png" in output.get("data", {})]
    assert len(image_outputs) == 2
    assert (tmp_path / "out" / "mine.safetensors").is_file()


# --recipe: every recipe is planned and dry-run on a tiny model of its base; explicit options override it.

NAMES = [recipe.name for recipe in list_recipes()]


def base_of(name: str) -> Base:
    """Return the base model of a recipe: one script trains relatives, which a setting selects."""
    (recipe,) = (recipe for recipe in list_recipes() if recipe.name == name)
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    bases = [base for base in BASES.values() if f"{base.script}.py" == recipe.script]
    settings = {base.name: base.spec.script_flag.removeprefix("--").partition(" ") for base in bases}
    selected = [b for b in bases if (s := settings[b.name])[0] and f'{s[0]} = "{s[2]}"' in text]
    return (selected or [base for base in bases if not base.spec.script_flag])[0]


QUICK = ("sd15_character", "flux_character")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create pictures/my_cat with captions in the current directory, as a user would."""
    make_images(tmp_path / "pictures" / "my_cat", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.nightly) for name in NAMES]
)
def test_a_recipe_is_planned_and_dry_run(name: str, train: Train, data: Path) -> None:
    """At 64 px on a simulated GPU no option is ignored, and the largest batch of the dataset is computed."""
    base = base_of(name)
    (recipe,) = (candidate for candidate in list_recipes() if candidate.name == name)
    assert recipe.script == f"{base.script}.py" and recipe.title
    size = ["--fit", "12GB"] if "sd15" not in name else []
    arguments = [
        "128" if word == "32" else word for word in base.build(data / "base")
    ]  # a system prompt takes 78 tokens
    done = train(
        [
            *arguments, "--recipe", name, "--resolution", "64", "--min_bucket_reso", "64",
            "--max_bucket_reso", "128", *size,
            "--mixed_precision", "no", "--output_dir", str(data / "out"), "--output_name", "mine", "--dry_run",
        ],
        base.script,
    ).ok()  # fmt: skip
    log = done.stdout + done.stderr
    assert f"options are read from {FOLDER / name}.toml" in log
    assert "no effect" not in log and "ignored" not in log and "no such option" not in log, log
    assert "dry run: the largest batch has" in log
    assert bool(size) == ("selected: ->" in log)


def test_command_line_and_config_file_override_the_recipe(train: Train, data: Path) -> None:
    make_images(data / "mine" / "2_cat", 2)
    (data / "own.toml").write_text("network_dim = 3\nmax_bucket_reso = 128\nseed = 5\nmax_train_steps = 9\n")
    train(
        [
            *BASES["sd"].build(data / "base"), "--recipe", "sd15_style", "--config_file", "own.toml", "--seed", "6",
            "--train_data_dir", "mine", "--resolution", "64", "--mixed_precision", "no", "--sample_prompts", "",
            "--max_train_steps", "2", "--output_dir", "out", "--output_name", "mine", "--min_bucket_reso", "64",
        ]
    ).ok()  # fmt: skip
    with safe_open(data / "out" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "3" and metadata["ss_seed"] == "6" and metadata["ss_steps"] == "2"
    assert float(metadata["ss_network_alpha"]) == 16 and metadata["ss_lr_scheduler"] == "cosine"  # from the recipe
    assert metadata["ss_num_train_images"] == "4"  # not the recipe's dataset


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recipe", "sd15_charakter"], "there is no recipe sd15_charakter (did you mean sd15_character?)"),
        (["--recipe", "flux_style"], "--recipe flux_style is for flux_train_network.py"),
    ],
)
def test_an_unknown_recipe_is_rejected(arguments: list[str], error: str, train: Train) -> None:
    done = train(arguments)
    assert done.status == 1 and error in done.stderr


def test_the_tool_lists_and_prints_them() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([]) == 0 and main(["sdxl_style"]) == 0
    text = printed.getvalue()
    assert all(f"--recipe {name} " in text for name in NAMES) and 'script = "sdxl_train_network.py"' in text
    assert main(["sdxl_stile"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_value_has_a_reason(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    for line in re.sub(r"\[steps\].*?(?=\n\[|\Z)", "", text, flags=re.DOTALL).splitlines():
        if " = " in line and not line.startswith(("#", "script", "title")):
            assert "  # " in line, line


def test_every_documented_base_model_has_a_recipe() -> None:
    scripts = {recipe.script for recipe in list_recipes()}
    assert scripts == {path.name for path in ROOT.glob("*train_network.py")}
