"""A run that is interrupted anywhere and resumed repeats the uninterrupted run bit for bit."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.training.loop.steps import Steps
from library.training.saving import timed
from library.training.step.accumulation import Window
from tests.ranks import Job, run_ranks
from tests.running import ROOT, Finished, make_images
from tests.runs.test_processes import launch_two
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tools import make_shards

Train = Callable[..., Finished]
NIGHTLY = partial(pytest.param, marks=pytest.mark.nightly)

ALL_RANDOM = [
    "--shuffle_caption", "--caption_dropout_rate", "0.2", "--caption_tag_dropout_rate", "0.2", "--random_crop",
    "--flip_aug", "--color_aug", "--network_dropout", "0.1", "--noise_offset", "0.1", "--multires_noise_iterations",
    "3", "--ip_noise_gamma", "0.1", "--gradient_accumulation_steps", "2", "--token_warmup_step", "4",
    "--network_args", "rank_dropout=0.1", "module_dropout=0.1", "--ema_decay", "0.7", "--ema_update_after_step", "2",
    "--guidance_loss", "2",
]  # fmt: skip


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Return arguments for nine batches per epoch: five steps with two accumulated, the last with a single batch."""
    make_images(tmp_path / "data" / "1_more", 6, seed=1)
    return [*base_arguments, "--max_train_steps", "8"]


def load_saved(folder: Path, name: str = "mine.safetensors") -> dict[str, torch.Tensor]:
    return load_state_dict(folder / name)


def assert_equal_states(one: Path, other: Path) -> None:
    for name in ("network.safetensors", "training.safetensors"):
        first, second = load_state_dict(one / name), load_state_dict(other / name)
        assert first.keys() == second.keys()
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different
    manifest = [json.loads((folder / "train_state.json").read_text()) for folder in (one, other)]
    assert manifest[0]["parts"] == manifest[1]["parts"]
    assert manifest[0]["current_step"] == manifest[1]["current_step"]


def interrupt_and_resume(
    train: Train, arguments: list[str], folder: Path, cuts: list[int], **changes: list[str]
) -> None:
    """Train into `folder/whole`, and with interruptions after every step of `cuts` into `folder/parts`."""
    uninterrupted = train([*arguments, "--save_state_on_train_end", "--output_dir", str(folder / "whole")]).ok()
    parts = [*arguments, "--save_state", "--save_every_n_steps", "1", "--output_dir", str(folder / "parts")]
    train(parts).ok()
    for number, cut in enumerate(cuts):
        for path in (folder / "parts").iterdir():
            if path.name != f"mine-step{cut:08d}-state":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        resumed = [*parts, "--resume", str(folder / "parts" / f"mine-step{cut:08d}-state")]
        done = train([*resumed, *changes.get(f"after_{number}", [])]).ok()
        assert "uninterrupted" not in done.stderr
        assert uninterrupted.losses[-1] == done.losses[-1]
    assert_equal_states(folder / "whole" / "mine-state", folder / "parts" / "mine-state")
    expected, other = load_saved(folder / "whole"), load_saved(folder / "parts")
    assert all(torch.equal(expected[key], other[key]) for key in expected)
    assert expected.keys() == other.keys()


def test_resuming_is_exact_after_any_step_and_repeatedly_with_all_randomness_on(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    interrupt_and_resume(train, [*arguments, *ALL_RANDOM], tmp_path, cuts=[2, 5, 6])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "extra",
    [
        ["--network_module", "networks.dylora", "--network_args", "unit=2"],
        ["--network_module", "networks.lora_fa"],
        NIGHTLY(["--mixed_precision", "bf16", "--full_bf16"]),
        NIGHTLY(["--network_args", "dora_wd=True", "use_scalar=True", "conv_dim=2", "train_norm=True"]),
        NIGHTLY(["--network_args", "dora_wd=True", "wd_on_output=True", "conv_dim=2"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "preset=attn-mlp", "use_scalar=True"]),
        NIGHTLY(["--network_module", "lycoris.kohya", "--network_args", "preset=attn-mlp", "algo=dylora"]),
        NIGHTLY(["--network_args", "ggpo_sigma=0.05", "ggpo_beta=0.05"]),
        NIGHTLY(["--network_train_unet_only", "--cache_latents"]),
        NIGHTLY(["--scale_weight_norms", "0.1"]),
    ],
    ids=lambda words: words[-1],
)
def test_resuming_is_exact_with_every_network_module(
    train: Train, arguments: list[str], tmp_path: Path, extra: list[str]
) -> None:
    interrupt_and_resume(train, [*arguments, *extra], tmp_path, cuts=[3])


