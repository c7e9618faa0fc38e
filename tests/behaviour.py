"""Record of short runs of every script, to prove that a refactoring changed no behaviour.

    python -m tests.behaviour record before.json     # at the commit before the change
    python -m tests.behaviour compare before.json    # after it; exits with 1 if anything differs

Every case is a command line on a tiny model, run through the script's own file with one thread and a fixed clock and
session id. The record has the exit status, the exact losses, the lines on the screen (without times and paths) and a
digest of every written file. `--only WORD` selects the cases whose name contains the word.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import logging
import os
import re
import runpy
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums of several threads depend on their number

from tests.running import ROOT, make_images
from tests.tiny.bases import BASES

FIXED_TIME = 1_700_000_000.0
TRAINING = [
    "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_name", "mine",
    "--network_dim", "4", "--network_alpha", "2", "--learning_rate", "1e-3", "--seed", "5",
    "--max_data_loader_n_workers", "0", "--max_train_steps", "3",
]  # fmt: skip
RANDOM = ["--shuffle_caption", "--caption_dropout_rate", "0.2", "--random_crop", "--flip_aug", "--noise_offset", "0.05"]
RUNS: Mapping[str, list[str]] = {
    "everything": [
        "--shuffle_caption", "--caption_dropout_rate", "0.2", "--caption_tag_dropout_rate", "0.2", "--random_crop",
        "--flip_aug", "--network_dropout", "0.1", "--gradient_accumulation_steps", "2", "--validation_split", "0.3",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--sample_every_n_steps", "2", "--save_state",
        "--save_every_n_steps", "2",
    ],
    "lora": ["--network_args", "rank_dropout=0.1", "module_dropout=0.1", "loraplus_lr_ratio=4", *RANDOM],
    "dora": ["--network_args", "dora_wd=True", "use_scalar=True", "--scale_weight_norms", "0.01"],
    "dylora": ["--network_module", "networks.dylora", "--network_args", "unit=2"],
    "lora_fa": ["--network_module", "networks.lora_fa", "--network_args", "rank_dropout=0.1"],
    "bf16": [
        "--mixed_precision", "bf16", "--save_precision", "bf16", "--gradient_checkpointing",
        "--network_train_unet_only",
    ],
    "fp8": ["--mixed_precision", "bf16", "--fp8_base", "--gradient_checkpointing", "--network_args", "dora_wd=True"],
    "cached": ["--cache_latents_to_disk", "--network_train_unet_only", "--optimizer_type", "Lion"],
}  # fmt: skip
TOOLS: Mapping[str, list[str]] = {  # run on a training's adapter {mine}; output goes to {out}
    "show_metadata": ["tools/show_metadata.py", "{mine}"],
    "check": ["tools/check_lora_weights.py", "{mine}"],
    "resize": [
        "networks/resize_lora.py", "--model", "{mine}", "--save_to", "{out}/small.safetensors", "--new_rank", "2",
    ],
    "merge": [
        "networks/svd_merge_lora.py", "--models", "{mine}", "{mine}", "--ratios", "0.5", "0.7", "--new_rank", "3",
        "--save_to", "{out}/merged.safetensors",
    ],
    "cut": [
        "networks/extract_lora_from_dylora.py", "--model", "{mine}", "--save_to", "{out}/cut.safetensors",
        "--unit", "2",
    ],
}  # fmt: skip
TOOLS_AFTER = {"lora": ["show_metadata", "check", "resize", "merge"], "dylora": ["cut"], "dora": ["check", "merge"]}


@dataclass(frozen=True)
class Seen:
    """The result of one command."""

    status: int
    losses: dict[str, str]  # exact (float.hex), by batch number
    files: dict[str, str]
    said: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    if args.what == "record":
        args.file.write_text(
            json.dumps({name: asdict(result) for name, result in cases(args.only)}, indent=1, sort_keys=True)
        )
        return 0
    before = json.loads(args.file.read_text())
    differences = [
        line for name, result in cases(args.only) for line in compare_results(name, before.get(name), asdict(result))
    ]
    print("\n".join(differences) if differences else "no difference")
    return int(bool(differences))


def compare_results(name: str, before: dict[str, Any] | None, after: dict[str, Any]) -> Iterator[str]:
    """Yield the differences between two results of a case."""
    if before is None:
        yield f"{name}: was not recorded"
        return
    for part in ("status", "losses", "said"):
        if before[part] != after[part]:
            lines = difflib.unified_diff(
                *(lines_to_compare(result[part]) for result in (before, after)), lineterm="", n=0
            )
            yield "\n  ".join([f"{name}: {part}:", *list(lines)[2:]])
    for path in sorted({*before["files"], *after["files"]}):
        if before["files"].get(path) != after["files"].get(path):
            yield f"{name}: {path}: {before['files'].get(path)} is {after['files'].get(path)}"


def lines_to_compare(part: Any) -> list[str]:
    return part if isinstance(part, list) else json.dumps(part, indent=1, sort_keys=True).splitlines()


def cases(only: str) -> Iterator[tuple[str, Seen]]:
    """Run the cases whose name contains `only`, and yield each name and result."""
    for base in BASES:
        runs = {**RUNS, **BASES[base].runs}
        wanted = {case: words for case, words in runs.items() if only in f"{base}/{case}"}
        if not wanted:
            continue
        folder = Path(tempfile.gettempdir()) / "lora_behaviour"  # constant, because files record where they came from
        shutil.rmtree(folder, ignore_errors=True)
        model = BASES[base].build(folder / "model")
        for case, words in wanted.items():
            print(f"{base}/{case}", file=sys.stderr)
            yield from train(base, case, words, model, folder / case)
        shutil.rmtree(folder)


def train(base: str, case: str, words: Sequence[str], model: list[str], folder: Path) -> Iterator[tuple[str, Seen]]:
    """Run one training, repeat or resume it if it caches or saves states, and run the tools on its adapter."""
    make_images(folder / "data" / "1_thing", 7, seed=61)
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    for path in folder.parent.rglob("*"):
        if path.is_file():
            os.utime(path, (FIXED_TIME, FIXED_TIME))  # caches record the time of their images
    script, out = f"{BASES[base].script}.py", folder / "out"
    command = [
        *model, *TRAINING, "--train_data_dir", str(folder / "data"), "--output_dir", str(out), "--sample_prompts",
        str(folder / "prompts.txt"), "--network_module", BASES[base].module, "--logging_dir",
        str(folder / "logs"), *words,
    ]  # fmt: skip
    name = f"{base}/{case}"
    yield name, run(script, command, folder)
    if "to_disk" in " ".join(words):
        yield f"{name} again", run(script, command, folder)
    if (state := out / "mine-step00000002-state").exists():
        yield f"{name} resumed", run(script, [*command, "--resume", str(state)], folder)
    for tool in TOOLS_AFTER.get(case, []):
        path, *rest = TOOLS[tool]
        filled = [word.format(mine=out / "mine.safetensors", out=out) for word in rest]
        yield f"{name} {tool}", run(path, filled, folder)


def run(script: str, arguments: Sequence[str], folder: Path) -> Seen:
    """Run a script's file in this process as `python script …` does, with everything that varies between runs fixed."""
    shutil.rmtree(folder / "logs", ignore_errors=True)
    screen = io.StringIO()
    with fresh_process(script, arguments), contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return Seen(status, losses_of(folder / "logs"), digests_of(folder), lines_of(screen.getvalue(), folder))


