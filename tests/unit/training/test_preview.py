"""Previews and prompt files: when they are generated, syntax, names, and how failures are handled."""

import json
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
from library.options.output.prompts import LINE_OPTIONS, PromptSpec, parse_line, read_prompts, walk_seeds
from library.options.output.saving import SavingOptions
from library.options.training.run import MAX_SEED
from library.processes.process_group import ALONE, Processes
from library.protocols import PromptDefaults
from library.training.evaluation.drawing import collect_texts, decode, draw_latents, encode_prompts
from library.training.evaluation.preview import Previews, PreviewSchedule, read_wanted_prompts
from library.training.evaluation.prompts import resolve
from library.training.evaluation.without_side_effects import evaluating
from library.training.failures.interruption import Interrupted, Interruption
from library.training.failures.vae_memory import VaeFallback
from library.training.offline.contact_sheet import wrap
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


# Prompt files: their syntax, and the errors for mistakes in them.

SD = PromptDefaults(num_steps=30, width=512, height=512, scale=7.5, size_step=8, sampler="ddim")
FLOW = PromptDefaults(num_steps=20, width=512, height=512, scale=1.0, size_step=16, guidance_scale=3.5, flow_shift=3.0)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as refused:
        read_prompts(path)
    return str(refused.value)


def test_a_line_has_its_prompt_and_its_options() -> None:
    line = (
        "a cat, on a mat --w 768 --H 512 --d 7 --s 25 --L 5.5 --g 3 --n blurry, a dog --ss k_euler --ctr 0.3 --rcfg 1 "
    )
    assert parse_line(line + "--fs 2.5", "p") == PromptSpec(
        "p", "a cat, on a mat", "blurry, a dog", 768, 512, 7, 25, 5.5, 3.0, "k_euler", 0.3, 1.0, 2.5
    )


def test_a_bare_prompt_uses_the_models_defaults() -> None:
    assert parse_line("  a cat\n", "p") == PromptSpec("p", "a cat")


@pytest.mark.parametrize("text", ["n dogs", "w 5", "s 3 cats", "a--n x", "d 1--w 3", "l"])
def test_text_that_looks_like_an_option_is_text(text: str) -> None:
    assert parse_line(text, "p") == PromptSpec("p", text)


def test_a_line_of_options_alone_is_an_empty_prompt() -> None:
    assert parse_line("--w 64", "p") == PromptSpec("p", "", width=64)


def test_an_empty_negative_prompt_is_allowed() -> None:
    assert parse_line("a --n ", "p").negative_prompt == "" == parse_line("a --n", "p").negative_prompt


def test_a_seed_of_minus_one_means_no_seed() -> None:
    assert parse_line("a --d -1", "p").seed is None
    assert parse_line("a --d 0", "p").seed == 0


def test_seeds_walk_by_the_number_of_a_prompt(tmp_path: Path) -> None:
    text = f"a --d 42\n\n# b\nc\nd --am -1,1 --d 42\ne --d {MAX_SEED}\n"
    specs = walk_seeds(read_prompts(written(tmp_path, "p.txt", text)))
    assert [spec.seed for spec in specs] == [42, None, 44, 44, 2]


def test_text_files_may_have_comments_blank_and_indented_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeff# a comment\n\n   a cat --d 1\r\n#\n\ta dog\n  # another\nкот 猫")
    assert [(w.prompt, w.place) for w in read_prompts(path, "--prompts")] == [
        ("a cat", f"--prompts {path}, line 3"),
        ("a dog", f"--prompts {path}, line 5"),
        ("кот 猫", f"--prompts {path}, line 7"),
    ]


def test_toml_files_have_shared_settings_and_a_table_per_image(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "p.TOML",
        '[prompt]\nwidth = 768\nscale = 5\nnegative_prompt = "dog"\n'
        '[[prompt.subset]]\nprompt = "a -- cat --w 3"\n[[prompt.subset]]\nprompt = "b"\nwidth = 64.0\nseed = 9\n',
    )
    first, second = read_prompts(path)
    assert (first.prompt, first.width, first.scale, first.negative_prompt) == ("a -- cat --w 3", 768, 5.0, "dog")
    assert (second.width, second.seed, second.scale) == (64, 9, 5.0)
    assert isinstance(second.width, int) and isinstance(second.scale, float)


