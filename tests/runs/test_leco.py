"""The LECO scripts from prompts to adapter files, on tiny models of every base."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from tests.ranks import Job, run_ranks
from tests.running import Finished
from tests.runs.test_exit_status import stop_in_step  # noqa: F401
from tests.tiny.bases import BASES
from tests.tiny.inpainting import widen_folder

Train = Callable[..., Finished]
Leco = Callable[..., Finished]

PAIRS = """
resolution = 64
[[prompts]]
target = "cat"
batch_size = 2
multiplier = -1.5
[[prompts]]
target = "a red dog"
positive = "an and"
unconditional = "red"
neutral = "dog"
action = "enhance"
guidance_scale = 2.0
weight = 0.5
"""


@pytest.fixture
def leco(train: Train, tiny_sd_folder: Path, tmp_path: Path) -> Leco:
    """Return `leco(...)`, which trains three steps on two pairs into `tmp_path / "out"`."""
    (tmp_path / "pairs.toml").write_text(PAIRS)
    words = [
        "--pretrained_model_name_or_path", str(tiny_sd_folder), "--prompts_file", str(tmp_path / "pairs.toml"),
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--learning_rate", "1e-2",
        "--max_train_steps", "3", "--max_denoising_steps", "4", "--seed", "5", "--no_report",
    ]  # fmt: skip

    def run(*more: str, script: str = "train_leco", status: int = 0) -> Finished:
        done = train([*words, *more], script=script)
        assert done.status == status, done.stderr
        return done

    return run


def load_saved(folder: Path, name: str = "mine.safetensors") -> dict[str, Tensor]:
    return load_state_dict(folder / name)


@pytest.mark.parametrize("base", ["sd", "sd2", "sdxl"])
def test_a_run_saves_a_denoiser_adapter_with_its_prompts_in_the_metadata(leco: Leco, tmp_path: Path, base: str) -> None:
    """No step uses the VAE, whose weights are NaN here."""
    model = BASES[base].build(tmp_path / "model")
    (vae,) = (tmp_path / "model" / "vae").glob("*.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in load_file(vae).items()}, vae)
    more = ["--v_parameterization"] if base == "sd2" else []
    script = "sdxl_train_leco" if base == "sdxl" else "train_leco"
    done = leco(*model, *more, "--save_every_n_steps", "2", "--training_comment", "bye", script=script)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"mine.safetensors", "mine-step00000002.safetensors"}
    weights = load_saved(out)
    assert all(key.startswith("lora_unet_") for key in weights)
    moved = [key for key, tensor in weights.items() if "lora_up" in key and tensor.abs().max() > 0]
    assert len(moved) == sum("lora_up" in key for key in weights) > 10
    assert {tensor.shape[0] for key, tensor in weights.items() if "lora_down" in key} == {4}
    metadata = read_metadata(out / "mine.safetensors")
    assert (metadata["ss_leco_prompt_count"], metadata["ss_leco_prompts_file"]) == ("2", "pairs.toml")
    assert [pair["target"] for pair in json.loads(metadata["ss_leco_preview"])] == ["cat", "a red dog"]
    assert (metadata["ss_network_module"], metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "1",
    )
    assert metadata["ss_training_comment"] == "bye"
    assert "pairs.toml: 2 (1 erase, 1 enhance), with 6 different prompts; height x width 64x64" in done.stderr
    idle = [line for line in done.stderr.splitlines() if "no effect" in line]
    assert "3 steps in" in done.stderr and all("is given 2 times" in line for line in idle)


EVERYTHING = [
    "--network_dropout", "0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "conv_dim=2",
    "--noise_offset", "0.1", "--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine", "--ema_decay", "0.7",
    "--sample_every_n_steps", "2", "--save_state", "--save_every_n_steps", "2", "--max_train_steps", "5",
]  # fmt: skip


def test_a_resumed_run_equals_the_uninterrupted_one(leco: Leco, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    (tmp_path / "pairs.toml").write_text(
        PAIRS.replace("resolution = 64", "resolution = 128\ndynamic_resolution = true")
    )
    everything = [*EVERYTHING, "--sample_prompts", str(tmp_path / "prompts.txt")]
    uninterrupted = leco(*everything, "--output_dir", str(tmp_path / "whole"))
    state = tmp_path / "whole" / "mine-step00000002-state"
    rest = leco(*everything, "--output_dir", str(tmp_path / "rest"), "--resume", str(state))
    assert "uninterrupted" not in rest.stderr
    assert len(uninterrupted.losses) == 5 and rest.losses == uninterrupted.losses[2:]
    expected, other = (load_saved(tmp_path / name) for name in ("whole", "rest"))
    assert expected.keys() == other.keys() and all(torch.equal(expected[key], other[key]) for key in expected)
    images = [
        [path.read_bytes() for path in sorted((tmp_path / name / "sample").glob("*000004_00*.png"))]
        for name in ("whole", "rest")
    ]
    assert images[0] == images[1] and len(images[0]) == 1


def test_changed_prompts_are_reported_on_resume(leco: Leco, tmp_path: Path) -> None:
    leco("--save_state", "--save_every_n_steps", "2")
    (tmp_path / "pairs.toml").write_text(PAIRS.replace("dog", "cat"))
    done = leco("--resume", str(tmp_path / "out" / "mine-step00000002-state"))
    assert "is not the one of the state (its captions differ): the run continues" in done.stderr
    assert "pictures in" not in done.stderr


def test_a_signal_saves_and_the_same_command_resumes(
    leco: Leco,
    tmp_path: Path,
    stop_in_step: Callable[[int, int], None],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_in_step(1, signal.SIGTERM)
    leco("--autoresume", "--exit_status_on_stop", status=143)
    assert list((tmp_path / "out").glob("mine*state"))
    monkeypatch.undo()
    leco("--autoresume")
    leco("--output_dir", str(tmp_path / "whole"))
    actual, other = load_saved(tmp_path / "out"), load_saved(tmp_path / "whole")
    assert all(torch.equal(actual[key], other[key]) for key in other)


def test_previews_are_drawn_at_full_strength(leco: Leco, tmp_path: Path) -> None:
    """After a step at strength -1.5 the preview equals that of the saved file before the first step of another run."""
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    draw = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--max_train_steps", "1"]
    (tmp_path / "pairs.toml").write_text('[[prompts]]\ntarget = "cat"\nresolution = 64\nmultiplier = -1.5\n')
    leco(*draw, "--sample_every_n_steps", "1")
    file = str(tmp_path / "out" / "mine.safetensors")
    leco(*draw, "--sample_at_first", "--network_weights", file, "--output_dir", str(tmp_path / "again"))
    (after,) = (tmp_path / "out" / "sample").glob("*000001_00*.png")
    (first,) = (tmp_path / "again" / "sample").glob("*e000000_00*.png")
    assert Image.open(after).tobytes() == Image.open(first).tobytes()


@pytest.mark.parametrize(
    "more", [["--gradient_checkpointing"], pytest.param(["--blocks_to_swap", "3"], marks=pytest.mark.nightly)]
)
def test_memory_saving_options_do_not_change_losses(leco: Leco, more: list[str]) -> None:
    """The backward pass recomputes blocks at the strength of the pair, -1.5 for one of them."""
    plain = leco("--network_args", "conv_dim=2").losses
    assert leco(*more, "--network_args", "conv_dim=2").losses == plain


def test_the_selftest_uses_the_strength_of_the_pair(leco: Leco) -> None:
    done = leco("--gradient_checkpointing", "--selftest", "--max_train_steps", "1")
    assert "selftest" in done.stderr


def test_a_dry_run_uses_the_largest_batch_and_writes_nothing(leco: Leco, tmp_path: Path) -> None:
    done = leco("--dry_run", "--max_train_steps", "40")
    assert "the largest batch has 2 images of 64x64" in done.stderr and "40 steps in 1 epochs" in done.stderr
    assert not (tmp_path / "out").exists()


KINDS = {
    "dora": ["networks.lora", "dora_wd=True", "use_scalar=True", "module_dropout=0.1"],
    "lora_fa": ["networks.lora_fa"],
    "dylora": ["networks.dylora", "unit=2"],
    "tlora": ["networks.tlora"],
    "loha": ["networks.loha", "dora_wd=True"],
    "lokr": ["networks.lokr", "factor=2"],
    "oft": ["networks.oft"],
    "boft": ["networks.boft"],
    "oft_v2": ["networks.oft_v2", "train_norm=True"],
    "ggpo": ["networks.lora", "ggpo_sigma=0.03", "ggpo_beta=0.01"],
    "lycoris": ["lycoris.kohya", "algo=lokr"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_kind_learns(leco: Leco, tmp_path: Path, base: str, kind: str) -> None:
    """Train both strengths of a slider; the saved weights change between the first and the last step."""
    (tmp_path / "pairs.toml").write_text('[[targets]]\npositive = "cat"\nnegative = "dog"\nresolution = 64\n')
    module, *arguments = KINDS[kind]
    words = [*BASES[base].build(tmp_path / "model"), "--network_module", module]
    words += ["--network_args", *arguments] if arguments else []
    leco(*words, "--save_every_n_steps", "1", script="sdxl_train_leco" if base == "sdxl" else "train_leco")
    first, last = (load_saved(tmp_path / "out", name) for name in ("mine-step00000001.safetensors", "mine.safetensors"))
    assert first.keys() == last.keys() and all(tensor.isfinite().all() for tensor in last.values())
    assert all(key.startswith("lora_unet_") for key in last)
    moved = sum(not torch.equal(first[key], last[key]) for key in last)
    assert moved > len(last) / 5


@pytest.mark.nightly
def test_two_processes_equal_one_with_twice_the_batches(tiny_sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.toml").write_text(PAIRS)
    words = [
        "--pretrained_model_name_or_path", str(tiny_sd_folder), "--prompts_file", str(tmp_path / "pairs.toml"),
        "--output_name", "mine", "--learning_rate", "0.3", "--optimizer_type", "SGD", "--max_train_steps", "3",
        "--max_denoising_steps", "4", "--seed", "5", "--no_report", "--output_dir",
    ]  # fmt: skip
    runs = {"one": (1, ["--gradient_accumulation_steps", "2"]), "two": (2, [])}
    jobs = []
    for name, (count, more) in runs.items():
        (tmp_path / name).mkdir()
        jobs.append(Job([*words, str(tmp_path / name / "out"), *more], count, str(tmp_path / name), "train_leco"))
    for ranks in run_ranks(jobs, tmp_path):
        assert all(rank.status == 0 for rank in ranks), [rank.said[-2000:] for rank in ranks]
    single, two = (load_saved(tmp_path / name / "out") for name in runs)
    for key in single:
        torch.testing.assert_close(single[key], two[key], rtol=1e-5, atol=1e-7)


def test_an_invalid_prompt_file_is_reported_before_the_model_is_opened(leco: Leco, tmp_path: Path) -> None:
    (tmp_path / "pairs.toml").write_text('[[prompts]]\ntarget = "cat"\nacton = "erase"\n')
    done = leco("--pretrained_model_name_or_path", "nowhere.safetensors", status=1)
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert "[[prompts]] number 1: acton is not a key (did you mean action?)" in line


def test_an_unsupported_image_size_is_rejected(leco: Leco, tmp_path: Path) -> None:
    (tmp_path / "pairs.toml").write_text('[[prompts]]\ntarget = "cat"\nresolution = 100\n')
    assert "resolution has a side of 100; use 96" in leco(status=1).stderr


def test_options_that_need_images_are_warned_about(leco: Leco) -> None:
    done = leco(
        "--train_data_dir", "pictures", "--resolution", "512", "--cache_latents", "--validation_split", "0.1",
        "--min_timestep", "10", "--text_encoder_lr", "1e-4", "--max_train_steps", "1",
    )  # fmt: skip
    warned = [line for line in done.stderr.splitlines() if "WARNING" in line and "has no effect" in line]
    for name in (
        "train_data_dir",
        "resolution",
        "cache_latents",
        "validation_split",
        "min_timestep",
        "text_encoder_lr",
    ):
        assert sum(f"--{name} has no effect" in line for line in warned) == 1, name
    assert any("--resolution has no effect: --prompts_file has a resolution for each prompt" in line for line in warned)


def test_an_inpainting_model_is_rejected(leco: Leco, tiny_sd_folder: Path, tmp_path: Path) -> None:
    model = widen_folder(tiny_sd_folder, tmp_path / "model", 3)
    done = leco("--pretrained_model_name_or_path", str(model), status=1)
    assert "is an inpainting model (its U-Net takes 9 channels)" in done.stderr
    assert "add --train_inpainting, which requires images, or use the plain model" in done.stderr
    done = leco("--train_inpainting", status=1)
    assert "--train_inpainting does not work with --prompts_file: there are no images to mask" in done.stderr


def test_base_weights_that_change_the_text_encoder_are_rejected(
    leco: Leco, train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    assert train([*base_arguments, "--output_dir", str(tmp_path / "other"), "--max_train_steps", "1"]).status == 0
    done = leco("--base_weights", str(tmp_path / "other" / "mine.safetensors"), status=1)
    assert "changes the text encoder (" in done.stderr and "which encodes the prompts before" in done.stderr


@pytest.mark.nightly
def test_base_weights_are_merged_into_the_denoiser(leco: Leco, tmp_path: Path) -> None:
    leco()
    plain = leco("--max_train_steps", "2", "--output_dir", str(tmp_path / "plain")).losses
    file = str(tmp_path / "out" / "mine.safetensors")
    done = leco("--base_weights", file, "--max_train_steps", "2", "--output_dir", str(tmp_path / "more"))
    assert done.losses != plain


@pytest.mark.nightly
def test_the_script_runs_with_a_users_command(
    launch: Callable[..., Finished], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.toml").write_text(PAIRS)
    launch(
        [
            "--pretrained_model_name_or_path", str(tiny_sd_folder), "--prompts_file", str(tmp_path / "pairs.toml"),
            "--output_dir", str(tmp_path / "out"), "--learning_rate", "1e-3", "--max_train_steps", "2",
            "--max_denoising_steps", "3", "--mixed_precision", "bf16",
        ],
        script="train_leco.py",
    ).ok()  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"last.safetensors", "last-report.html"}


def test_a_file_that_is_no_base_model_is_rejected_with_its_type(leco: Leco, tmp_path: Path) -> None:
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    done = leco("--pretrained_model_name_or_path", str(tmp_path / "vae.safetensors"), status=1)
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line]
    assert "vae.safetensors: this is a VAE, not a base model; use it with --vae" in line


def test_model_and_prompts_may_come_from_a_config_file(train: Train, tmp_path: Path) -> None:
    """The v2 flag is inferred from the weights."""
    (tmp_path / "pairs.toml").write_text(PAIRS)
    values = {
        "pretrained_model_name_or_path": BASES["sd2"].build(tmp_path / "model")[1],
        "prompts_file": str(tmp_path / "pairs.toml"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "train.toml").write_text("".join(f"{name} = '{value}'\n" for name, value in values.items()))
    words = ["--config_file", str(tmp_path / "train"), "--v_parameterization", "--max_train_steps", "1", "--no_report"]
    train([*words, "--max_denoising_steps", "2", "--output_name", "mine"], script="train_leco").ok()
    assert read_metadata(tmp_path / "out" / "mine.safetensors")["ss_v2"] == "True"


# train_leco.py on every base model: it recognises the file, trains, resumes bit for bit, and saves memory.

SLIDER = """
resolution = 64
[[targets]]
target_class = "a cat"
positive = "red"
negative = "blue dog"
"""


QUICK = ("sd", "flux")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in BASES]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that select a tiny model, without the flag that its own script needs."""
    words = BASES[name].build(tmp_path_factory.mktemp("model"))
    if "--model_type" in words:
        del words[(at := words.index("--model_type")) : at + 2]
    return [word for word in words if word != "--v2"]


