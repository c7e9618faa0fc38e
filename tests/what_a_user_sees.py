"""Record of what a user sees of every base model, to prove that moving code between its files changed nothing.

    python -m tests.what_a_user_sees record before.json     # at the commit before the change
    python -m tests.what_a_user_sees compare before.json    # after it; exits with 1 if anything differs

The record has the help and options of the script and its caching commands, the spec, and, for tiny models in every
layout and release: metadata, messages, preview settings, noise levels, cache settings and fingerprints.
"""

import argparse
import importlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from library.protocols import Architecture
from tests.running import ROOT
from tests.tiny.base import Base
from tests.tiny.bases import BASES


class Kept(logging.Handler):
    """The messages that are logged, with their level."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(BASES), default=list(BASES))
    args = parser.parse_args()
    seen = json.loads(json.dumps({name: describe_base(BASES[name]) for name in args.only}))
    if args.what == "record":
        args.file.write_text(json.dumps(seen, indent=1, sort_keys=True))
        return 0
    before = {name: value for name, value in json.loads(args.file.read_text()).items() if name in args.only}
    differences = list(compare(before, seen))
    print("\n".join(differences) or "no difference")
    return int(bool(differences))


def describe_base(base: Base) -> dict[str, Any]:
    """Describe a script, its caching commands, its spec, and tiny models of every layout and release."""
    parser = importlib.import_module(base.script).setup_parser()
    commands = sorted(ROOT.glob(f"src/musubi_tuner/{base.package}_cache_*.py"))
    options = base.spec.options
    return {
        "help": parser.format_help(),
        "facts": to_plain(options.declarations()),
        "defaults": to_plain(options.defaults()),
        "spec": {key: value for key, value in to_plain(base.spec).items() if key != "options"},
        **{
            path.stem: importlib.import_module(f"src.musubi_tuner.{path.stem}").setup_parser().format_help()
            for path in commands
        },
        **{title: describe_model(base, parser, build, words) for title, build, words in models_of(base)},
    }


def models_of(base: Base) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield titles, functions that write a model into a folder, and more options."""
    yield "model", base.build, ()
    yield from ((" ".join(words), base.build, words) for words in base.releases)
    for layout in ("whole", "diffusers") if base.dit is not None else ():
        yield layout, partial(base.dit.build, seed=3, layout=layout), ()  # type: ignore[union-attr]


def describe_model(base: Base, parser: argparse.ArgumentParser, build: Any, words: tuple[str, ...]) -> dict[str, Any]:
    """Describe an assembled model, or the error of assembling it, and what was logged."""
    kept, logger = Kept(), logging.getLogger()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = base.spec.options.from_args(parser.parse_args([*build(Path(folder)), *words]))
            described = describe_architecture(base.spec.build(options), None if base.is_flow else "ddim")
        except ValueError as error:  # of the user, in a release that the tiny model is not
            described = {"error": f"{type(error).__name__}: {error}".replace(folder, "FOLDER")}
        finally:
            logger.removeHandler(kept)
            logger.setLevel(level)
        return {**described, "log": [line.replace(folder, "FOLDER") for line in kept.lines]}


def describe_architecture(arch: Architecture, sampler: str | None) -> dict[str, Any]:
    cache, preview = arch.text_cache, arch.preview
    prompt: Any = SimpleNamespace(num_steps=4, width=512, height=768, flow_shift=None, sampler=sampler)
    if preview is not None:
        prompt.flow_shift = preview.defaults.flow_shift
    described = {
        "metadata": dict(arch.metadata),
        "ignores": to_plain(arch.ignores),
        "latents": to_plain(arch.codec.spec),
        "objective": to_plain(arch.objective),
        "tokens": [getattr(arch.text, "max_tokens", None), arch.text.count_tokens("a red dog")],
    }
    if preview is not None:
        described["previews"] = to_plain(preview.defaults)
        described["levels"] = [round(float(s), 6) for s in getattr(preview.sampler(prompt), "sigmas_N", [])]
        described["has another denoiser for previews"] = preview.load_denoiser is not None
    if cache is not None:
        described["text cache"] = {key: value for key, value in to_plain(cache).items() if key != "options"}
        described["fingerprint"] = to_plain(cache.encoders())
        described["bytes"] = cache.bytes_of("a red dog") if cache.bytes_of else None
    return described


def to_plain(value: Any) -> Any:
    """Convert a value to what JSON can hold; functions and models are named by their type."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"_": type(value).__name__, **{f.name: to_plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else f"<{type(value).__name__}>"


def compare(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the path and both values of every difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from compare(before.get(key, "(missing)"), after.get(key, "(missing)"), f"{path}/{key}")
    elif before != after:
        yield f"{path}\n    {str(before)[:300]}\n    {str(after)[:300]}"


if __name__ == "__main__":
    raise SystemExit(main())