@contextlib.contextmanager
def fresh_process(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Set the command line, and fix the clock and session ids; restore the state of the process afterwards."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    logger = logging.getLogger()
    previous = sys.argv, time.time, secrets.randbelow, list(logger.handlers), logger.level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [str(ROOT / script), *arguments]
    time.time = lambda: FIXED_TIME  # type: ignore[assignment]
    secrets.randbelow = lambda limit: 7 % limit  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.argv, time.time, secrets.randbelow, logger.handlers[:], level = previous  # type: ignore[misc]
        logger.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def losses_of(logs: Path) -> dict[str, str]:
    """Return the exact loss of each batch, from the TensorBoard charts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[str, str] = {}
    for file in sorted(logs.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith("loss/"):
                for place, event in enumerate(events.Scalars(tag)):
                    losses[f"{tag} {place} at {event.step}"] = float(event.value).hex()
    return losses


def digests_of(folder: Path) -> dict[str, str]:
    """Return a digest of each written file, except charts and reports, which contain times."""
    inputs = {folder / "prompts.txt", *(folder / "data").rglob("*.png"), *(folder / "data").rglob("*.txt")}
    digests = {}
    for path in folder.rglob("*"):
        is_timed = path.is_relative_to(folder / "logs") or path.name.endswith("-report.html")
        if path.is_file() and path not in inputs and not is_timed:
            name = re.sub(r"\d{14}", "#", str(path.relative_to(folder)))  # names of previews contain the time
            digests[name] = hashlib.sha256(content_of(path)).hexdigest()
    return digests


def content_of(path: Path) -> bytes:
    """Return a file's bytes; for safetensors without the date and commits in its metadata."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    start = 8 + int.from_bytes(content[:8], "little")
    header = {"__metadata__": {}, **json.loads(content[8:start])}
    for key in ("modelspec.date", "modelspec.implementation_version", "ss_sd_scripts_commit_hash"):
        header["__metadata__"].pop(key, None)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # their order in the file varies
    return json.dumps(header).encode() + content[start:]


def lines_of(text: str, folder: Path) -> list[str]:
    """Return the screen's lines without progress bars; times and paths are replaced."""
    text = re.sub(r"\x1b\[[A-Z]", "", text.replace(str(folder.parent), "FOLDER").replace(str(ROOT), "ROOT"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    kept_lines = [line for line in lines if line and not re.search(r"\d+%\||it/s|s/it", line)]
    varying = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\d+(\.\d+)? ?(s|ms|min)\b|\d{14}|\b[0-9a-f]{40}\b|(?<=\+)[0-9a-f]{12}\b"
    # Its breakdown varies.
    return [re.sub(r"(a step took #).*", r"\1", re.sub(varying, "#", line)) for line in kept_lines]


if __name__ == "__main__":
    raise SystemExit(main())
