"""Previews: when they are generated, their file names, and how failures are handled."""

import logging
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from library.architectures.sd.assembly import build
from library.base.errors import UserError
from library.options.output.preview import PreviewOptions
from library.options.output.saving import SavingOptions
from library.processes.process_group import ALONE, Processes
from library.training.evaluation.drawing import collect_texts, decode, draw_latents, encode_prompts
from library.training.evaluation.preview import Previews, PreviewSchedule, read_wanted_prompts
from library.training.evaluation.without_side_effects import evaluating
from library.training.failures.interruption import Interrupted, Interruption
from library.training.failures.vae_memory import VaeFallback
from library.training.reporting.event_stream import Events
from library.training.reporting.sample_images import Drawn, format_parameters, image_path, write_grid, write_preview
from library.types import Prompt
from networks.core.protocol import AdoptedNetwork
from tests.parity.test_preview import prompt_of
from tests.parity.test_step_loss import options_for
from tests.unit.test_processes import Board


@pytest.mark.parametrize("nothing", [None, 0, -1])
def test_intervals_that_are_not_positive_are_never_due(nothing: int | None) -> None:
    times = PreviewSchedule.build(PreviewOptions(sample_every_n_steps=nothing, sample_every_n_epochs=nothing))
    assert times.is_empty
    assert not any(times.holds_step(n) or times.holds_epoch(n) for n in range(1, 10))


def test_steps_and_epochs_that_are_multiples_are_due() -> None:
    steps = PreviewSchedule.build(PreviewOptions(sample_every_n_steps=3, sample_every_n_epochs=0))
    assert [n for n in range(1, 10) if steps.holds_step(n)] == [3, 6, 9]
    epochs = PreviewSchedule.build(PreviewOptions(sample_every_n_steps=3, sample_every_n_epochs=2))
    assert [n for n in range(1, 6) if epochs.holds_epoch(n)] == [2, 4]
    assert not any(epochs.holds_step(n) for n in range(1, 10))
    assert not PreviewSchedule.build(PreviewOptions(sample_at_first=True)).is_empty


@pytest.mark.parametrize(
    ("output_name", "event", "seed", "name"),
    [
        ("my cat", "e000003", 42, r"my cat_e000003_07_\d{14}_42\.png"),
        ("cat", "000150", None, r"cat_000150_07_\d{14}\.png"),
        (None, "e000000", 0, r"e000000_07_\d{14}_0\.png"),
    ],
)
def test_files_have_the_names_that_front_ends_expect(
    output_name: str | None, event: str, seed: int | None, name: str
) -> None:
    path = image_path(SavingOptions(output_dir="out", output_name=output_name), event, 7, seed)
    assert path.parent == Path("out") / "sample"
    assert re.fullmatch(name, path.name)


def test_an_image_file_contains_its_prompt(tmp_path: Path) -> None:
    prompt = prompt_of(text="a café 猫", num_steps=4)
    path = tmp_path / "sample" / "a.png"
    write_preview(path, Drawn(0, prompt, Image.new("RGB", (8, 8), (1, 2, 3))))
    with Image.open(path) as image:
        assert image.info["parameters"] == format_parameters(prompt)
        assert image.getpixel((0, 0)) == (1, 2, 3)
    assert format_parameters(prompt) == (
        "a café 猫\nNegative prompt: dog\nSteps: 4, Sampler: ddim, CFG scale: 3.0, Seed: 7, Size: 64x96"
    )
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_an_image_of_another_strength_says_so() -> None:
    assert format_parameters(prompt_of(strength=-2.0)).endswith("Size: 64x96, Adapter strength: -2.0")


def test_a_grid_shows_the_images_row_by_row(tmp_path: Path) -> None:
    colours = [(10, 0, 0), (0, 20, 0), (0, 0, 30)]
    sizes = [(8, 6), (4, 6), (8, 2)]
    drawn = [Drawn(n, prompt_of(), Image.new("RGB", sizes[n], colours[n])) for n in range(3)]
    write_grid(tmp_path / "grid.png", drawn)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 + 4 + 8, 6 + 4 + 6)
        assert [grid.getpixel(place) for place in ((0, 0), (14, 0), (0, 12))] == colours
        assert [grid.getpixel(place) for place in ((9, 0), (13, 0), (0, 11), (19, 15))] == [(0, 0, 0)] * 4


