"""Count a usual training of every base model, for tools/plan_memory.py --cards and a table of benchmarks/RESULTS.md.

Nothing is measured and no weights are read: the base models are files that contain only a header. Takes about four
minutes.

    python -m benchmarks plan_models
    python -m benchmarks plan_models --models FLUX.1 --cards "RTX 3060 12GB" 24GB
    python -m benchmarks plan_models --models FLUX.1 --cards 24GB --longer_with="--guidance_loss 3"
    python -m benchmarks plan_models --write
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.results_page import PAGE, put_into
from benchmarks.runner import measurement
from library.architectures.specs import recognise_base_model
from library.base.command_parser import make_parser
from library.base.formatting import format_gib
from library.commands.counted_plan import count
from library.memory.planner.choice import Allowed
from library.memory.planner.gpus import LINUX, TYPICAL, Gpu, parse_cards
from library.memory.planner.known import FILE, KnownFormat, KnownMode, KnownModel, load_models, plan
from library.memory.planner.prediction import CountedStep, MemoryMode, apply_mode, pass_work, predict
from library.memory.planner.weights import StorageCost
from library.options.config_file import read_toml
from library.options.model import BASE_FLAG
from library.training.command_line.recipes import FOLDER, list_recipes
from library.training.planning.settings import describe
from tests.contracts.header_only import FULL_SIZE, FullSize
from tools.plan_memory import SYSTEM_BYTES

CARDS = ("8GB", "12GB", "16GB", "24GB")
FORMATS = ("bf16", "int8_rotated", "int8", "nf4")
RANK = 16
CACHES_TEXT = {"train_network"}  # scripts that cannot cache text encoder outputs
MIB = 2**20
MAIN_MEMORY_BYTES = 32 * 2**30 - SYSTEM_BYTES


def arguments_for(model: FullSize, folder: Path) -> list[str]:
    """Return the options of a usual training: batch 1, rank 16, bf16, denoiser only, everything cached."""
    caches = [] if model.script in CACHES_TEXT else ["--cache_text_encoder_outputs"]
    return [
        *model.build(folder), "--network_module", model.module, "--network_dim", str(RANK), "--mixed_precision", "bf16",
        "--network_train_unet_only", "--cache_latents", "--resolution", str(model.side), *caches,
    ]  # fmt: skip


def count_model(title: str) -> KnownModel:
    """Count the operations and memory of a usual training of a base model."""
    model = FULL_SIZE[title]
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        arguments = arguments_for(model, Path(folder) / "model")
        step, unfused = (count(model.script, arguments, is_fused)[1].step for is_fused in (True, False))
        disk = sum(map(size_of_data, Path(folder).rglob("*.safetensors")))
        spec = recognise_base_model(BASE_FLAG, arguments[arguments.index(BASE_FLAG) + 1])
        print(f"{title}: {time.process_time() - began:.1f} CPU seconds", file=sys.stderr)
    modes = [replace(mode, weight_format=None) for mode in Allowed().modes()]
    known_modes = [known_mode(step, mode) for mode in modes]
    unfused_modes = [known_mode(unfused, mode) for mode in modes]
    return KnownModel(
        title,
        spec.name,
        model.side,
        num_passes(model, arguments),
        disk // MIB,
        [known_format(step, name) for name in FORMATS],
        known_modes,
        [] if unfused_modes == known_modes else unfused_modes,
    )


def size_of_data(path: Path) -> int:
    """Return the bytes that a file of this header has with its weights."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def num_passes(model: FullSize, arguments: Sequence[str]) -> int:
    """Return the passes of the first recipe for this model."""
    for recipe in list_recipes():
        values: Mapping[str, Any] = {
            key: value
            for table in read_toml(FOLDER / f"{recipe.name}.toml", "--recipe").values()
            for key, value in table.items()
        }
        kind = values.get("model_type")
        if recipe.script == f"{model.script}.py" and (kind is None or kind in arguments) == (kind != "chroma"):
            return int(values["max_train_steps"]) * int(values.get("gradient_accumulation_steps", 1))
    return 0