@pytest.mark.nightly
def test_the_number_of_loader_workers_may_change_on_resume(train: Train, arguments: list[str], tmp_path: Path) -> None:
    workers = ["--max_data_loader_n_workers", "4"]
    interrupt_and_resume(train, [*arguments, *ALL_RANDOM], tmp_path, cuts=[2, 4], after_0=workers)


def test_no_batch_before_the_resumed_step_is_loaded(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.data.batches.batches import BatchMaker

    requested: list[tuple[int, ...]] = []
    plain = BatchMaker.draft
    monkeypatch.setattr(BatchMaker, "draft", lambda self, order: requested.append(order.draws) or plain(self, order))
    train([*arguments, "--save_state", "--save_every_n_steps", "5"])
    in_one_go = list(requested)
    requested.clear()
    train([*arguments, "--resume", str(tmp_path / "out" / "mine-step00000005-state")])
    assert requested == in_one_go[5:]


def test_repeating_a_finished_command_with_autoresume_trains_nothing(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    first = train([*arguments, "--max_train_steps", "2", "--autoresume"])
    written = (tmp_path / "out" / "mine.safetensors").stat().st_mtime_ns
    second = train([*arguments, "--max_train_steps", "2", "--autoresume"])
    assert first.status == second.status == 0
    assert "nothing is left to train" in second.stderr and "saving checkpoint" not in second.stdout
    assert (tmp_path / "out" / "mine.safetensors").stat().st_mtime_ns == written


def test_options_changed_on_resume_take_effect_and_are_logged(
    train: Train, arguments: list[str], images: Path, tmp_path: Path
) -> None:
    words = [*arguments, "--max_train_steps", "3", "--lr_scheduler", "linear", "--save_state_on_train_end"]
    assert train(words).status == 0
    edited = images / "2_thing" / "00.png"
    edited.write_bytes((images / "2_thing" / "01.png").read_bytes())
    state = str(tmp_path / "out" / "mine-state")
    more = ["--max_train_steps", "4", "--learning_rate", "4e-3", "--logging_dir", str(tmp_path / "logs")]
    done = train([*words, "--resume", state, *more]).ok()
    assert "--learning_rate was 0.001 in the state and is 0.004, which takes effect from here on" in done.stderr
    assert "--max_train_steps was 3 in the state and is 4: learning rates that depend on the length" in done.stderr
    assert f"1 image changed since the state was saved: {edited}" in done.stderr
    assert [rate for _, rate in points(tmp_path / "logs")["lr/unet"]] == pytest.approx([4e-3 / 4])


def test_charts_continue_with_the_same_steps_and_values(train: Train, arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, *ALL_RANDOM, "--save_state", "--save_every_n_steps", "3"]
    assert train([*words, "--logging_dir", str(tmp_path / "whole")]).status == 0
    resumed = [*words, "--resume", str(tmp_path / "out" / "mine-step00000003-state")]
    assert train([*resumed, "--logging_dir", str(tmp_path / "rest")]).status == 0
    uninterrupted, rest = points(tmp_path / "whole"), points(tmp_path / "rest")
    assert uninterrupted.keys() == rest.keys() and len(rest["loss/current"]) == 9
    for name in uninterrupted:
        assert rest[name] == uninterrupted[name][-len(rest[name]) :]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every chart of a run except its speed as (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("speed/")]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_an_interruption_at_the_end_of_an_epoch_still_saves_the_epoch(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.failures.interruption import Interruption

    stop_requests = iter([False] * 8 + [True] * 9)
    monkeypatch.setattr(Interruption, "is_requested", property(lambda _: next(stop_requests)))
    train([*arguments, "--max_train_steps", "18", "--save_every_n_epochs", "1"]).ok()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"mine-000001.safetensors", "mine-step00000009.safetensors", "mine-step00000009-state"}


def test_an_interruption_within_an_epoch_logs_no_epoch_average(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.failures.interruption import Interruption

    stop_requests = iter([False, True])
    monkeypatch.setattr(Interruption, "is_requested", property(lambda _: next(stop_requests)))
    train([*arguments, "--logging_dir", str(tmp_path / "logs")]).ok()
    charts = points(tmp_path / "logs")
    assert "loss/current" in charts and "loss/epoch_average" not in charts


# --save_every_n_minutes: a run that is killed goes on from a state of the last minutes, and no number changes.


class Killed(BaseException):
    """Ends a run as a power cut does: nothing is saved."""


class Clock:
    """A clock that goes on by a minute a step, and cuts the power before the work after a step."""

    def __init__(self) -> None:
        self.minutes, self.cut_at = 0, 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock, finish = Clock(), Steps.finish

    def finish_later(steps: Steps, window: Window) -> None:
        clock.minutes += 1
        if window.step + 1 == clock.cut_at:
            raise Killed
        finish(steps, window)

    monkeypatch.setattr(Steps, "finish", finish_later)
    monkeypatch.setattr(timed, "monotonic", lambda: 60.0 * clock.minutes)
    yield clock


def states(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("mine-").removesuffix("-state") for path in folder.glob("*-state"))


@pytest.fixture
def timed_arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    return [*base_arguments, *ALL_RANDOM, "--max_train_steps", "8", "--save_state_on_train_end"]


def run_until(clock: Clock, step: int, train: Train, arguments: list[str]) -> None:
    clock.cut_at = step
    with pytest.raises(Killed):
        train(arguments)
    clock.cut_at = 0


def test_scheduled_states_are_not_outdated_by_timed_ones(
    clock: Clock, train: Train, timed_arguments: list[str], tmp_path: Path
) -> None:
    words = ["--save_every_n_minutes", "1", "--save_every_n_steps", "4", "--save_state"]
    run_until(clock, 8, train, [*timed_arguments, *words])
    # Step 4 has a state without the clock's help.
    assert states(tmp_path / "out") == ["step00000004", "step00000006-timed", "step00000007-timed"]


def test_a_run_without_states_at_its_end_leaves_none(clock: Clock, train: Train, base_arguments: list[str]) -> None:
    done = train([*base_arguments, "--max_train_steps", "3", "--save_every_n_minutes", "1"])
    assert done.status == 0 and done.stdout.count("removing old state") == 2
    assert "step00000003" not in done.stdout  # the file is its end


@pytest.mark.nightly
def test_two_processes_that_save_by_the_clock_of_the_first_train_as_without(
    base_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*base_arguments, "--save_state_on_train_end"]
    launch_two([*arguments, "--output_dir", str(tmp_path / "plain")]).ok()
    done = launch_two([*arguments, "--save_every_n_minutes", "1e-9"]).ok()  # at every step
    assert done.stdout.count("saving state") == 4 and done.stdout.count("removing old state") == 3
    assert_equal_states(tmp_path / "plain" / "mine-state", tmp_path / "out" / "mine-state")


# Two processes and one that accumulates differ in the order in which they add up the same gradients.
# Up factors that barely change show it most. After a few SGD steps on the toy base, those of the middle attention
# have norms of 1e-5, as their gradients nearly cancel, and differ by about 1e-6 of that; others agree to 1e-7. A
# process whose kernels split sums between two threads differs from itself by more.

CALLS = "tests.runs.order_calls"
ORDER = 5e-5  # of the norm of any factor: what the order of four gradients (6e-6) or of sums in kernels (1e-5) changes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Return the weights of runs of four steps with up to four batches each."""
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "data" / "2_thing", 10, seed=71)
    words = [
        "--pretrained_model_name_or_path", str(ROOT / "configs" / "quickstart" / "toy_base"), "--train_data_dir",
        str(folder / "data"), "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2",
        "--output_name", "mine", "--network_module", "networks.lora", "--network_dim", "4", "--optimizer_type", "SGD",
        "--learning_rate", "0.3", "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--no_report", "--save_precision", "float", "--validation_split", "0.3",
    ]  # fmt: skip
    jobs = []
    for name, count, accumulation, call in (
        ("two", 2, "2", None),
        ("one", 1, "4", None),
        ("ordered", 1, "4", f"{CALLS}:train_in_order_of_two"),
        ("threads", 1, "4", f"{CALLS}:train_with_two_threads"),
        ("pair", 2, "1", None),
        ("single", 1, "2", None),
    ):
        (folder / name).mkdir()
        command = [*words, "--gradient_accumulation_steps", accumulation, "--output_dir", str(folder / name / "out")]
        jobs.append(Job(command, count, str(folder / name), call=call))
    for job, ranks in zip(jobs, run_ranks(jobs, folder), strict=True):
        for rank in ranks:
            assert rank.status == 0 and rank.gave in (None, 0), (job.folder, rank.said[-3000:])
    return {Path(job.folder).name: load_state_dict(Path(job.folder) / "out" / "mine.safetensors") for job in jobs}


def relative_differences(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {k: float((actual[k] - t).norm() / t.norm().clamp(min=1e-30)) for k, t in wanted.items()}


@pytest.mark.nightly
def test_one_process_that_sums_in_the_order_of_two_equals_two_processes(weights: dict[str, dict[str, Tensor]]) -> None:
    """Equality is bit for bit with windows of three and four batches, so nothing else differs."""
    assert weights["ordered"].keys() == weights["two"].keys()
    assert all(torch.equal(weights["ordered"][key], tensor) for key, tensor in weights["two"].items())


@pytest.mark.nightly
def test_with_one_batch_per_process_the_order_does_not_matter(weights: dict[str, dict[str, Tensor]]) -> None:
    assert all(torch.equal(weights["pair"][key], tensor) for key, tensor in weights["single"].items())


@pytest.mark.nightly
def test_another_order_changes_factors_no_more_than_another_thread_count(weights: dict[str, dict[str, Tensor]]) -> None:
    order, threads = (relative_differences(weights[name], weights["one"]) for name in ("two", "threads"))
    assert 0 < max(order.values()) <= ORDER
    assert 0 < max(threads.values()) <= ORDER


# Training from shards with cached latents and text features, on machines without VAE and text encoders.

Cached = Callable[[str], tuple[Base, list[str], Path]]

BASE_FLAG = "--pretrained_model_name_or_path"
MODELS = ("--vae", "--ae", "--clip_l", "--clip_g", "--t5xxl", "--gemma2", "--qwen3", "--text_encoder", "--byt5")
CACHES = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
FAST = ("sdxl", "flux", "sd3")


def delete_encoders(words: list[str], keeps_text: bool) -> None:
    """Delete VAE and text encoders: their files, their folders, or their part of the one file."""
    for flag in MODELS:
        if flag in words:
            Path(words[words.index(flag) + 1]).unlink()
    path = Path(words[words.index(BASE_FLAG) + 1])
    if path.is_dir():
        for folder in ("vae", *(() if keeps_text else ("text_encoder", "text_encoder_2"))):
            shutil.rmtree(path / folder, ignore_errors=True)
        return
    tensors = load_file(path)
    prefixes = ("first_stage_model.", "vae.", *(() if keeps_text else ("text_encoders.", "conditioner.")))
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}, path)
    for beside in ("clip_l", "clip_g", "t5xxl", "vae"):
        (path.parent / f"{beside}.safetensors").unlink(missing_ok=True)


@pytest.fixture
def cached(tmp_path: Path, fresh_process: None) -> Cached:
    """Return `cached(base)`, which gives the base model, arguments for a run from shards, and their folder."""

    def make(name: str) -> tuple[Base, list[str], Path]:
        base = BASES[name]
        make_images(tmp_path / "images", 4, seed=8)
        text = "[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\ncaption_extension = '.txt'\n"
        text += f'image_dir = "{(tmp_path / "images").as_posix()}"\n'
        (tmp_path / "data.toml").write_text(text)
        (tmp_path / "model").mkdir()
        words = [
            *base.build(tmp_path / "model"), "--network_train_unet_only", "--seed", "6", "--network_dim", "2",
            "--network_module", base.module, "--learning_rate", "1e-3", "--max_train_steps", "3", "--no_report",
            "--max_data_loader_n_workers", "0", "--output_name", "mine",
            *(CACHES if base.caches_text else CACHES[:1]),
        ]  # fmt: skip
        out = tmp_path / "shards"
        packing_arguments = [*words, "--dataset_config", str(tmp_path / "data.toml"), "--out", str(out)]
        assert make_shards.main(["--script", f"{base.script}.py", *packing_arguments]) == 0
        return base, [*words, "--dataset_config", str(out / "dataset.toml")], out

    return make


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.nightly) for n in BASES])
def test_a_run_with_cached_features_is_the_same_without_the_encoders(
    name: str, cached: Cached, train: Train, tmp_path: Path
) -> None:
    base, words, _ = cached(name)
    with_models = train([*words, "--output_dir", str(tmp_path / "with")], script=base.script)
    assert with_models.status == 0 and "which is missing" not in with_models.stderr, with_models.stderr
    delete_encoders(words, not BASES[name].caches_text)
    if name == "sd3":  # nothing else shows that T5 encoded captions too
        words += ["--t5xxl", str(tmp_path / "t5xxl.safetensors")]
    without = train([*words, "--output_dir", str(tmp_path / "without")], script=base.script).ok()
    assert without.losses == with_models.losses and len(without.losses) == 3
    assert without.stderr.count("latents are not verified against their VAE, which is missing") == 1
    assert without.stderr.count("text features are not verified against their encoders") == BASES[name].caches_text
    expected, other = load_saved(tmp_path / "with"), load_saved(tmp_path / "without")
    assert expected.keys() == other.keys() and all(bool((expected[key] == other[key]).all()) for key in expected)