def test_required_texts_are_listed_once() -> None:
    prompts = [prompt_of(), prompt_of(text="b"), prompt_of(text="c", negative="unused", scale=1.0)]
    arch: Any = SimpleNamespace(preview=SimpleNamespace(format_prompt=str), text_cache=None)
    assert collect_texts(prompts, arch) == ["a red cat", "dog", "b", "c"]


class Charts:
    """A tracker stand-in that records the images sent to it."""

    def __init__(self) -> None:
        self.images: list[tuple[int, int, list[int]]] = []

    def log_images(self, images: list[Drawn], step: int, epoch: int) -> None:
        self.images.append((step, epoch, [image.index for image in images]))


@pytest.fixture
def run(tiny_sd_folder: Path, tmp_path: Path) -> Any:
    """Return a run with the parts that previews need; its network does nothing."""
    options = options_for(tiny_sd_folder, output_dir=str(tmp_path / "out"), sample_every_n_steps=2)
    arch = build(options)
    models = SimpleNamespace(
        training_adapter=None,
        denoiser=arch.load.denoiser(),
        text_encoders=arch.load.text_encoders(),
        vae=None,
        sharded=None,
    )
    context = SimpleNamespace(
        alone=nullcontext,
        arch=arch,
        seed=5,
        device=torch.device("cpu"),
        autocast=nullcontext,
        models=models,
        network=AdoptedNetwork(nn.Dropout(0.5)),
        trains_text_encoder=False,
        live_text=None,
    )
    built = SimpleNamespace(eval=lambda: None, train=lambda: None)
    optimization = SimpleNamespace(built=built, average=None)
    return SimpleNamespace(
        options=options, context=context, optimization=optimization, events=Events(), processes=ALONE, label=""
    )


def previews_of(run: Any, *prompts: Prompt) -> tuple[Previews, Charts]:
    charts: Any = Charts()
    return Previews(run, charts, prompts), charts


def names(run: Any) -> list[str]:
    folder = Path(run.options.saving.output_dir) / "sample"
    return sorted(re.sub(r"\d{14}", "TIME", path.name) for path in folder.glob("*.png"))


SMALL = prompt_of(num_steps=2, height=64)


def test_images_are_generated_when_due_and_sent_to_the_trackers(run: Any) -> None:
    previews, charts = previews_of(run, SMALL, prompt_of(num_steps=1, height=64, seed=None))
    for step in (1, 2, 3):
        previews.after_step(step, 1, Interruption())
    assert names(run) == ["000002_00_TIME_7.png", "000002_01_TIME.png"]
    assert charts.images == [(2, 1, [0, 1])]


