"""Made-up lines of --log_events, for pages that are tested without a training."""

import base64
import random
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from library.training.reporting import events
from library.training.reporting.event_stream import plain
from library.training.reporting.events import Event

EVIL = "</script><img src=x onerror=\"document.title='pwned'\"><!-- ' & \u2028 猫"
STARTED = 1_800_000_000.0


def thumbnail(red: int) -> str:
    """Return a small image of one colour as a data URL."""
    content = BytesIO()
    Image.new("RGB", (32, 48), (red % 256, 90, 200)).save(content, format="WEBP")
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def lines_of(emitted: Sequence[Event] | Iterator[Event], started: float = STARTED) -> list[dict[str, Any]]:
    """Return events as lines, one second apart."""
    return [plain(event.as_line(started + second)) for second, event in enumerate(emitted)]


def start(name: str = "cat", **options: Any) -> events.Start:
    command = ["--output_name", name, "--training_comment", EVIL]
    return events.Start(command, {"output_name": name, **options}, {"python": "3.12", "torch": "2.9"})


def audit(source: str = "pictures") -> events.Audit:
    subset = {"source": source, "num_pictures": 9, "num_repeats": 2, "is_reg": False, "num_without_caption": 1}
    buckets = [
        {"width": width, "height": height, "num_draws": 6, "num_batches": 3}
        for width, height in ((512, 768), (640, 640), (1024, 384))
    ]
    dataset = {"resolution": [640, 640], "batch_size": 2, "subsets": [subset], "buckets": buckets}
    lengths = {"unit": "tokens", "most": 75, "counts": [[5, 2], [9, 4], [300, 3]]}
    dropped = [{"file": f"{source}/{EVIL}.png", "reason": "it is damaged"}]
    return events.Audit([dataset], dropped, 1, lengths, [["cat", 7], [EVIL, 2]])


def plan(max_train_steps: int, first_step: int = 0) -> events.TrainingPlan:
    return events.TrainingPlan(
        base_model="sd", network="networks.lora", num_trained=1_600_000, seed=1, first_step=first_step,
        resumed_from="out/cat-state" if first_step else None, max_train_steps=max_train_steps, num_epochs=10,
        steps_per_epoch=max(1, max_train_steps // 10), batch_sizes=[2], accumulation=1,
        pictures={"train": 18, "validation": 3, "reg": 0}, num_processes=1, device="Some Card", peak_flops=1e14,
        planned=events.Planned(8 * 2**30, 7 * 2**30, 0.19),
    )  # fmt: skip


def step(number: int, rng: random.Random, loss: float | None = None) -> events.Step:
    seconds, is_tenth = 0.2 + 0.02 * rng.random(), number % 10 == 1
    groups = ("unet", "textencoder")
    norms = {name: events.Norms(1 + number / 1e5, rng.random()) for name in groups} if is_tenth else None
    parts = {"forward": seconds * 0.4, "backward": seconds * 0.5, "optimizer": seconds * 0.02}
    return events.Step(
        step=number, epoch=1 + number // 1000, loss=0.1 + 0.05 * rng.random() if loss is None else loss, average=0.12,
        learning_rates={"unet": 1e-4, "textencoder": 5e-5}, gradient_norm=rng.random(),
        timing=events.Timing(number - 1, seconds, parts, 2 / seconds, 40.0, 0.4), norms=norms,
        memory=events.Memory(6_000_000_000, 7_000_000_000, 7_500_000_000, 4_000_000_000) if is_tenth else None,
    )  # fmt: skip


def validation(number: int, loss: float, best: tuple[int, float]) -> events.Validation:
    levels = [events.Level(level, loss * level / 500, 0.01) for level in (200, 400, 600, 800)]
    compared = events.Compared(0, loss - 0.2, 0.002, True) if number else None
    return events.Validation(number, loss, 0.015, levels, 3, compared, *best, None)


def preview(number: int, index: int, prompt: str) -> events.Preview:
    return events.Preview(number, 1, index, prompt, 7, 512, 768, f"out/{number}_{index}.png", thumbnail(number + index))


def saved(number: int, reason: events.SavedFor = "step", name: str | None = None) -> events.Saved:
    file = name or f"out/cat-step{number:08}.safetensors"
    return events.Saved("weights", reason, number, 1, file, 9_400_000)


def choice(steps: Sequence[int]) -> events.FileChoice:
    """Return a choice that suggests the last of the files, whose images are the sharpest."""
    files = [(None, 0), *((f"out/cat-step{step:08}.safetensors", step) for step in steps)]
    candidates = [
        events.Candidate(
            file,
            step,
            0.1 + gap,
            0.09 + gap,
            0.11 + gap,
            gap,
            0.9 * gap,
            1.1 * gap,
            gap > 0,
            scores={"sharpness": events.Score(70 - gap, -gap, -1.5 * gap, -0.5 * gap)},
        )
        for (file, step), gap in zip(files, (0.02 * (len(steps) - i) for i in range(len(files))), strict=True)
    ]
    return events.FileChoice(files[-1][0], steps[-1], True, f"the others are worse {EVIL}", 9, 0.95, candidates)


def whole_run(num_steps: int, name: str = "cat", seed: int = 0) -> Iterator[events.Event]:
    """Yield a complete run: ten validations with previews and saved files, and texts that attempt script injection."""
    rng = random.Random(seed)
    yield start(name, learning_rate=1e-4 * (seed + 1), train_data_dir=EVIL)
    yield events.Warned("warning", "library.somewhere", EVIL)
    yield audit(EVIL)
    yield events.StageProgress("loading", "begin")
    yield events.StageProgress("loading", "end")
    yield plan(num_steps)
    best = (0, 0.2)
    yield validation(0, 0.2, best)
    for number in range(1, num_steps + 1):
        yield step(number, rng)
        if number % max(1, num_steps // 10) == 0:
            loss = 0.2 - 0.01 * (number * 10 // num_steps) + 0.02 * rng.random()
            best = min(best, (number, loss), key=lambda pair: pair[1])
            yield validation(number, loss, best)
            for index, prompt in enumerate(("a cat", EVIL, "a dog")):
                yield preview(number, index, prompt)
            scores = {"sharpness": [rng.random() for _ in range(3)], EVIL: [0.0, float("nan"), 1.0]}
            yield events.Scores(number, 1, scores)
            yield saved(number)
    yield choice((num_steps // 10, num_steps // 5))
    yield saved(num_steps, "end", f"out/{EVIL}.safetensors")
    yield events.End("finished", num_steps, 60.0, None, "a step took 0.2 s", f"out/{name}.safetensors")
