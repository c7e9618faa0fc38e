"""A made-up base model (a package, a script, facts for the tests) is added to a copy of the project without other
changes, and the suites run for it."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from tests.running import ROOT, make_images
from tests.tiny.init import fixed_init
from tests.tiny.sd import VAE, vae_tensors
from tests.tolerances import FLOAT32_SAME_MATH

HERE = Path(__file__).parent
WIDTH, CHANNELS = 24, 4
LIFT_RANK, RANK, ALPHA = 2, 4, 3.0
DENOISER = "model.diffusion_model."
SHAPES = {
    f"{DENOISER}tie": (WIDTH, CHANNELS),
    f"{DENOISER}untie": (CHANNELS, WIDTH),
    "bytes_encoder.project": (WIDTH, WIDTH),
    **{f"{DENOISER}knots.{n}.mix": (WIDTH, 2 * WIDTH) for n in range(2)},
    **{f"{DENOISER}knots.{n}.lift": (WIDTH, WIDTH) for n in range(2)},
}
ADDED = {  # file or folder here -> its place in the project
    "knots": "library/architectures/knots",
    "knots_train_network.py": "knots_train_network.py",
    "knots_in_tests.py": "tests/tiny/knots.py",
}
SUITES = (  # the others are nightly
    "tests/contracts/test_training_scripts.py",
    "tests/parity/test_compiled.py",
    "tests/parity/test_counting.py",
    "tests/parity/test_host_waits.py",
    "tests/parity/test_merging.py",
    "tests/runs/test_every_architecture.py::test_with_every_feature_on_a_resumed_run_equals_the_uninterrupted_one",
    "tests/runs/test_memory_modes.py::test_swapped_blocks_and_offloaded_activations_do_not_change_results",
    "tests/runs/test_old_packages.py",
    "tests/unit/architectures/test_dit_files.py",
    "tests/unit/checkpoints/test_readers.py",
    "tests/unit/models/test_recognise.py",
)
NOT_KNOTS = {  # what these tests need and it lacks
    "kohya_ss": "an environment with other packages",
    "lycoris": "class names that LyCORIS knows",
    "loha or lokr": "numbered layers called blocks or layers",
    "8_bit_checkpoint": "the same",
    "plan_models": "a row in benchmarks/RESULTS.md",
    "deterministic_form": "forty different operations",
    "streamed_layers": "a text encoder of several layers",
    "cached_features": "a VAE in a file of its own",
}
TOOLS = """
import contextlib, importlib, io, json, sys
said = []
for name, *words in json.load(sys.stdin):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        status = importlib.import_module(name).main(words)
    said.append((status, screen.getvalue()))
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Project:
    """A copy of the project with the package and the script, and the results of its training."""

    root: Path
    model: Path
    adapter: Path
    log: str

    def run(self, *calls: list[str]) -> list[tuple[int, str]]:
        """Run tools, each given as a module name with arguments; return their exit status and output."""
        done = subprocess.run(
            [sys.executable, "-c", TOOLS], cwd=self.root, input=json.dumps(calls), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [(status, said) for status, said in json.loads(done.stdout.splitlines()[-1])]


def write_model(path: Path) -> None:
    """Write a checkpoint of random weights with a tiny Stable Diffusion VAE."""
    from diffusers import AutoencoderKL

    generator = torch.Generator().manual_seed(971)
    tensors = {}
    for name, shape in SHAPES.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    tensors["bytes_encoder.bytes.weight"] = torch.randn(256, WIDTH, generator=generator)
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    save_safetensors(path, {**tensors, **vae_tensors(fixed_init(vae, 972))}, {})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("made_up")
    root = folder / "project"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for added, place in ADDED.items():  # nothing else is, and no existing file is changed
        assert not (root / place).exists()
        (shutil.copytree if (HERE / added).is_dir() else shutil.copy)(HERE / added, root / place)
    write_model(folder / "knots.safetensors")
    make_images(folder / "data" / "1_thing", 3, seed=973)
    words = [
        "--pretrained_model_name_or_path", str(folder / "knots.safetensors"), "--train_data_dir", str(folder / "data"),
        "--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(folder / "out"), "--output_name",
        "mine", "--network_module", "networks.lora", "--network_dim", str(RANK), "--network_alpha", str(ALPHA),
        "--network_args", f"lift_dim={LIFT_RANK}", "train_knot_indices=1", "--learning_rate", "1e-2", "--seed", "7",
        "--max_train_steps", "3", "--max_data_loader_n_workers", "0", "--max_bytes", "16", "--gradient_checkpointing",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "knots_train_network.py", *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Project(root, folder / "knots.safetensors", folder / "out" / "mine.safetensors", done.stderr)


def rank_of(tensors: dict[str, Tensor], module: str) -> int:
    return tensors[f"{module}.lora_down.weight"].shape[0]


def test_its_script_trains_it_with_its_own_arguments(project: Project) -> None:
    tensors, metadata = load_state_dict(project.adapter), read_metadata(project.adapter)
    modules = {key.partition(".")[0] for key in tensors}
    assert modules == {"lora_te_project", "lora_unet_knots_1_mix", "lora_unet_knots_1_lift"}  # block 0 is excluded
    assert rank_of(tensors, "lora_unet_knots_1_lift") == LIFT_RANK
    assert rank_of(tensors, "lora_unet_knots_1_mix") == RANK
    assert all(float(tensors[f"{name}.lora_up.weight"].abs().max()) > 0 for name in modules)
    assert metadata["ss_base_model_version"] == "knots1" and metadata["modelspec.architecture"] == "knots-1/lora"
    assert "9 keys, some by ComfyUI (6 of 9); none by Forge" in project.log


def test_it_is_recognised_merged_and_checked(project: Project, tmp_path: Path) -> None:
    model, adapter, merged = str(project.model), str(project.adapter), str(tmp_path / "merged.safetensors")
    renamed, again = str(tmp_path / "generic.safetensors"), str(tmp_path / "extracted.safetensors")
    results = project.run(
        ["tools.check_lora_weights", adapter],
        ["tools.convert_lora", "--model", adapter, "--save_to", renamed, "--to", "generic"],
        ["tools.merge_lora", "--sd_model", model, "--models", renamed, "--ratios", "0.5", "--save_to", merged,
         "--save_precision", "float"],
        ["tools.extract_lora_from_models", "--model_org", model, "--model_tuned", merged, "--save_to", again,
         "--dim", "4"],
    )  # fmt: skip
    assert [status for status, _ in results] == [0, 0, 0, 0], results
    assert "3 modules, Knots 1" in results[0][1] and "ComfyUI: it does not read text encoder keys" in results[0][1]
    base, lora, after = (load_state_dict(path) for path in (project.model, project.adapter, merged))
    for layer, name in {
        f"{DENOISER}knots.1.mix.weight": "lora_unet_knots_1_mix",
        f"{DENOISER}knots.1.lift.weight": "lora_unet_knots_1_lift",
        "bytes_encoder.project.weight": "lora_te_project",
    }.items():
        up, down = lora[f"{name}.lora_up.weight"].double(), lora[f"{name}.lora_down.weight"].double()
        change = 0.5 * ALPHA / down.shape[0] * up @ down
        torch.testing.assert_close(after[layer].double(), base[layer].double() + change, **FLOAT32_SAME_MATH)
        assert float(change.abs().max()) > 1e-4
    assert read_metadata(merged)["modelspec.architecture"] == "knots-1"
    assert read_metadata(again)["ss_base_model_version"] == "knots1"
    assert {key.partition(".")[0] for key in load_state_dict(again)} == {
        f"lora_unet_knots_{n}_{layer}" for n in range(2) for layer in ("mix", "lift")
    }


@pytest.mark.nightly
def test_the_other_scripts_refer_to_its_own_script(project: Project, tmp_path: Path) -> None:
    words = [
        "--pretrained_model_name_or_path", str(project.model), "--train_data_dir", str(tmp_path), "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train_network.py", *words], cwd=project.root, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "this is a Knots checkpoint; use knots_train_network.py" in done.stderr


@pytest.mark.nightly
def test_train_leco_trains_it_with_its_own_options(project: Project, tmp_path: Path) -> None:
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "cat"\nresolution = 64\n')
    words = [
        "--pretrained_model_name_or_path", str(project.model), "--prompts_file", str(tmp_path / "prompts.toml"),
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--max_train_steps", "2", "--max_bytes", "16",
        "--max_denoising_steps", "3", "--learning_rate", "1e-2", "--seed", "7",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "train_leco.py", *words], cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensors = load_state_dict(tmp_path / "out" / "mine.safetensors")
    ups = [tensor for key, tensor in tensors.items() if "lora_up" in key]
    assert len(ups) == 4 and all(float(up.abs().max()) > 0 for up in ups)


def run_suites(project: Project, *words: str) -> set[str]:
    """Run the tests that have the model's name; return the files of those that passed. Raise AssertionError if any
    failed."""
    chosen = f"(knots or Knots) and not ({' or '.join(NOT_KNOTS)})"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-k",
        chosen,
        *words,
    ]
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return {line.split()[1].partition("::")[0] for line in done.stdout.splitlines() if line.startswith("PASSED ")}


def test_the_suites_that_all_base_models_share_run_for_it(project: Project) -> None:
    assert run_suites(project, "-m", "not gpu", *SUITES) == {suite.partition("::")[0] for suite in SUITES}


@pytest.mark.nightly
def test_every_suite_runs_for_it(project: Project) -> None:
    assert len(run_suites(project, "-m", "not gpu", "tests")) > 30


@pytest.mark.nightly
def test_its_runs_have_no_faults_on_the_simulated_gpu(project: Project) -> None:
    words = ["-p", "tests.simulated_gpu.plugin", "-m", "gpu", "tests/simulated_gpu", "tests/gpu"]
    assert len(run_suites(project, *words)) > 1