def test_options_that_need_a_missing_model_are_named_before_any_work(
    cached: Cached, train: Train, tmp_path: Path
) -> None:
    base, words, shards = cached("flux")
    delete_encoders(words, keeps_text=False)
    words += ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    cat, ae, t5 = (words[words.index(flag) + 1] for flag in ("--dataset_config", "--ae", "--t5xxl"))

    def refusal(*more: str, but: tuple[str, ...] = ()) -> str:
        done = train([word for word in words if word not in but] + list(more), script=base.script)
        assert done.status == 1 and "loading" not in done.stderr.partition("Error")[0], done.stderr
        return done.stderr

    message = refusal("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "1")
    assert f"--sample_prompts draws images; give the VAE, or leave it out: --ae {ae} does not exist" in message
    assert f"--ae {ae} does not exist" in refusal(but=("--cache_latents_to_disk",))
    assert "--clip_l" in refusal(but=("--cache_text_encoder_outputs_to_disk",))
    message = refusal(but=("--network_train_unet_only",))
    assert (
        "text encoders get an adapter without --network_train_unet_only; give them, or that option: --clip_l" in message
    )
    message = refusal("--t5xxl_max_token_length", "16")
    assert (
        "made with other settings" in message and f"--t5xxl {t5} does not exist" not in message.partition("captions")[0]
    )
    assert "must be encoded" in message and "does not exist" in message
    cache_file = next(shards.rglob("*_flux.npz"))
    cache_file.rename(cache_file.with_suffix(".gone"))
    message = refusal()
    assert "1 image must be encoded" in message and f"--ae {ae} does not exist" in message and cat


def test_cache_entries_of_two_models_are_never_mixed(cached: Cached, train: Train, tmp_path: Path) -> None:
    """Without the model it is unknown which are valid; with it the others are encoded again."""
    base, words, shards = cached("sdxl")
    words += ["--output_dir", str(tmp_path / "out")]
    path = Path(words[words.index(BASE_FLAG) + 1])
    before = {file: file.read_bytes() for file in sorted(shards.rglob("*.npz"))}
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        file = path / f"{part}.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    assert train(words, script=base.script).status == 0  # encodes everything again
    after = {file: file.read_bytes() for file in before}
    delete_encoders(words, keeps_text=False)
    for kind, message in (("_sdxl.npz", "made with another VAE"), ("_te_outputs.npz", "made with other text encoders")):
        mixed = sorted(file for file in before if file.name.endswith(kind) and not file.name.startswith("."))[-1]
        assert after[mixed] != before[mixed]
        mixed.write_bytes(before[mixed])
        done = train(words, script=base.script)
        assert done.status == 1 and message in done.stderr and "must be encoded" in done.stderr, done.stderr
        mixed.write_bytes(after[mixed])
    assert train(words, script=base.script).status == 0