@pytest.fixture
def leco_of_model(train: Callable[..., Finished], model: list[str], tmp_path: Path) -> Leco:
    """Return `leco(folder, ...)`, which trains three steps of a slider into a folder of `tmp_path`."""
    (tmp_path / "slider.toml").write_text(SLIDER)

    def run(folder: str, *more: str, status: int = 0) -> Finished:
        words = [
            *model, "--prompts_file", str(tmp_path / "slider.toml"), "--output_dir", str(tmp_path / folder),
            "--output_name", "mine", "--learning_rate", "1e-2", "--max_train_steps", "3", "--max_denoising_steps", "3",
            "--seed", "5", "--no_report", *more,
        ]  # fmt: skip
        done = train(words, script="train_leco")
        assert done.status == status, done.stderr
        return done

    return run


def test_a_resumed_run_equals_the_uninterrupted_one_with_every_memory_mode(
    leco_of_model: Leco, name: str, tmp_path: Path
) -> None:
    uninterrupted = leco_of_model("whole", "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = leco_of_model("rest", "--resume", str(state), "--gradient_checkpointing", "--cpu_offload_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    expected, other = (load_state_dict(tmp_path / folder / "mine.safetensors") for folder in ("whole", "rest"))
    assert expected.keys() == other.keys() and all(torch.equal(expected[key], other[key]) for key in expected)
    assert all(key.startswith(("lora_unet_", "diffusion_model.", "transformer.")) for key in expected)
    ups = [tensor for key, tensor in expected.items() if "lora_up" in key or "lora_B" in key]
    assert sum(float(tensor.abs().max()) > 0 for tensor in ups) == len(ups) > 3
    metadata = read_metadata(tmp_path / "whole" / "mine.safetensors")
    assert metadata["ss_leco_denoise_guidance_scale"] == ("1.0" if BASES[name].draws_without_guidance else "3.0")
    assert metadata["ss_leco_prompt_count"] == "4"
    warnings = [
        line for line in uninterrupted.stderr.splitlines() if "no effect" in line or "converts the output" in line
    ]
    assert not [line for line in warnings if "--vae" not in line], warnings


SWEPT = ["--sweep", "learning_rate=1e-2,2e-2"]


@pytest.mark.nightly
def test_each_run_of_a_sweep_equals_the_one_of_its_own(leco_of_model: Leco, name: str, tmp_path: Path) -> None:
    if name != "sd":
        pytest.skip("like sd")
    leco_of_model("sweep", *SWEPT)
    for rate in ("1e-2", "2e-2"):
        leco_of_model(rate, "--learning_rate", rate)
        separate = load_state_dict(tmp_path / rate / "mine.safetensors")
        other = load_state_dict(tmp_path / "sweep" / f"mine-lr{rate}.safetensors")
        assert separate.keys() == other.keys() and all(torch.equal(separate[key], other[key]) for key in separate)


@pytest.mark.nightly
def test_the_memory_of_a_step_is_planned(leco_of_model: Leco, name: str) -> None:
    """Only prompts are encoded, so there is no stage for images and no advice about their size."""
    done = leco_of_model("fit", "--fit", "8GB", "--max_train_steps", "1")
    assert "matches your options" in done.stderr or "To pin this choice" in done.stderr
    assert "peak of the run: training" in done.stderr and "encoding images" not in done.stderr
    done = leco_of_model("small", "--fit", "700MB", status=1)
    assert "a smaller batch_size or resolution in the --prompts_file" in done.stderr
