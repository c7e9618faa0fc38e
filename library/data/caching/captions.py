"""Captions that are encoded once: kept in memory (--cache_text_encoder_outputs) or beside the pictures (…_to_disk).

What a draw may show is a fixed set of captions: the versions of its picture's caption (`captions.caption_variant`) and
the empty prompt. All of them are encoded before training, so shuffling, wildcards and dropout go on.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from library.checkpoints.files import load_state_dict, save_safetensors
from library.data.caching.npz import MISSING, clear_left_overs
from library.data.caching.stores import TextFiles, TextStore
from library.data.caching.text_files import Identity, Row, TextFile, Verdict, judge, write_texts
from library.data.description.plan import DataPlan
from library.data.sources.scan import few
from library.errors import UserError
from library.processes import ALONE, Processes
from library.progress import Bar, progress_bar
from library.protocols import TextCacheSpec
from library.types import Conditioning

logger = logging.getLogger(__name__)

TITLE = "caching text encoder outputs"
MAX_REPEATED = 64  # captions of several files, such as class tokens, that are kept while files are written

Encode = Callable[[Sequence[str]], Conditioning]
"""Captions to their conditioning, first axis B, without gradient."""


@dataclass(frozen=True)
class Job:
    """The captions of one file."""

    file: TextFile
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Encoders:
    """Text encoders in memory. Prompts of previews may be read in another way than captions."""

    captions: Encode
    prompts: Encode


@dataclass(frozen=True)
class TextEncoding:
    """How captions become rows."""

    spec: TextCacheSpec
    open_encoders: Callable[[], Encoders]  # loads them; called once, and only if something is to be encoded
    dtype: str  # that the encoders run in

    def identity(self) -> Identity:
        """All that decides what a caption becomes."""
        told = blake2b(f"{self.spec.identity()} {self.dtype} {self.spec.keys}".encode(), digest_size=16)
        for name, tensor in sorted(self.spec.constants.items()):
            told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.tolist()}".encode())
        return Identity(told.hexdigest(), digest_of_words(self.spec.tokenizers))


def digest_of_words(tokenizers: Sequence[Any]) -> str:
    """A digest of which ids tokenizers have for which words."""
    told = blake2b(digest_size=16)
    for tokenizer in tokenizers:
        told.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return told.hexdigest()


@dataclass(frozen=True)
class CachedTexts:
    """What text encoders made of captions and of prompts of previews, the latter by text."""

    store: TextStore
    prompts: Mapping[str, Row]


def cache_texts(
    plan: DataPlan,
    encoding: TextEncoding,
    prompts: Sequence[str],
    skips_check: bool,
    processes: Processes = ALONE,
) -> CachedTexts:
    """Encode what is not cached yet; gives where the text features of all captions are, and those of prompts.

    `prompts` are those of previews, which only the main process has. Several processes share the captions out, and pass
    those that are to stay in memory on in a temporary folder. Files that are not true any more are made again, and only
    their new captions are encoded. Raises UserError naming a caption that becomes NaN, or a folder that cannot be
    written.
    """
    spec = encoding.spec
    open_encoders = cache(encoding.open_encoders)
    if spec.options.cache_text_encoder_outputs_to_disk:
        jobs, files = plan_jobs(plan, spec)
        empty = shared_job(plan, spec, "empty_prompt", [""])
        shown = shared_job(plan, spec, "preview_prompts", prompts)
        if processes.is_main:
            clear_left_overs(os.path.dirname(job.file.path) for job in (empty, *jobs))
        identity = cache(encoding.identity)
        threads = plan.num_workers
        write_missing([empty, *jobs], lambda: open_encoders().captions, spec, identity, skips_check, threads, processes)
        if prompts:
            write_missing([shown], lambda: open_encoders().prompts, spec, identity, skips_check, threads, ALONE)
        store = TextStore(files, {"": empty.file.read("")}, spec.padding)
        return CachedTexts(store, {text: shown.file.read(text) for text in prompts})
    texts = list(dict.fromkeys(["", *(text for texts in plan.caption_texts() for text in texts)]))
    logger.info("caching text encoder outputs of %d captions in memory", len(texts) + len(prompts))
    share = texts[processes.local_rank :: processes.local_count]
    with progress_bar(TITLE, len(share) + len(prompts)) as bar:
        rows = encode_rows(share, lambda: open_encoders().captions, spec, bar)
        prompt_rows = encode_rows(prompts, lambda: open_encoders().prompts, spec, bar)
    store = TextStore(memory=passed_on(rows, texts, processes), padding=spec.padding)
    logger.info("they take %.2f GB", sum(map(row_bytes, (*store.memory.values(), *prompt_rows.values()))) / 1e9)
    return CachedTexts(store, prompt_rows)


def passed_on(rows: Mapping[str, Row], texts: Sequence[str], processes: Processes) -> Mapping[str, Row]:
    """The rows of all `texts`: each process of this machine writes its own for the others."""
    if processes.count == 1:
        return rows
    folder = Path(processes.shared_folder("texts"))
    numbers = {text: number for number, text in enumerate(texts)}
    own = {f"{numbers[text]}/{name}": tensor for text, row in rows.items() for name, tensor in row.items()}
    save_safetensors(folder / f"{processes.local_rank}.safetensors", own)
    processes.wait_for_all("caching text encoder outputs")
    found: dict[str, dict[str, Tensor]] = {}
    for rank in range(processes.local_count):
        for key, tensor in load_state_dict(folder / f"{rank}.safetensors").items():
            number, _, name = key.partition("/")
            found.setdefault(texts[int(number)], {})[name] = tensor
    return dict(found)


def plan_jobs(plan: DataPlan, spec: TextCacheSpec) -> tuple[list[Job], TextFiles]:
    """(what each file is to hold, which samples have one).

    Samples that share a picture, or pictures that differ only in their endings, share a file: it holds the captions of
    all of them.
    """
    texts_of: dict[str, dict[str, None]] = defaultdict(dict)
    files = TextFiles(spec.suffix, spec.keys, np.zeros(len(plan.samples), dtype=bool))
    for number, texts in enumerate(plan.caption_texts()):
        wanted = [text for text in texts if text]
        if wanted:
            file = files.file(plan.samples[number], plan.storage)
            files.has_N[number] = True
            texts_of[file.path].update(dict.fromkeys(wanted))
    return [Job(TextFile(path, spec.keys), tuple(texts)) for path, texts in texts_of.items()], files


def shared_job(plan: DataPlan, spec: TextCacheSpec, name: str, texts: Sequence[str]) -> Job:
    """What no picture has, in a hidden file in the first folder of pictures."""
    stem_of = plan.storage.cache_stem
    first = min(os.path.dirname(os.path.abspath(stem_of(sample.picture))) for sample in plan.samples)
    return Job(TextFile(os.path.join(first, f".{name}{spec.suffix}"), spec.keys), tuple(texts))


# What is true on disk


def write_missing(
    jobs: Sequence[Job],
    encode: Callable[[], Encode],
    spec: TextCacheSpec,
    identity: Callable[[], Identity],
    skips_check: bool,
    num_threads: int,
    processes: Processes,
) -> None:
    """Bring every file up to date, each process its share of them."""

    def missing_ones(candidates: Sequence[Job], when: str) -> list[tuple[Job, Verdict]]:
        verdicts = check_files(candidates, identity, skips_check, num_threads)
        processes.wait_for_all(f"checking text encoder outputs{when}")  # so that all share out the same list
        return [(job, verdict) for job, verdict in zip(candidates, verdicts, strict=True) if verdict.fault is not None]

    def write_share(share: Sequence[tuple[Job, Verdict]], when: str) -> None:
        count = sum(len(job.texts) - len(verdict.texts) for job, verdict in share)
        if share:
            logger.info("caching text encoder outputs of %d captions on disk", count)
            write_files(share, count, encode, spec, identity)
        processes.wait_for_all(f"caching text encoder outputs{when}")

    missing = missing_ones(jobs, "")
    write_share(missing[processes.rank :: processes.count], "")
    if processes.num_machines > 1:  # what another machine wrote on a disk of its own is missing here
        missing = missing_ones([job for job, _ in missing], " again")
        write_share(missing[processes.local_rank :: processes.local_count], " again")


def write_files(
    missing: Sequence[tuple[Job, Verdict]],
    count: int,
    encode: Callable[[], Encode],
    spec: TextCacheSpec,
    identity: Callable[[], Identity],
) -> None:
    """Encode the `count` captions that files lack, and write the files."""
    uses = Counter(text for job, verdict in missing for text in job.texts if text not in verdict.texts)
    rows: dict[str, Row] = {}
    with progress_bar(TITLE, count) as bar:
        for group in grouped(missing, spec.options.text_encoder_batch_size or 1):
            needed = [text for job, verdict in group for text in job.texts if text not in verdict.texts]
            new = [text for text in dict.fromkeys(needed) if text not in rows]
            rows.update(encode_rows(new, encode, spec, bar))
            bar.update(len(needed) - len(new))
            for job, verdict in group:
                kept = {text: job.file.read(text) if text in verdict.texts else rows[text] for text in job.texts}
                write_texts(job.file.path, kept, spec.keys, spec.constants, identity())
            rows = dict(islice(((text, row) for text, row in rows.items() if uses[text] > 1), MAX_REPEATED))


def check_files(
    jobs: Sequence[Job], identity: Callable[[], Identity], skips_check: bool, num_threads: int
) -> list[Verdict]:
    """What of each job lies on disk, and a line in the log about it."""

    def look(job: Job) -> Verdict:
        if not os.path.exists(job.file.path):
            return Verdict(frozenset(), MISSING)
        if skips_check:
            return Verdict(frozenset(job.texts))
        return judge(job.file, job.texts, identity())

    verdicts: list[Verdict] = []
    if not skips_check and any(os.path.exists(job.file.path) for job in jobs):
        identity()  # once, before the threads ask for it
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        with progress_bar("checking text cache", len(jobs), leave=False) as bar:
            for verdict in pool.map(look, jobs):
                verdicts.append(verdict)
                bar.update(1)
    report_check(jobs, verdicts, skips_check)
    return verdicts


def report_check(jobs: Sequence[Job], verdicts: Sequence[Verdict], skips_check: bool) -> None:
    """One line that says what is used, what is missing, what is made again and why."""
    faults: dict[str, list[str]] = defaultdict(list)
    for job, verdict in zip(jobs, verdicts, strict=True):
        if verdict.fault is not None:
            faults[verdict.fault].append(job.file.path)
    missing = faults.pop(MISSING, [])
    num_stale = sum(len(paths) for paths in faults.values())
    reasons = "; ".join(f"{len(paths)} {reason}: {few(paths, 2)}" for reason, paths in faults.items())
    logger.log(
        logging.WARNING if num_stale else logging.INFO,
        "text cache: %d files are used%s, %d are missing, %d are made again%s",
        len(jobs) - len(missing) - num_stale,
        " unchecked (--skip_cache_check)" if skips_check else "",
        len(missing),
        num_stale,
        f" ({reasons})" if reasons else "",
    )


# Encoding


def grouped(missing: Sequence[tuple[Job, Verdict]], batch_size: int) -> Iterator[list[tuple[Job, Verdict]]]:
    """Neighbouring files that together have a batch of captions to encode."""
    group: list[tuple[Job, Verdict]] = []
    count = 0
    for job, verdict in missing:
        group.append((job, verdict))
        count += len(job.texts) - len(verdict.texts)
        if count >= batch_size:
            yield group
            group, count = [], 0
    if group:
        yield group


def encode_rows(texts: Sequence[str], encode: Callable[[], Encode], spec: TextCacheSpec, bar: Bar) -> dict[str, Row]:
    """The features of captions, on the CPU, --text_encoder_batch_size of them at a time."""
    rows: dict[str, Row] = {}
    count = spec.options.text_encoder_batch_size or 1
    for first in range(0, len(texts), count):
        batch = texts[first : first + count]
        encoded = {name: tensor.detach().cpu() for name, tensor in encode()(batch).items()}
        assert set(encoded) == set(spec.keys), (set(encoded), spec.keys)
        for place, text in enumerate(batch):
            rows[text] = {name: encoded[name][place].clone() for name in spec.keys}
            check_row(text, rows[text])
        bar.update(len(batch))
    return rows


def check_row(text: str, row: Row) -> None:
    """Raise UserError naming the caption where the text encoders gave NaN."""
    for name, tensor in row.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(
                f"the text encoders give NaN ({name}) for the caption {text!r}; use --mixed_precision bf16 or no, or "
                "text encoder weights in another precision"
            )


def is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def row_bytes(row: Row) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())