def known_format(step: CountedStep, name: str) -> KnownFormat:
    cost, counts = StorageCost.of(name), range(step.most_offloaded + 1)
    predicted = [predict(step, MemoryMode(name, num_offloaded=number), TYPICAL[0]) for number in counts]
    blocks = max(1, len(step.weights.blocks))
    return KnownFormat(
        name,
        cost.error,
        cost.slowdown,
        [p.weight_bytes // MIB for p in predicted],
        [p.host_bytes // MIB for p in predicted],
        [round(len(step.offloaded_indices(number)) / blocks, 4) for number in counts],
    )


def known_mode(step: CountedStep, mode: MemoryMode) -> KnownMode:
    forward, backward = pass_work(apply_mode(step, mode))
    predicted = {name: predict(step, replace(mode, weight_format=name), TYPICAL[0]) for name in FORMATS}
    return KnownMode(
        "" if describe(mode) == "plain" else describe(mode),
        mode.complexity,
        forward,
        backward,
        predicted[FORMATS[0]].host_bytes // MIB,
        {name: (p.device_bytes - p.weight_bytes) // MIB for name, p in predicted.items()},
    )


def to_json(models: Sequence[KnownModel]) -> str:
    """Return the content of the data file: a line per model."""
    entries = [asdict(model) for model in models]
    for entry in entries:
        for mode in [*entry["modes"], *entry["unfused_modes"]]:
            for side in ("forward", "backward"):
                mode[side] = list(mode[side].values())
    return "[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries) + "\n]\n"


def table(models: Sequence[KnownModel], gpus: Mapping[str, Gpu]) -> Iterator[str]:
    """Yield the Markdown lines: one row per model, with the size of its files and one column per GPU."""
    yield f"| base model | files | {' | '.join(gpus)} |"
    yield f"|---|---|{'---|' * len(gpus)}"
    for model in models:
        cells = [format_gib(model.disk_mib * MIB), *(cell(model, gpu) for gpu in gpus.values())]
        yield f"| {model.title}, {model.side} px | {' | '.join(cells)} |"


def work_lines(models: Sequence[KnownModel]) -> Iterator[str]:
    """Yield lines with the memory traffic and kernels of one pass, plain and recomputed."""
    for model in models:
        for mode in model.modes:
            if mode.options in ("", "--gradient_checkpointing"):
                work = mode.forward + mode.backward
                name = mode.options or "plain"
                yield f"{model.title}, {name}: {work.moved / 1e9:.0f} GB, {work.launches:,} kernels"


def longer_lines(title: str, words: Sequence[str], gpus: Mapping[str, Gpu]) -> Iterator[str]:
    """Yield lines with the times of a step without and with more options of a training, plain and recomputed."""
    model = FULL_SIZE[title]
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_for(model, Path(folder))
        steps = [count(model.script, [*arguments, *more])[1].step for more in ((), words)]
    for card, gpu in gpus.items():
        for mode in (MemoryMode(), MemoryMode(recompute_every=1)):
            before, after = (predict(step, mode, gpu).seconds for step in steps)
            times = f"{before:.2f} s, with {' '.join(words)} {after:.2f} s, {after / before:.2f} times"
            yield f"{title}, {model.side} px, {describe(mode)}, {card}: {times}"


def gpus_of(cards: Sequence[str]) -> dict[str, Gpu]:
    """Return the GPU of each name or size, in a machine with the usual main memory."""
    return {card: replace(parse_cards(card)[0], main_memory_bytes=MAIN_MEMORY_BYTES) for card in cards}


def cell(model: KnownModel, gpu: Gpu) -> str:
    """Return the table cell of one GPU: the chosen settings, or the memory that the model needs at least."""
    found = plan(model, gpu, LINUX)
    if found.chosen is None:
        return f"needs {format_gib(found.least_bytes)}"
    return f"{format_gib(found.chosen.device_bytes)}, {found.chosen.seconds:.2f} s: `{found.chosen.options}`"


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(FULL_SIZE), choices=list(FULL_SIZE))
    parser.add_argument("--cards", nargs="+", default=CARDS)
    parser.add_argument("--write", action="store_true", help="write the counts, and the table of the page")
    parser.add_argument(
        "--longer_with", type=str.split, help="options of a training, in quotes: print how much longer a step takes"
    )
    return parser


def count_models(args: argparse.Namespace) -> None:
    if args.longer_with:
        for title in args.models:
            print("\n".join(longer_lines(title, args.longer_with, gpus_of(args.cards))))
        return
    models = [count_model(title) for title in args.models]
    if args.write:
        kept = {} if set(args.models) == set(FULL_SIZE) else {model.title: model for model in load_models()}
        kept |= {model.title: model for model in models}
        models = [kept[title] for title in FULL_SIZE if title in kept]
        FILE.write_text(to_json(models), encoding="utf-8")
    lines = list(table(models, gpus_of(args.cards)))
    if args.write:
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), "plan_models", lines), encoding="utf-8")
    print("\n".join([*lines, "", *work_lines(models)]))


main = measurement(setup_parser, count_models)