def test_json_is_a_list_of_lines_and_objects(tmp_path: Path) -> None:
    path = written(tmp_path, "p.json", json.dumps(["a cat --w 64", {"prompt": "b", "sample_steps": 4, "seed": None}]))
    first, second = read_prompts(path)
    assert (first.prompt, first.width) == ("a cat", 64)
    assert (second.prompt, second.sample_steps, second.seed) == ("b", 4, None)


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_an_empty_file_holds_no_prompts(tmp_path: Path, name: str) -> None:
    assert read_prompts(written(tmp_path, name, "\n")) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --q 3", ["--q", "--w"]),
        ("a --steps 3", ["--steps", "--s"]),
        ("a --w512", ["--w512", "space before its value"]),
        ("a -- b", ["--", ".toml or .json"]),
        ("a --w wide", ["width (--w)", "'wide'", "whole number"]),
        ("a --w", ["width (--w)", "''"]),
        ("a --w 64.5", ["width (--w)", "whole number"]),
        ("a --w 0", ["width (--w)", "0", "1 to"]),
        ("a --w 9999999", ["width (--w)", "9999999"]),
        ("a --s 0", ["sample_steps (--s)", "1 to 1000"]),
        ("a --s 1001", ["sample_steps (--s)", "1 to 1000"]),
        ("a --d -2", ["seed (--d)", "-2"]),
        ("a --d 99999999999999999999", ["seed (--d)"]),
        ("a --l 7,5", ["scale (--l)", "'7,5'"]),
        ("a --l nan", ["scale (--l)", "nan"]),
        ("a --l inf", ["scale (--l)", "inf"]),
        ("a --fs 0", ["flow_shift (--fs)"]),
        ("a --ctr 1.5", ["cfg_trunc_ratio (--ctr)", "0 to 1"]),
        ("a --ss euler_b", ["sample_sampler (--ss)", "euler_b", "did you mean euler"]),
        ("a --w 64 --W 64", ["--W", "twice"]),
    ],
)
def test_errors_in_a_line_name_the_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = written(tmp_path, "p.txt", f"a good one --w 64\n\n{line}\n")
    message = refusal_of(path)
    assert message.startswith(f"--sample_prompts {path}, line 3")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '[{"prompt": "a", "hight": 3}]', ["entry 1", "hight", "did you mean height"]),
        ("p.json", '["a", {"width": 3}]', ["entry 2", '"prompt"']),
        ("p.json", '[{"prompt": "a", "width": true}]', ["entry 1", "width", "True"]),
        ("p.json", '[{"prompt": "a", "scale": "7"}]', ["entry 1", "scale", "'7'"]),
        ("p.json", '[{"prompt": ["a"]}]', ["entry 1", "prompt", "text"]),
        ("p.json", '[{"prompt": "a", "sample_sampler": 3}]', ["entry 1", "sample_sampler"]),
        ("p.json", '[{"prompt": "a", "sample_sampler": ["ddim"]}]', ["entry 1", "sample_sampler"]),
        ("p.json", "[3]", ["entry 1", "3"]),
        ("p.json", '{"prompt": "a"}', ["must be a list"]),
        ("p.json", '["a",\n oops]', ["not valid JSON", "line 2"]),
        ("p.json", "[" * 100000, ["not valid JSON"]),
        ("p.toml", 'prompt = "a"', ["[prompt]", "[[prompt.subset]]"]),
        ("p.toml", "[promt]\n", ["[prompt]", "[[prompt.subset]]"]),
        ("p.toml", '[prompt]\nprompt = "a"\n', ["[[prompt.subset]]"]),
        ("p.toml", "[prompt]\nsubset = [3]\n", ["number 1", "3"]),
        ("p.toml", "[prompt]\nwidth = \n", ["not valid TOML", "line 2"]),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwith = 3\n', ["number 1", "with ", "width"]),
        ("p.txt", b"caf\xe9", ["not UTF-8", "byte 3"]),
        ("p.csv", "a", [".txt"]),
        ("p", "a", [".txt"]),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    path = written(tmp_path, name, content)
    message = refusal_of(path)
    assert message.startswith("--sample_prompts") and str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refusal_of(tmp_path / name)
    (tmp_path / name).mkdir()
    assert str(tmp_path / name) in refusal_of(tmp_path / name)


def test_unset_prompt_options_come_from_the_model() -> None:
    prompt = resolve(PromptSpec("p", "a", seed=3), SD)
    assert (prompt.text, prompt.negative, prompt.seed, prompt.sampler) == ("a", "", 3, "ddim")
    assert (prompt.width, prompt.height, prompt.num_steps, prompt.scale) == (512, 512, 30, 7.5)
    assert prompt.guidance_scale is None
    flow = resolve(PromptSpec("p", "a", guidance_scale=0.0, scale=0.0), FLOW)
    assert (flow.guidance_scale, flow.scale, flow.flow_shift, flow.sampler) == (0.0, 0.0, 3.0, None)


@pytest.mark.parametrize(("requested", "sd", "flow"), [(64, 64, 64), (1, 64, 64), (509, 504, 496), (1024, 1024, 1024)])
def test_sides_are_rounded_down_to_sizes_that_the_model_supports(requested: int, sd: int, flow: int) -> None:
    assert resolve(PromptSpec("p", "a", width=requested), SD).width == sd
    assert resolve(PromptSpec("p", "a", height=requested), FLOW).height == flow


