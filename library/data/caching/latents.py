"""Latents that are encoded once and kept in memory (`cache_latents`) or in files (`cache_latents_to_disk`)."""

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from library.base.errors import error_in, list_few, needing
from library.base.formatting import format_count
from library.base.progress import progress_bar
from library.base.randomness import generator_for
from library.data.caching.filling import ADD_ENCODERS, CheckedJob, Codec, fill
from library.data.caching.latent_files import (
    KIND,
    WORDS,
    LatentFile,
    Latents,
    Origin,
    content_hash,
    mark_of_reference,
    write_entry,
)
from library.data.caching.latent_index import VerifiedEntries
from library.data.caching.latent_jobs import (
    Job,
    assign_exchange_files,
    expected_vae,
    iterate_named_jobs,
    judge_job,
    locate_file,
    log_unknown_origins,
    plan_jobs,
)
from library.data.caching.stores import CacheFiles, LatentStore, default_latent_file, stamp_of_file
from library.data.decoding.images import (
    DamagedImage,
    Pixels,
    apply_placement,
    crop_at_centre,
    is_compressed,
    read_pixels,
    with_alpha,
)
from library.data.decoding.tensors import to_pixels
from library.data.description.buckets import Shape
from library.data.plan.data_plan import DataPlan
from library.data.plan.samples import check_size, find_replacement
from library.data.scanned.images import HIDES_EDITS, ScannedImage, Version
from library.data.sources.storage.storage import Storage
from library.options.caching import CachingOptions
from library.processes.process_group import ALONE, Processes
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)

MAX_WAITING_WRITES = 64

Encode = Callable[[Tensor, Sequence[Generator] | None], Tensor]
"""Encodes pixels_BCHW (-1..1) to latents_BCHW, sampled with one generator per image, or the posterior's mode
without."""


@dataclass(frozen=True)
class Decoded:
    """An image that is ready for the VAE."""

    image: Pixels
    alpha: Pixels | None
    version: Version
    file_hash: str
    references: tuple["Decoded", ...] = ()


def cache_latents(
    plan: DataPlan,
    encode: Encode,
    vae_identity: Callable[[], str],
    options: CachingOptions,
    seed: int,
    processes: Processes = ALONE,
    load_vae: Callable[[], object] = lambda: None,
) -> LatentStore:
    """Encode whatever is not cached yet, and return the latents of all images.

    `load_vae` is called before images are read, so that a missing VAE is reported early. `vae_identity`, which takes as
    long as reading the VAE, is called only if files are used.

    Each image's posterior is sampled with its own generator, so latents do not depend on batches or on what was cached
    before. Stale entries on disk are remade one by one; see `latent_files.judge`. An interrupted run reuses the entries
    it has written. The processes share the work; latents kept in memory are exchanged through a temporary folder.
    Damaged images are logged and skipped. Raises UserError naming an image that cannot be read, that is damaged and has
    no replacement, or that the VAE turns into NaN.
    """
    jobs = plan_jobs(plan, options.cache_latents_to_disk)
    on_disk = [job for job in jobs if job.file is not None]
    kept = [job for job in jobs if job.file is None]
    if kept and processes.count > 1:
        kept = assign_exchange_files(kept, processes.shared_folder("latents"), plan)
    memory: dict[int, Latents] = {}
    damaged: dict[int, str] = {}
    entries = VerifiedEntries.open(((job.path, job.sample.image) for job in on_disk), plan.storage)

    def encode_jobs(share: Sequence[Job]) -> None:
        for job, latents in encode_all(
            share, encode, load_vae, vae_identity, options.vae_batch_size, seed, plan, entries
        ):
            if isinstance(latents, DamagedImage):
                damaged.update((user, str(latents)) for user in job.users)
            elif job.file is None:
                memory.update(latents_of_users(job, latents, plan))

    def make(share: Sequence[CheckedJob[Job]]) -> None:
        encode_jobs([result.requested for result in share])
        entries.write()

    vae: str | None = None
    # Shared out within each machine, because the folder of the exchange is local to it.
    encode_jobs(kept[processes.local_rank :: processes.local_count])
    if on_disk:
        plan.storage.check_shared_room("the latents", bytes_of_latents(on_disk, plan.spec))
        skips_check = options.skip_cache_check
        vae = None if skips_check else expected_vae(vae_identity, on_disk, plan)
        judge_file = partial(judge_job, entries, vae, plan.seen)
        codec = Codec(WORDS, KIND, judge_file, make, partial(iterate_named_jobs, plan), log_unknown_origins)
        kept += fill(codec, on_disk, skips_check, plan.num_workers, processes)
    else:
        # The files of the exchange must be complete before they are read; `fill` waits in the other case.
        processes.wait_for_all(WORDS.caching)
    files = {user: job.file for job in kept if job.file is not None for user in job.users}
    # Every process draws the replacements itself, so all must know the same damaged images.
    damaged = processes.merged("damaged images", damaged)
    check_damaged(damaged, plan)
    usable = {user: file for user, file in files.items() if user not in damaged}
    return LatentStore(files_by_sample(usable, plan, entries.stamps), memory, frozenset(damaged), vae)


