"""The encodings that a plan needs, and whether a file of the cache is valid for one."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from library.base.errors import NotThere, list_few
from library.data.caching.filling import CheckedJob
from library.data.caching.latent_files import Expected, LatentFile, origin_of_file
from library.data.caching.latent_index import VerifiedEntries
from library.data.caching.stores import default_latent_file
from library.data.decoding.npz import Verdict
from library.data.description.buckets import Shape
from library.data.plan.data_plan import DataPlan
from library.data.plan.samples import Sample
from library.data.plan.seen_references import SeenReferences
from library.data.scanned.images import ScannedImage
from library.data.scanned.names import same_file_key

logger = logging.getLogger(__name__)

OPAQUE = " without alpha"


@dataclass(frozen=True)
class Job:
    """An encoding shared by all samples with the same image, shape and filter."""

    sample: Sample
    users: tuple[int, ...]  # indices of the samples
    interpolation: str | None
    needs_flipped: bool
    needs_alpha: bool  # as a mask; the image, and its partner in a pair, is then encoded without its alpha
    file: LatentFile | None  # None keeps the latents in memory
    has_alpha: bool = False  # images are encoded with their alpha channel
    is_pair: bool = False  # the reference is the partner in opposite_dir, which is also trained on

    @property
    def path(self) -> str:
        """The path of the job's file, which must not be None."""
        assert self.file is not None
        return self.file.path

    def name_vae(self, vae: str) -> str:
        """Return the VAE name for the entry. It records if alpha serves as mask, because the image is then encoded
        without it."""
        return f"{vae}{OPAQUE}" if self.has_alpha and self.needs_alpha and vae else vae

    def expected(self, vae: str | None, seen: SeenReferences | None) -> Expected:
        """Return what a valid entry was made with; any VAE for None."""
        name, digest = None if vae is None else self.name_vae(vae), 0 if seen is None else seen.digest(self.users[0])
        shape, flags = self.sample.shape, (self.needs_flipped, self.needs_alpha, self.is_pair)
        return Expected(shape, self.interpolation, name, *flags, digest)


def assign_exchange_files(jobs: Sequence[Job], folder: str, plan: DataPlan) -> list[Job]:
    """Assign files in `folder` to jobs whose latents would stay in memory, so that processes can exchange them."""
    jobs_with_files = []
    for number, job in enumerate(jobs):
        if job.file is None:
            path = os.path.join(folder, f"{number}{plan.spec.cache_suffix}")
            job = replace(job, file=replace(locate_file(job.sample, plan), path=path))
        jobs_with_files.append(job)
    return jobs_with_files


def plan_jobs(plan: DataPlan, to_disk: bool) -> list[Job]:
    """Plan the encodings, small images first.

    Images whose names differ only in the extension claim the same cache entry, and so do two crops or filters of one
    image for the same bucket. The first job gets the entry; the latents of the others stay in memory.
    """
    groups: dict[tuple[str, tuple[ScannedImage, ...], Shape, bool, bool, str | None], list[int]] = defaultdict(list)
    for number, sample in enumerate(plan.samples):
        # Regularisation images that are not needed, and images outside of a limited plan, are never drawn.
        if sample.num_draws:
            interpolation = plan.subset_of(sample).resize_interpolation
            is_opaque = plan.spec.has_alpha and plan.subset_of(sample).alpha_mask
            path, references = os.path.abspath(sample.image.key), sample.image.references
            is_pair = plan.subset_of(sample).opposite_dir is not None
            groups[path, references, sample.shape, is_opaque, is_pair, interpolation].append(number)
    jobs, claimed, left_out = [], set(), []
    for (*_, is_pair, interpolation), users in groups.items():
        subsets = [plan.subset_of(plan.samples[user]) for user in users]
        sample = plan.samples[users[0]]
        file = locate_file(sample, plan) if to_disk else None
        if file is not None:
            entry = same_file_key(file.path), file.tail
            if entry in claimed:
                left_out.append(sample.image.key)
                file = None
            else:
                claimed.add(entry)
        flipped, alpha = any(s.flip_aug for s in subsets), any(s.alpha_mask for s in subsets)
        jobs.append(Job(sample, tuple(users), interpolation, flipped, alpha, file, plan.spec.has_alpha, is_pair))
    if left_out:
        logger.warning(
            "latents of %d images stay in memory, because another image, crop or filter uses their cache entry: %s",
            len(left_out),
            list_few(left_out),
        )
    # By area as in sd-scripts; equal sizes follow each other, because `equal_batches` joins neighbours only.
    return sorted(jobs, key=lambda job: (math.prod(job.sample.shape.bucket), job.sample.shape.sizes))


def locate_file(sample: Sample, plan: DataPlan) -> LatentFile:
    return default_latent_file(plan.spec, sample, plan.storage)


# Validity of files


def expected_vae(vae_identity: Callable[[], str], jobs: Iterable[Job], plan: DataPlan) -> str:
    """Return the identity of the VAE that must have made the entries: the VAE of this run.

    If its files are missing, it is the VAE of the first entry that names one, and all entries must match it. Both end
    in the suffix of the plan's `spec`.
    """
    try:
        return vae_identity()
    except NotThere as error:
        logger.info(
            "cached latents are not verified against their VAE, which is missing (%s); all must come from the same VAE",
            error,
        )
    named_jobs = (named for job in jobs for named in iterate_named_jobs(plan, job))
    origins = (origin_of_file(job.file) for job in named_jobs if job.file is not None)
    names = (origin.vae.removesuffix(OPAQUE) for origin in origins if origin is not None)
    suffix = plan.spec.vae_suffix
    return next((name.removesuffix(suffix) + suffix for name in names), "")


def iterate_named_jobs(plan: DataPlan, job: Job) -> Iterator[Job]:
    """Yield the job with each possible file, those beside the image first. Early sd-scripts used `<stem>.npz` for every
    base model."""
    assert job.file is not None
    image = job.sample.image
    stem, beside = plan.storage.cache_stem(image), plan.storage.stem_beside(image)
    for place in (beside, stem):
        path = None if place is None else place + job.file.path.removeprefix(stem)
        # Most images have nothing beside them if they have a cache elsewhere.
        if path is not None and (place == stem or os.path.exists(path)):
            yield replace(job, file=replace(job.file, path=path)) if path != job.file.path else job
        if place is not None and plan.spec.had_keys_without_size:
            yield replace(job, file=replace(job.file, path=f"{place}.npz"))


def judge_job(entries: VerifiedEntries, vae: str | None, seen: SeenReferences | None, job: Job) -> Verdict:
    """Return whether the job's file is valid, and why not."""
    assert job.file is not None
    return entries.verdict(job.file, job.sample.image, job.expected(vae, seen))


def log_unknown_origins(found: Sequence[CheckedJob[Job]]) -> None:
    """Log entries that are used although their VAE or base model is unknown."""
    used = [result for result in found if result.verdict.fault is None]
    old_names: list[str] = []
    foreign: list[str] = []
    for result in used:
        has_old_name = os.path.basename(result.job.path) != os.path.basename(result.path)
        if has_old_name or result.verdict.is_foreign:
            (old_names if has_old_name else foreign).append(result.job.path)
    if foreign:
        logger.info(
            "%d cache entries do not name their VAE; delete them if they were made with another one: %s",
            len(foreign),
            list_few(foreign, 2),
        )
    if old_names:
        logger.warning(
            "%d latents come from files with an old name, which contains neither the size nor the base model; delete "
            "them if they were made for another one: %s",
            len(old_names),
            list_few(old_names, 2),
        )
