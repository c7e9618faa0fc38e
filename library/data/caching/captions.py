"""Text features that are encoded once and kept in memory (`cache_text_encoder_outputs`) or in files (…_to_disk).

The caption of a draw comes from a fixed set: the variants of the image's caption (`captions.caption_variant`) and the
empty prompt. All of them are encoded before training, so shuffling, wildcards and dropout still work.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from library.base.errors import NotThere, error_in, list_few, needing
from library.base.formatting import format_bytes, format_count
from library.base.progress import Bar, progress_bar
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from library.data.caching.filling import ADD_ENCODERS, CheckedJob, Codec, fill
from library.data.caching.stores import CacheFiles, TextStore, default_text_file
from library.data.caching.text_files import NOTE, WORDS, Identity, Row, TextFile, judge, strip_padding, write_texts
from library.data.decoding.images import DamagedImage
from library.data.decoding.npz import MISSING, Verdict, archive_kind
from library.data.plan.data_plan import DataPlan
from library.data.scanned.names import same_file_key
from library.processes.process_group import ALONE, Processes
from library.protocols import TextCacheSpec
from library.types import CaptionWithImages, Conditioning, shown_caption

logger = logging.getLogger(__name__)

MAX_REPEATED = 64  # captions of several files, such as class tokens, that are kept while writing

Encode = Callable[[Sequence[str]], Conditioning]
"""Encodes captions to their conditioning, first axis B, without gradient."""
EncodeSome = Callable[[Sequence[str]], tuple[Sequence[str], Conditioning]]
"""Encodes the captions that can be encoded, and returns (these captions, their conditioning)."""


@dataclass(frozen=True)
class Job:
    """The captions of one file."""

    file: TextFile
    texts: tuple[str, ...]
    users: tuple[int, ...] = ()  # samples; none for captions that belong to no image
    beside: str | None = None  # where an earlier run may have written the file, if its place is elsewhere

    @property
    def path(self) -> str:
        return self.file.path


@dataclass(frozen=True)
class Encoders:
    """Loaded text encoders. Preview prompts may be encoded differently from captions."""

    captions: Encode
    prompts: Encode


@dataclass(frozen=True)
class TextEncoding:
    """The encoding of captions to rows of features."""

    spec: TextCacheSpec
    open_encoders: Callable[[], Encoders]  # loads the encoders; called once, only if needed
    dtype: str  # dtype of the encoders

    def identity(self) -> Identity:
        """Return digests of everything that determines the features. Raises NotThere if the files of the encoders
        are missing."""
        # Settings also have a digest of their own: it is compared where the encoders are missing.
        return Identity(
            self._digest(f"{self.spec.encoders()} "), self._digest(""), digest_vocabularies(self.spec.tokenizers)
        )

    def identity_of_files(self, jobs: Sequence["Job"]) -> Identity:
        """Return the identity to use if the encoders are missing: their digest is read from the first file, and all
        files must match it."""
        notes = (one.file.note() for job in jobs for one in iterate_placed_jobs(job))
        first = next((note.identity for note in notes if note is not None), "")
        return Identity(first, self._digest(""), digest_vocabularies(self.spec.tokenizers), is_of_files=True)

    def _digest(self, encoders: str) -> str:
        spec = self.spec
        digest = blake2b(f"{encoders}{spec.settings} {self.dtype} {spec.keys}".encode(), digest_size=16)
        for name, tensor in sorted(spec.constants.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.tolist()}".encode())
        return digest.hexdigest()


def digest_vocabularies(tokenizers: Sequence[Any]) -> str:
    digest = blake2b(digest_size=16)
    for tokenizer in tokenizers:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CachedTexts:
    """The encoded captions, and the encoded preview prompts by text."""

    store: TextStore
    prompts: Mapping[str, Row]


def cache_texts(
    plan: DataPlan, encoding: TextEncoding, prompts: Sequence[str], skips_check: bool, processes: Processes = ALONE
) -> CachedTexts:
    """Encode whatever is not cached yet, and return the features of all captions and preview prompts.

    Only the main process passes `prompts`. The processes share the captions; those kept in memory are exchanged through
    a temporary folder. Stale files are rewritten, encoding only their new captions. Raises UserError naming a caption
    whose features are NaN, or a folder that cannot be written.
    """
    spec = encoding.spec
    open_encoders = cache(encoding.open_encoders)
    if spec.options.cache_text_encoder_outputs_to_disk:
        jobs, files = plan_jobs(plan, spec)
        jobs = [*plan_shared_jobs(plan, spec), *jobs]
        prompts_job = plan_shared_job(plan, spec, "preview_prompts", prompts)
        # Computed when it is first needed: the digest of the encoders reads all their weights.
        identity = cache(lambda: compute_identity(encoding, jobs))
        placed = (one for job in jobs for one in iterate_placed_jobs(job))
        if not skips_check and any(os.path.exists(job.path) for job in placed):
            # functools.cache has no lock: threads that check files at once would each compute it.
            identity()
        # A training image with a damaged reference is replaced by another one. A preview prompt has no replacement, so
        # a damaged reference there is an error.
        new_texts = [text for job in jobs if not os.path.exists(job.path) for text in job.texts]
        plan.storage.check_shared_room("the text features", sum(map(spec.bytes_of, new_texts)) if spec.bytes_of else 0)
        caption_codec = text_codec(lambda: skip_damaged(open_encoders().captions), spec, identity)
        prompt_codec = text_codec(lambda: encode_all(open_encoders().prompts), spec, identity)
        found = fill(caption_codec, jobs, skips_check, plan.num_workers, processes)
        shared = {text: job.file.read(text) for job in found if not job.users for text in job.texts}
        if prompts:
            # Only the main process has prompts, so it must not wait for the others here.
            (prompts_job,) = fill(prompt_codec, [prompts_job], skips_check, plan.num_workers, ALONE)
        renamed = {user: job.file for job in found if job.path == job.beside for user in job.users}
        store = TextStore(replace(files, renamed_files=renamed), shared, spec.padding)
        return CachedTexts(store, {text: prompts_job.file.read(text) for text in prompts})
    # The order is the same in every process: `exchange_rows` names captions by their index.
    captions = (text for texts in plan.caption_texts() for text in texts)
    texts = list(dict.fromkeys([*plan.shared_texts, *captions]))
    size = describe_size([*texts, *prompts], spec)
    logger.info("caching text encoder outputs of %d captions in memory%s", len(texts) + len(prompts), size)
    # Every machine encodes all captions, because the folder of the exchange is local to it.
    share = texts[processes.local_rank :: processes.local_count]
    with progress_bar(WORDS.caching, len(share) + len(prompts)) as bar:
        rows = encode_rows(share, lambda: skip_damaged(open_encoders().captions), spec, bar)
        prompt_rows = encode_rows(prompts, lambda: encode_all(open_encoders().prompts), spec, bar)
    store = TextStore(memory=exchange_rows(rows, texts, processes), padding=spec.padding)
    num_bytes = sum(map(row_bytes, (*store.memory.values(), *prompt_rows.values())))
    logger.info("cached text encoder outputs: %.2f GB", num_bytes / 1e9)
    return CachedTexts(store, prompt_rows)


def compute_identity(encoding: TextEncoding, jobs: Sequence[Job]) -> Identity:
    """Return the identity that cached files are checked against: that of the encoders, or that of the first file if
    the encoders are missing."""
    try:
        return encoding.identity()
    except NotThere as error:
        logger.info(
            "cached text features are not verified against their encoders, which are missing (%s); all must come from "
            "the same encoders, with these settings and these tokenizers",
            error,
        )
        return encoding.identity_of_files(jobs)


def exchange_rows(rows: Mapping[str, Row], texts: Sequence[str], processes: Processes) -> Mapping[str, Row]:
    """Return the rows of all `texts`. Each process writes its rows for the other processes of its machine."""
    if processes.count == 1:
        return rows
    folder = Path(processes.shared_folder("texts"))
    numbers = {text: number for number, text in enumerate(texts)}
    local_tensors = {f"{numbers[text]}/{name}": tensor for text, row in rows.items() for name, tensor in row.items()}
    # One file per process, which the others read whole. Latents have a file per image, because loader workers read
    # them.
    save_safetensors(folder / f"{processes.local_rank}.safetensors", local_tensors)
    processes.wait_for_all(WORDS.caching)
    all_rows: dict[str, dict[str, Tensor]] = {}
    for rank in range(processes.local_count):
        for key, tensor in load_state_dict(folder / f"{rank}.safetensors").items():
            number, _, name = key.partition("/")
            all_rows.setdefault(texts[int(number)], {})[name] = tensor
    return dict(all_rows)


def plan_jobs(plan: DataPlan, spec: TextCacheSpec) -> tuple[list[Job], CacheFiles[TextFile]]:
    """Return (the job of each file, the files of all samples).

    Samples share a file if they share an image, or if the names of their images differ only in the extension. The file
    holds the captions of all of them.
    """
    texts_by_key: dict[str, dict[str, None]] = defaultdict(dict)
    users_by_key: dict[str, list[int]] = defaultdict(list)
    paths: dict[str, str] = {}
    locate_file = partial(default_text_file, spec.suffix, spec.keys)
    has_N = np.zeros(len(plan.samples), dtype=bool)
    for number, texts in enumerate(plan.caption_texts()):
        # The empty prompt is the same for all images and has a file of its own.
        captions = [text for text in texts if text]
        if captions:
            has_N[number] = True
            path = locate_file(plan.samples[number], plan.storage).path
            key = same_file_key(path)
            paths.setdefault(key, path)
            texts_by_key[key].update(dict.fromkeys(captions))
            users_by_key[key].append(number)
    jobs = []
    for key, captions_of_file in texts_by_key.items():
        users = tuple(users_by_key[key])
        stem = plan.storage.stem_beside(plan.samples[users[0]].image)
        beside = None if stem is None else os.path.abspath(stem) + spec.suffix
        jobs.append(Job(TextFile(paths[key], spec.keys), tuple(captions_of_file), users, beside))
    return jobs, CacheFiles(locate_file, has_N)


def plan_shared_jobs(plan: DataPlan, spec: TextCacheSpec) -> list[Job]:
    """Plan the empty prompt, and the unconditional caption if that is another one."""
    names = ("empty_prompt", "unconditional_prompt")
    return [plan_shared_job(plan, spec, name, [text]) for name, text in zip(names, plan.shared_texts, strict=False)]


def plan_shared_job(plan: DataPlan, spec: TextCacheSpec, name: str, texts: Sequence[str]) -> Job:
    """Plan the captions that belong to no image. They are cached in a hidden file in the first image folder."""

    def place(stems: Iterable[str | None]) -> str | None:
        # min(), so that the folder does not depend on the order of the subsets.
        folder = min((os.path.dirname(os.path.abspath(stem)) for stem in stems if stem is not None), default=None)
        return None if folder is None else os.path.join(folder, f".{name}{spec.suffix}")

    path, beside = (
        place(stem_of(sample.image) for sample in plan.samples)
        for stem_of in (plan.storage.cache_stem, plan.storage.stem_beside)
    )
    assert path is not None, "a plan has samples"
    return Job(TextFile(path, spec.keys), tuple(texts), beside=beside)


def iterate_placed_jobs(job: Job) -> Iterator[Job]:
    """Yield the job with each file that may hold its captions, one beside the image first."""
    if job.beside is not None and os.path.exists(job.beside):
        yield replace(job, file=replace(job.file, path=job.beside))
    yield job


def text_codec(encode: Callable[[], EncodeSome], spec: TextCacheSpec, identity: Callable[[], Identity]) -> Codec[Job]:
    def judge_job(job: Job) -> Verdict:
        return judge(job.file, job.texts, identity()) if os.path.exists(job.path) else Verdict(MISSING)

    def make(share: Sequence[CheckedJob[Job]]) -> None:
        if share:
            count, first = sum(len(list_missing(result)) for result in share), share[0]
            reason = f"{format_count(count, 'caption')} must be encoded ({first.path} is {first.verdict.fault})"
            with needing(f"{reason}; {ADD_ENCODERS.format('text encoders')}"):
                encode()
            write_files(share, encode, spec, identity)

    names = {NOTE, *spec.keys, *spec.constants}
    return Codec(
        WORDS, archive_kind("a cache of text features", names.__contains__), judge_job, make, iterate_placed_jobs
    )


def write_files(
    missing: Sequence[CheckedJob[Job]],
    encode: Callable[[], EncodeSome],
    spec: TextCacheSpec,
    identity: Callable[[], Identity],
) -> None:
    """Encode the captions that are missing in the files, and write the files."""
    uses = Counter(text for result in missing for text in list_missing(result))
    count = uses.total()
    size = describe_size([text for result in missing for text in list_missing(result)], spec)
    logger.info("caching text encoder outputs of %d captions on disk%s", count, size)
    rows: dict[str, Row] = {}
    with progress_bar(WORDS.caching, count) as bar:
        for group in group_jobs(missing, spec.options.text_encoder_batch_size or 1):
            group_texts = [text for result in group for text in list_missing(result)]
            new_texts = [text for text in dict.fromkeys(group_texts) if text not in rows]
            rows.update(encode_rows(new_texts, encode, spec, bar))
            bar.update(len(group_texts) - len(new_texts))
            for result in group:
                file, kept = result.job.file, result.verdict.kept
                available = [text for text in result.requested.texts if text in kept or text in rows]
                # The archive is replaced as a whole, so its valid captions are read back.
                features = {text: file.read(text) if text in kept else rows[text] for text in available}
                if features:  # empty if all references are damaged
                    write_texts(result.path, features, spec.keys, spec.constants, identity(), spec.keeps_bits)
            # Captions that later files share are not encoded twice, but few are kept: one can take 31 MB.
            rows = dict(islice(((text, row) for text, row in rows.items() if uses[text] > 1), MAX_REPEATED))


def list_missing(found: CheckedJob[Job]) -> list[str]:
    """Return the captions to encode for a file."""
    return [text for text in found.requested.texts if text not in found.verdict.kept]


# Encoding


def group_jobs(missing: Sequence[CheckedJob[Job]], batch_size: int) -> Iterator[list[CheckedJob[Job]]]:
    """Group neighbouring files that together have a batch of captions to encode."""
    group: list[CheckedJob[Job]] = []
    count = 0
    for result in missing:
        group.append(result)
        count += len(list_missing(result))
        if count >= batch_size:
            yield group
            group, count = [], 0
    if group:
        yield group


def encode_all(encode: Encode) -> EncodeSome:
    return lambda texts: (texts, encode(texts))


def skip_damaged(encode: Encode) -> EncodeSome:
    """Wrap `encode` to skip captions with damaged reference images, with a warning. Their images are replaced by
    others of their buckets."""

    def run(texts: Sequence[str]) -> tuple[Sequence[str], Conditioning]:
        try:
            return texts, encode(texts)
        except DamagedImage:
            # The error names one image, but several captions of the batch may have damaged references.
            fault_by_text = {text: find_damaged_reference(text) for text in texts}
        damaged = sorted({fault for fault in fault_by_text.values() if fault is not None})
        logger.warning("captions of images with a damaged reference are not encoded: %s", list_few(damaged))
        intact = [text for text, fault in fault_by_text.items() if fault is None]
        return intact, encode(intact) if intact else {}

    return run


def find_damaged_reference(text: str) -> str | None:
    """Return the error that names a damaged reference image of a caption, or None."""
    try:
        if isinstance(text, CaptionWithImages):
            text.read()
    except DamagedImage as error:
        return str(error)
    return None


def encode_rows(
    texts: Sequence[str], encode: Callable[[], EncodeSome], spec: TextCacheSpec, bar: Bar
) -> dict[str, Row]:
    """Encode captions to features on the CPU, `text_encoder_batch_size` at a time."""
    rows: dict[str, Row] = {}
    batch_size = spec.options.text_encoder_batch_size or 1
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        encoded_texts, features = encode()(batch)
        encoded = {name: tensor.detach().cpu() for name, tensor in features.items()}
        assert not encoded_texts or set(encoded) == set(spec.keys), (set(encoded), spec.keys)
        for index, text in enumerate(encoded_texts):
            row = strip_padding({name: encoded[name][index] for name in spec.keys}, spec.padding)
            # A view would keep the features of the whole batch alive, padding included.
            rows[text] = {name: tensor.clone() for name, tensor in row.items()}
            check_row(text, rows[text])
        bar.update(len(batch))
    return rows


def describe_size(texts: Sequence[str], spec: TextCacheSpec) -> str:
    """Return the estimated size of the features as the end of a log line; "" if the spec has no estimate, or the
    encoders see images."""
    has_images = any(isinstance(text, CaptionWithImages) for text in texts)
    return "" if spec.bytes_of is None or has_images else f", about {format_bytes(sum(map(spec.bytes_of, texts)))}"


def check_row(text: str, row: Row) -> None:
    """Raise UserError naming the caption if its features contain NaN or infinity."""
    for name, tensor in row.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise error_in("--mixed_precision")(
                f"the text encoders give NaN ({name}) for the caption {shown_caption(text)!r}",
                "use --mixed_precision bf16 or no, or text encoder weights in another precision",
            )


def is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def row_bytes(row: Row) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())