def bytes_of_latents(jobs: Sequence[Job], spec: LatentSpec) -> int:
    """Estimate the size of the files that are not there yet."""
    missing = [job for job in jobs if job.file is not None and not os.path.exists(job.file.path)]
    pixels = (
        math.prod(shape.bucket) * (1 + job.needs_flipped)
        for job in missing
        for shape in (job.sample.shape, *job.sample.shape.references)
    )
    return 4 * spec.channels * sum(pixels) // spec.downscale**2


def latents_of_users(job: Job, latents: Latents, plan: DataPlan) -> Iterator[tuple[int, Latents]]:
    """Yield the latents of each sample that shares an encoding; not every subset uses the image's alpha as a mask."""
    for user in job.users:
        is_masked = plan.subset_of(plan.samples[user]).alpha_mask
        yield user, latents if is_masked else replace(latents, alpha_HW=None)


def check_damaged(damaged: Mapping[int, str], plan: DataPlan) -> None:
    """Warn of damaged images. Raises UserError, before the denoiser is loaded, for one without a replacement."""
    if damaged:
        problems = sorted(set(damaged.values()))
        logger.warning(
            "%d damaged images are skipped, using others of their buckets: %s", len(problems), list_few(problems)
        )
    for number in damaged:
        find_replacement(plan.samples, plan.subsets, number, damaged.keys())


def files_by_sample(
    files: Mapping[int, LatentFile], plan: DataPlan, stamps: Mapping[str, int]
) -> CacheFiles[LatentFile]:
    has_N, stamps_N = np.zeros(len(plan.samples), dtype=bool), np.zeros(len(plan.samples), dtype=np.int64)
    has_N[list(files)] = True
    # Files that another process has written, or that were not checked, are taken as they are now.
    stamps_N[list(files)] = [stamps.get(file.path) or stamp_of_file(file.path) for file in files.values()]
    renamed_files = {number: file for number, file in files.items() if locate_file(plan.samples[number], plan) != file}
    return CacheFiles(partial(default_latent_file, plan.spec), has_N, renamed_files, stamps_N)


def encode_all(
    jobs: Sequence[Job],
    encode: Encode,
    load_vae: Callable[[], object],
    vae_identity: Callable[[], str],
    vae_batch_size: int,
    seed: int,
    plan: DataPlan,
    entries: VerifiedEntries,
) -> Iterator[tuple[Job, Latents | DamagedImage]]:
    """Yield every job with its latents, or the damage of its image. Threads decode images ahead of the VAE, and one
    thread writes the files."""
    if not jobs:
        return
    message = f"{format_count(len(jobs), 'image')} must be encoded, such as {jobs[0].sample.image.key}"
    with needing(f"{message}; {ADD_ENCODERS.format('VAE')}"):
        load_vae()
    batches = list(equal_batches(jobs, vae_batch_size))
    # One writer thread, because entries of two sizes may share a file. Encoded entries are written even if the run is
    # interrupted.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
        progress_bar("caching latents…", len(jobs)) as bar,
    ):
        writes: deque[Future[None]] = deque()
        for batch, results in decode_ahead(batches, plan.storage, max(1, plan.num_workers)):
            yield from (
                (job, result) for job, result in zip(batch, results, strict=True) if isinstance(result, DamagedImage)
            )
            pairs = [(job, result) for job, result in zip(batch, results, strict=True) if isinstance(result, Decoded)]
            jobs_left, decoded = [job for job, _ in pairs], [result for _, result in pairs]
            for (job, image), latents in zip(pairs, encode_batch(jobs_left, decoded, encode, seed), strict=True):
                check_latents(job, latents, plan)
                if job.file is not None:
                    origin = describe_origin(job, image, vae_identity())
                    writes.append(writer.submit(write_job, job, latents, origin, entries))
                yield job, latents
            bar.update(len(batch))
            # A disk slower than the VAE would otherwise collect all latents in memory.
            while len(writes) > MAX_WAITING_WRITES:
                writes.popleft().result()
        # Raises the error of a failed write.
        for write in writes:
            write.result()