@pytest.mark.parametrize(
    ("line", "defaults", "flag"), [("a --g 3", SD, "--g"), ("a --fs 3", SD, "--fs"), ("a --ss euler", FLOW, "--ss")]
)
def test_a_setting_that_the_model_does_not_support_is_warned_about(
    caplog: pytest.LogCaptureFixture, line: str, defaults: PromptDefaults, flag: str
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(parse_line(line, "p.txt, line 4"), defaults)
    (record,) = caplog.records
    assert "p.txt, line 4" in record.message and flag in record.message and "no effect" in record.message


@pytest.mark.parametrize(
    ("line", "defaults", "num_warnings"),
    [("a --n blurry", FLOW, 1), ("a --n blurry --l 1", SD, 1), ("a --n blurry --l 4", FLOW, 0), ("a --n", FLOW, 0)],
)
def test_a_negative_prompt_without_guidance_is_warned_about(
    caplog: pytest.LogCaptureFixture, line: str, defaults: PromptDefaults, num_warnings: int
) -> None:
    resolve(parse_line(line, "p.txt, line 4"), defaults)
    assert len(caplog.messages) == num_warnings
    assert all("p.txt, line 4: negative_prompt (--n) has no effect at scale (--l) 1" in m for m in caplog.messages)


def test_a_controlnet_image_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = parse_line("a cat --cn my poses/pose.png --w 64", "p.txt, line 4")
    prompt = resolve(spec, SD)
    assert (prompt.text, prompt.width) == ("a cat", 64)
    assert caplog.messages == [
        "p.txt, line 4: controlnet_image (--cn) is ignored, because no ControlNet is loaded in adapter training"
    ]


def test_every_option_of_a_line_is_also_a_key(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "negative_prompt": "x", "sample_sampler": "ddim", "cfg_trunc_ratio": 0.5, "image_path": "my cat.png",
        "controlnet_image": "my pose.png", "control_image_path": ["before.png", "style.png"],
    }  # fmt: skip
    keys = list(LINE_OPTIONS.values())
    path = written(tmp_path, "p.json", json.dumps([{"prompt": "a", **{key: values.get(key, 8) for key in keys}}]))
    (spec,) = read_prompts(path)
    assert all(getattr(spec, key) == values.get(key, 8) for key in keys if key != "control_image_path")
    assert spec.control_image_path == ("before.png", "style.png")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("--w 256 a cat that sits", "a cat that sits"),
        ("a cat --w 256 in the snow", "a cat in the snow"),
        ("a cat --w 256 in --s 4 the snow", "a cat in the snow"),
    ],
)
def test_words_after_a_number_belong_to_the_prompt(line: str, prompt: str) -> None:
    spec = parse_line(line, "here")
    assert (spec.prompt, spec.width) == (prompt, 256)


def test_a_negative_prompt_and_a_path_take_all_words_up_to_the_next_option() -> None:
    spec = parse_line("a cat --n dark and blurry --w 256 --i my pictures/cat.png", "here")
    assert (spec.prompt, spec.negative_prompt) == ("a cat", "dark and blurry")
    assert spec.image_path == "my pictures/cat.png"


def test_reference_images_can_be_given_in_a_line_and_in_a_table(tmp_path: Path) -> None:
    first, second = tmp_path / "a b.png", tmp_path / "c.png"
    for path in (first, second):
        path.write_bytes(b"x")
    spec = parse_line(f"make it red --ci {first} --w 64 --ci {second} --s 3", "p.txt, line 1")
    assert spec.control_image_path == (str(first), str(second)) and spec.sample_steps == 3
    assert resolve(spec, FLOW, max_references=2).reference_paths == (first, second)
    (table,) = read_prompts(
        written(tmp_path, "p.json", json.dumps([{"prompt": "a", "control_image_path": str(first)}]))
    )
    assert resolve(table, FLOW, max_references=1).reference_paths == (first,)


def test_invalid_reference_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = parse_line(f"a --ci {tmp_path / 'nowhere.png'}", "p.txt, line 1")
    with pytest.raises(UserError, match=r"control_image_path \(--ci\) is .*nowhere.png, but there is no such file"):
        resolve(spec, FLOW, max_references=1)
    with pytest.raises(UserError, match=r"\(--ci\) names 2 images, but this base model takes at most 1"):
        resolve(parse_line("a --ci x.png --ci y.png", "p"), FLOW, max_references=1)
    assert resolve(spec, FLOW).reference_paths == ()
    assert "control_image_path (--ci) has no effect on this base model" in caplog.text
    for value in (3, ["a.png", 3]):
        with pytest.raises(UserError, match=r"control_image_path .* is .*, but must be the path of an image, or a l"):
            read_prompts(written(tmp_path, "p.json", json.dumps([{"prompt": "a", "control_image_path": value}])))


# Labels of contact sheets break at words.


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat on a sofa", ["a cat on a", "sofa"]),
        ("1: mycat,\na  cat", ["1: mycat,", "a cat"]),
        ("of an_overlong_name here", ["of", "an_overlon", "g_name", "here"]),
        ("", [""]),
    ],
)
def test_lines_end_at_words_unless_a_word_is_too_long(text: str, lines: list[str]) -> None:
    assert wrap(text, lambda line: len(line) <= 10) == lines