def test_a_failing_image_is_reported_and_the_others_are_generated(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    previews, charts = previews_of(run, prompt_of(text="too large", width=1 << 22, height=1 << 22), SMALL)
    with caplog.at_level(logging.ERROR):
        previews.after_step(2, 1, Interruption())
    assert names(run) == ["000002_01_TIME_7.png"]
    assert charts.images == [(2, 1, [1])]
    (record,) = caplog.records
    assert "preview 0 (too large) failed, training continues" in record.message


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("out of memory")])
def test_any_failure_is_logged(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    previews, _ = previews_of(run, SMALL)
    monkeypatch.setattr("library.training.evaluation.preview.move_to_device", fail)
    with caplog.at_level(logging.ERROR):
        previews.after_step(2, 1, Interruption())
    assert str(error) in caplog.text and "training continues" in caplog.text
    assert run.context.network.module.training


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("SIGINT")])
def test_interrupts_are_not_swallowed(run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def stop(*_: Any) -> None:
        raise error

    previews, _ = previews_of(run, SMALL)
    monkeypatch.setattr("library.training.evaluation.preview.decode", stop)
    with pytest.raises(type(error)):
        previews.after_step(2, 1, Interruption())


def test_a_signal_is_handled_between_two_calls_of_the_denoiser(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interruption, num_calls = Interruption(), 0
    forward = run.context.models.denoiser.forward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            monkeypatch.setattr(interruption, "_signal", 15)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(run.context.models.denoiser, "forward", counted)
    previews, _ = previews_of(run, prompt_of(num_steps=10, scale=1.0), SMALL)
    assert not previews.after_step(2, 1, interruption)
    assert num_calls == 3
    assert names(run) == []


@pytest.mark.parametrize("result", ["complete", "incomplete"])
def test_a_process_that_does_not_draw_learns_whether_the_images_are_complete(run: Any, result: str) -> None:
    charts: Any = Charts()
    run.processes = Processes(1, 2, store=Board({"previews 000002": result}))
    previews = Previews(run, charts, [], is_drawing=True)
    assert previews.after_step(2, 1, Interruption()) == (result == "complete")


def test_non_finite_latents_are_an_error(run: Any) -> None:
    nn.init.constant_(run.context.models.denoiser.conv_out.bias, torch.inf)
    encoded = encode_prompts(run.context.arch, run.context.models.text_encoders, nullcontext, [SMALL])
    with torch.no_grad(), pytest.raises(ValueError, match="diverged"):
        draw_latents(run.context, SMALL, encoded, torch.Generator())


@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "changed"])
def test_a_reference_image_that_changes_during_the_run_is_an_error_that_names_it(
    run: Any, tmp_path: Path, is_gone: bool
) -> None:
    """By then a text encoder that sees images is unloaded; features are cached under a digest of the images."""
    cached = SimpleNamespace(sees_images=True)
    context: Any = SimpleNamespace(**{**vars(run.context), "arch": replace(run.context.arch, text_cache=cached)})
    path = tmp_path / "before.png"
    Image.new("RGB", (64, 64)).save(path)
    prompt = replace(SMALL, reference_paths=(path,))
    encoded = {text: {} for text in collect_texts([prompt], context.arch)}
    path.unlink() if is_gone else Image.new("RGB", (64, 64), "red").save(path)
    error = f"--ci {re.escape(str(path))} {'is gone' if is_gone else 'has changed'} since the run began.*--resume"
    with torch.no_grad(), pytest.raises(UserError, match=error):
        draw_latents(context, prompt, encoded, torch.Generator())


def test_a_non_finite_image_is_an_error_with_a_fix(run: Any) -> None:
    vae: Any = run.context.arch.load.vae()
    nn.init.constant_(vae.decoder.conv_out.bias, torch.nan)
    with torch.no_grad(), pytest.raises(ValueError, match="--no_half_vae"):
        decode(run.context, vae, torch.zeros(1, 4, 8, 8), VaeFallback())


def test_a_prompt_without_a_seed_has_the_same_noise_at_every_event(run: Any) -> None:
    previews, _ = previews_of(run, prompt_of(num_steps=1, height=64, seed=None))
    previews.before_training(Interruption())
    previews.after_step(2, 1, Interruption())
    previews.after_step(4, 1, Interruption())
    first, second = sorted((Path(run.options.saving.output_dir) / "sample").glob("*.png"))
    with Image.open(first) as a, Image.open(second) as b:
        assert a.tobytes() == b.tobytes()


def test_evaluation_has_no_side_effects(run: Any) -> None:
    run.context.models.denoiser.train()
    frozen = run.context.models.denoiser.down_blocks[0].eval()
    before = torch.random.get_rng_state(), random.getstate()
    with evaluating(run, "previews"):
        assert not torch.is_grad_enabled()
        assert not any(
            module.training for module in (*run.context.models.denoiser.modules(), run.context.network.module)
        )
        torch.rand(3), random.random()
        torch.manual_seed(3)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert run.context.models.denoiser.training and run.context.network.module.training and not frozen.training
    assert not run.context.models.text_encoders[0].training


def test_an_empty_prompt_file_generates_nothing(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# nothing\n")
    options = options_for(
        Path(run.options.model.pretrained_model_name_or_path), sample_every_n_steps=1, sample_prompts=str(path)
    )
    assert read_wanted_prompts(options.preview, run.context.arch) == []
    assert f"{path} holds no prompts" in caplog.text


def test_a_default_size_and_a_truncated_prompt_are_logged(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"a --w 64 --h 64\n{'cat ' * 80}--w 64\n")
    folder = Path(run.options.model.pretrained_model_name_or_path)
    options = options_for(folder, sample_at_first=True, sample_prompts=str(path))
    with caplog.at_level(logging.INFO):
        assert [(p.width, p.height) for p in read_wanted_prompts(options.preview, run.context.arch)] == [
            (64, 64),
            (64, 512),
        ]
    assert "1 of 2 preview prompts leave their size to the default, 512 x 512" in caplog.text
    assert "only the first 75 are used" in caplog.text