def write_job(job: Job, latents: Latents, origin: Origin, entries: VerifiedEntries) -> None:
    assert job.file is not None
    write_entry(job.file, latents, job.sample.image, origin)
    entries.note_written(job.file, job.sample.image, origin)


def equal_batches(jobs: Sequence[Job], count: int) -> Iterator[list[Job]]:
    """Group consecutive jobs that are encoded alike, up to `count` at a time."""

    def encoding(job: Job) -> tuple[object, ...]:
        return job.sample.shape.sizes, job.needs_flipped, job.is_pair

    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == count or encoding(batch[0]) != encoding(job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def decode_ahead(
    batches: Sequence[list[Job]], storage: Storage, num_threads: int
) -> Iterator[tuple[list[Job], list[Decoded | DamagedImage]]]:
    """Yield every batch with its images, in order. About two images per thread are decoded ahead."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    waiting: deque[tuple[list[Job], list[Future[Decoded | DamagedImage]]]] = deque()
    remaining = iter(batches)
    try:
        while True:
            # At least two batches, so that the next one is decoded while a large one is encoded.
            while sum(len(futures) for _, futures in waiting) < 2 * num_threads or len(waiting) < 2:
                batch = next(remaining, None)
                if batch is None:
                    break
                waiting.append((batch, [pool.submit(decode_or_damage, job, storage) for job in batch]))
            if not waiting:
                return
            batch, futures = waiting.popleft()
            yield batch, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def decode_or_damage(job: Job, storage: Storage) -> Decoded | DamagedImage:
    """Decode the images of a job for the VAE; return DamagedImage if that fails."""
    try:
        return decode(job, storage)
    except DamagedImage as error:
        return error


def decode(job: Job, storage: Storage) -> Decoded:
    """Read, resize and crop the image of a job and its references. Each file is read once."""
    image, shape = job.sample.image, job.sample.shape
    references = tuple(
        decode_image(job, reference, reference_shape, storage, job.needs_alpha and job.is_pair)
        for reference, reference_shape in zip(image.references, shape.references, strict=True)
    )
    return replace(decode_image(job, image, shape, storage, job.needs_alpha), references=references)


def decode_image(job: Job, image: ScannedImage, shape: Shape, storage: Storage, is_masked: bool) -> Decoded:
    """Read, resize and crop one image of a job. With `is_masked` its alpha channel becomes a mask."""
    version, content = storage.whole(image)
    rgb, alpha = read_pixels(image.key, content)
    check_size(image, rgb)
    placement = crop_at_centre(shape)
    placed_alpha = None
    if is_masked:
        # As in sd-scripts, an image without alpha counts as opaque.
        opaque = np.full(rgb.shape[:2], 255, dtype=np.uint8)
        placed_alpha = apply_placement(opaque if alpha is None else alpha, placement, job.interpolation)
    pixels = with_alpha(rgb, None if is_masked else alpha) if job.has_alpha else rgb
    if not is_compressed(content):
        version = version._replace(stamp=HIDES_EDITS)
    return Decoded(apply_placement(pixels, placement, job.interpolation), placed_alpha, version, content_hash(content))


def encode_batch(jobs: Sequence[Job], decoded: Sequence[Decoded], encode: Encode, seed: int) -> list[Latents]:
    """Encode images of one bucket with their references, and mirrored copies of both if needed."""
    if not jobs:
        return []
    pixels_BCHW = torch.stack([to_pixels(item.image) for item in decoded])
    plain_BCHW = encode(pixels_BCHW, seed_generators(jobs, decoded, seed, is_flipped=False))
    references = encode_references(jobs, decoded, encode, seed, is_flipped=False)
    flipped_BCHW: Tensor | None = None
    flipped_references: list[tuple[Tensor, ...]] = [()] * len(jobs)
    if jobs[0].needs_flipped:
        flipped_references = encode_references(jobs, decoded, encode, seed, is_flipped=True)
        # As in sd-scripts, the mirrored pixels are encoded: mirrored latents are not those of the mirrored image.
        flipped_BCHW = encode(pixels_BCHW.flip(-1), seed_generators(jobs, decoded, seed, is_flipped=True))
    # clone(), because a view would keep the latents of the whole batch alive.
    return [
        Latents(
            plain_BCHW[i].clone(),
            None if flipped_BCHW is None else flipped_BCHW[i].clone(),
            None if alpha is None else torch.from_numpy(alpha),
            references[i],
            flipped_references[i],
        )
        for i, alpha in enumerate(item.alpha for item in decoded)
    ]


def encode_references(
    jobs: Sequence[Job], decoded: Sequence[Decoded], encode: Encode, seed: int, is_flipped: bool
) -> list[tuple[Tensor, ...]]:
    """Return the latents of each image's references, CHW each. References with the same number have one size.

    Partners of pairs are encoded like their images: a sample of the posterior, with the image's random numbers, so that
    the two differ only in their content.
    """
    encoded = []
    for references in zip(*(item.references for item in decoded), strict=True):
        pixels_BCHW = torch.stack([to_pixels(item.image) for item in references])
        # A reference of an edit model is the posterior's mode, as in diffusers. A partner is a sample: if only one
        # image of a pair had the posterior's noise, the noise would tell the two apart.
        generators = seed_generators(jobs, decoded, seed, is_flipped) if jobs[0].is_pair else None
        encoded.append(encode(pixels_BCHW.flip(-1) if is_flipped else pixels_BCHW, generators))
    return [tuple(latents_BCHW[i].clone() for latents_BCHW in encoded) for i in range(len(decoded))]


def seed_generators(jobs: Sequence[Job], decoded: Sequence[Decoded], seed: int, is_flipped: bool) -> list[Generator]:
    """Return a generator for each image, seeded by its content and size, not by its name or folder."""
    # Copies of a data set under other names then have the same latents, and their validation the same loss.
    hashes_and_buckets = [(image.file_hash, *job.sample.shape.bucket) for job, image in zip(jobs, decoded, strict=True)]
    return [generator_for(seed, "vae", *hash_and_bucket, int(is_flipped)) for hash_and_bucket in hashes_and_buckets]


def check_latents(job: Job, latents: Latents, plan: DataPlan) -> None:
    """Raise UserError naming the image if its latents contain NaN or do not have the base model's shape."""
    for reference, encoded in zip(job.sample.image.references, latents.references, strict=True):
        if not torch.isfinite(encoded).all():
            raise error_in(path=reference.key)(
                f"the VAE gives NaN for {reference.key}", "add --no_half_vae, or use a VAE made for fp16"
            )
    path = job.sample.image.key
    for tensor in (latents.latents_CHW, latents.flipped_CHW):
        if tensor is None:
            continue
        if not torch.isfinite(tensor).all():
            raise error_in(path=path)(f"the VAE gives NaN for {path}", "add --no_half_vae, or use a VAE made for fp16")
        expected_shape = locate_file(job.sample, plan).latent_shape
        if tuple(tensor.shape) != expected_shape:
            raise error_in(path=path)(
                f"the VAE gives latents of shape {tuple(tensor.shape)} for {path}, but {expected_shape} is needed"
            )


def describe_origin(job: Job, decoded: Decoded, vae_identity: str) -> Origin:
    return Origin(
        picture=os.path.basename(job.sample.image.key),
        picture_bytes=decoded.version.num_bytes,
        picture_mtime_ns=decoded.version.stamp,
        picture_hash=decoded.file_hash,
        bucket=list(job.sample.shape.bucket),
        resized=list(job.sample.shape.resized),
        interpolation=job.interpolation,
        vae=job.name_vae(vae_identity),
        # `write_entry` computes them from the arrays.
        checksums={},
        references=[
            mark_of_reference(reference.file_hash, reference.version, shape)
            for reference, shape in zip(decoded.references, job.sample.shape.references, strict=True)
        ],
        is_pair=job.is_pair,
    )
