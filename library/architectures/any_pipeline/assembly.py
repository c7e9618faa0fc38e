"""Assembly of any text-to-image pipeline of diffusers. Start here to read this package.

`watch` draws with the pipeline and records, `maps` reads elementwise maps, `convention` finds which argument is what,
and `check` compares the result with the pipeline. `folder` opens and loads, `measured_models` loads for a measurement,
`training` predicts.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from library.architectures.any_pipeline.check import PROMPT, check, gives_same_in_batch, require_exact
from library.architectures.any_pipeline.conditioning import CapturedText, capture_text
from library.architectures.any_pipeline.convention import PROMPTS, Convention
from library.architectures.any_pipeline.experts import BOUNDARY, COMPONENTS, SAVED_AS, find_part, list_parts
from library.architectures.any_pipeline.folder import (
    PipelineFolder,
    PipelineLoader,
    open_both,
    open_folder,
    open_loader,
)
from library.architectures.any_pipeline.kept import (
    NotBelieved,
    drop_unread,
    find_place,
    read_convention,
    write_convention,
)
from library.architectures.any_pipeline.measured_models import TextReader, load_for_measuring, require_memory
from library.architectures.any_pipeline.measuring import find_unconditional, measure, plain_scheduler
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.preview import build_preview
from library.architectures.any_pipeline.start_check import check_denoiser, compare_training
from library.architectures.any_pipeline.targets import block_lists, run_blocks_with, stacks
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict, build_objective
from library.architectures.any_pipeline.trees import format_path
from library.architectures.any_pipeline.watch import CannotDraw, Refused, Watched, WrongSize, setting
from library.architectures.specs import list_specs
from library.base.errors import UserError, error_in
from library.base.formatting import format_gib
from library.base.progress import progress_bar
from library.checkpoints.base_model_spec import bases_of_pipeline
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import IGNORES
from library.models.adapter_views import view_denoiser
from library.models.recipe import OTHER_ATTENTION, Recipe
from library.options.model import BASE_FLAG
from library.options.network_args import is_switched_on
from library.protocols import Architecture, LatentSpec, TextCacheSpec

logger = logging.getLogger(__name__)

SIDES = (64, 128, 256, 512)  # of the image at which a pipeline is measured, the first that it takes
NUM_TOKENS = 512  # of the longest caption where neither pipeline nor tokenizer has a limit
NUM_STAGES = 3  # of a measurement
STEP = 64  # sides of images are multiples of this many pixels, for every pipeline
LATENTS = LatentSpec(
    channels=16, downscale=8, bucket_step=STEP, cache_suffix="_diffusers.npz", had_keys_without_size=False
)
"""Buckets are the same for every pipeline; channels and downscale are measured."""
NOT_TRAINED = "the text encoders of a pipeline are not trained by this script"
RECIPE = Recipe(
    title="diffusers_train_network.py",
    metadata={
        "ss_base_model_version": "any_pipeline",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
    },
    needs={"diffusers": ">=0.38"},  # which runs no code of a folder unasked; `folder` does not rely on it
    refuses={
        "network_train_text_encoder_only": NOT_TRAINED,
        "text_encoder_lr": NOT_TRAINED,
        "weighted_captions": "the pipeline itself encodes the captions",
        "vae": "what is measured of the pipeline belongs to its own VAE",
        "shard_base": "the pipeline is asked at each new size of image, not in every process at once",
    },
    ignores={
        "clip_skip": "the pipeline itself encodes the captions",
        "max_token_length": "the pipeline itself encodes the captions",
        "tokenizer_cache_dir": "the tokenizers are those in the pipeline's folder",
        "v2": "it is for models of train_network.py",
        "v_parameterization": "the objective is measured",
        "zero_terminal_snr": "the noise levels are those of the pipeline's scheduler",
        **OTHER_ATTENTION,
    },
)


def build(options: PipelineOptions) -> Architecture:
    """Assemble the pipeline that the options name. Its convention is kept in a file, or measured.

    Raises UserError for a pipeline that cannot be trained, with the reason.
    """
    return build_from(options, draws_both=False)


def build_to_draw(options: PipelineOptions) -> Architecture:
    """Assemble a pipeline that draws: with both denoisers if it has two, unless --expert names one."""
    if options.experts.expert is not None:
        return build(options)
    architecture = build_from(options, draws_both=True)
    predict, codec, loader = architecture.predict, architecture.codec, architecture.load
    assert isinstance(predict, PipelinePredict) and isinstance(loader, PipelineLoader)
    assert isinstance(codec, PipelineLatents)
    if loader.folder.expert is None:
        return architecture
    predict.watched.second = COMPONENTS["low"]
    predict.watched.pipe.register_to_config(**{BOUNDARY: loader.folder.expert.boundary})
    return replace(
        architecture, load=open_both(loader), preview=build_preview(predict, codec, list_parts), part_of=find_part
    )


def build_from(options: PipelineOptions, draws_both: bool) -> Architecture:
    RECIPE.check(options)
    model, trusts_code = options.model, options.trust.trust_remote_code
    name = model.pretrained_model_name_or_path
    folder = open_folder(name, trusts_code, options.experts.expert, draws_both, model.variant)
    for spec in bases_of_pipeline(list_specs(), folder.kind.__name__)[:1]:
        logger.info("%s is %s model, which %s is made for; going on", folder.kind.__name__, spec.called, spec.script)
    watched = folder.build_stage()
    place = find_place(options.caching.cache_dir, folder.fingerprint())
    return recall(options, folder, watched, place) or measure_and_assemble(options, folder, watched, place)


def require_batches(options: PipelineOptions, convention: Convention) -> None:
    """Raise UserError for what needs all samples of a batch in one call of the denoiser, if a call takes one."""
    network = options.network
    is_tlora = network.network_module == "networks.tlora" or is_switched_on(network.network_args, "tlora")
    if is_tlora and not convention.pads:
        raise error_in("T-LoRA", cause="does not fit")(
            f"T-LoRA does not work with {convention.pipeline}: captions of different lengths cannot share a call of "
            f"its {convention.denoiser}",
            "remove it",
        )


def say_loader(folder: PipelineFolder, denoiser: str) -> str:
    """Say what loads the saved adapter."""
    name = folder.kind.__name__
    has_own = getattr(folder.classes[denoiser], "load_lora_adapter", None) is not None
    if has_own and denoiser in getattr(folder.kind, "_lora_loadable_modules", ()):
        second = f" with load_into_{denoiser}=True" if denoiser in SAVED_AS else ""
        return f"the adapter is loaded by load_lora_weights of {name}{second}"
    how = f"pipe.{denoiser}.load_lora_adapter" if has_own else "PEFT's inject_adapter_in_model"
    return f"the adapter is not loaded by {name} itself but by {how}, as docs/any_model.md shows"


def recall(options: PipelineOptions, folder: PipelineFolder, watched: Watched, place: Path) -> Architecture | None:
    """Assemble a pipeline by its kept measurement, and prepare `watched` to draw without models; None without one that
    is right. A wrong one would train away from the images, so it is compared with the pipeline at every start."""
    if not place.is_file() or options.diagnostics.selftest:
        return None
    try:
        convention = read_convention(place, folder.fingerprint())
        prepare_to_draw(watched, convention)
        architecture = assemble(options, folder, watched, convention)
    except (NotBelieved, Refused) as error:
        logger.warning("%s is not used, and %s is measured again: %s", place, folder.kind.__name__, error)
        return None
    logger.info("the measurement of %s is read from %s", folder.kind.__name__, place)
    return architecture


def prepare_to_draw(watched: Watched, convention: Convention) -> None:
    watched.denoiser, watched.idle = convention.denoiser, convention.idle
    if convention.replaces_scheduler:
        watched.set_scheduler(plain_scheduler(watched.pipe.scheduler))
    watched.memory.update(convention.memory)


def measure_and_assemble(
    options: PipelineOptions, folder: PipelineFolder, watched: Watched, place: Path
) -> Architecture:
    """Measure a pipeline, assemble it, and keep the measurement."""
    begun, precision = time.monotonic(), options.precision.mixed_precision
    num_bytes = require_memory(folder, TextReader.build(folder, precision))
    logger.info(
        "measuring how %s is trained, once, with %s of weights in main memory; the result is kept in %s",
        folder.kind.__name__, format_gib(num_bytes), place,
    )  # fmt: skip
    convention = measure_folder(folder, watched, precision)
    try:
        architecture = assemble(options, folder, watched, convention)
    except Refused as error:
        raise refuse(folder, error) from error
    logger.info("measured and checked in %.1f s", time.monotonic() - begun)
    write_convention(place, convention, folder.fingerprint())
    return architecture


def refuse(folder: PipelineFolder, error: Refused) -> Refused:
    return Refused(f"{BASE_FLAG} {folder.path}: {folder.kind.__name__} cannot be trained: {error}")


def measure_folder(folder: PipelineFolder, watched: Watched, precision: str) -> Convention:
    """Measure a pipeline's convention on its denoiser with few blocks, and check it. The models leave memory.

    Raises Refused with the reason.
    """
    try:
        watched.require_drawable((side, side) for side in SIDES)
    except Refused as error:
        raise refuse(folder, error) from error
    for whole in (False, True):
        watched.models = load_for_measuring(folder, whole)
        watched.load_text = partial(TextReader.build(folder, precision).load, watched)
        try:
            convention = measure_smallest(watched)
            break
        except Refused as error:
            if isinstance(error, CannotDraw) and error.in_model and not whole:
                continue
            raise refuse(folder, error) from error
        except Exception as error:
            # Code of any pipeline runs here, and its values reach ours: what it does is not known in advance.
            if isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
                raise
            logger.debug("measuring %s failed", folder.kind.__name__, exc_info=True)
            reason = "it does something that this script has no rule for, as --console_log_level DEBUG shows"
            raise refuse(folder, Refused(reason)) from error
    watched.models, watched.load_text = {}, None
    return convention


def measure_smallest(watched: Watched) -> Convention:
    """Measure and check a pipeline at the smallest size that it takes. `watched` keeps only the outputs of text
    encoders that the checks at starts need."""
    with progress_bar("measuring the pipeline…", NUM_STAGES) as bar:
        for side in SIDES:
            try:
                convention, maps = measure(watched, (side, side))
                break
            except WrongSize:
                if side == SIDES[-1]:
                    raise
        bar.update(1)
        require_exact(check(watched, convention, maps))
        bar.update(1)
        takes_batches = gives_same_in_batch(watched, convention, maps)
        pads = takes_batches and gives_same_in_batch(watched, convention, maps, PROMPTS)
        bar.update(1)
    return replace(convention, takes_batches=takes_batches, pads=pads, memory=record_memory(watched, convention))


def record_memory(watched: Watched, convention: Convention) -> dict[str, Any]:
    """Return what the text encoders give for the captions of later checks, as far as the pipeline reads it."""
    watched.memory.clear()
    with setting(watched, read=set()):
        for caption in (PROMPTS[0], PROMPT, ""):
            capture_text(watched, convention, caption)
        find_unconditional(watched, convention)
        assert watched.read is not None
        watched.memory = drop_unread(watched.memory, watched.read)
    return dict(watched.memory)


def assemble(
    options: PipelineOptions, folder: PipelineFolder, watched: Watched, convention: Convention
) -> Architecture:
    """Build what trains, and compare it with the pipeline. Raises Refused if they differ."""
    require_batches(options, convention)
    loader = open_loader(folder, convention.denoiser, convention.idle, options)
    text = build_text(watched, convention, loader)
    predict = PipelinePredict(watched, convention, text, check_denoiser)
    codec = PipelineLatents(read_latent_spec(convention), convention)
    objective = build_objective(options, predict, folder.expert)
    require_exact(compare_training(predict, codec, objective))
    for line in convention.describe():
        logger.info("%s", line)
    logger.info("%s", say_loader(folder, convention.denoiser))
    if folder.expert is not None:
        logger.info("%s", folder.expert.describe())
    watched.load_text = partial(TextReader.build(folder, options.precision.mixed_precision).load, watched)
    return Architecture(
        name=convention.pipeline,
        load=loader,
        text=text,
        codec=codec,
        objective=objective,
        predict=predict,
        view=view_denoiser,
        preview=build_preview(predict, codec),
        metadata={
            **RECIPE.describe(options, architecture=f"{convention.pipeline}/lora"),
            **({} if folder.expert is None else folder.expert.metadata),
        },
        ignores={**RECIPE.ignores, **(IGNORES if convention.mix == "flow" else {})},
        text_cache=build_text_cache(options, loader, text),
        run_blocks_with=run_blocks_with,
        stacks=stacks,
        chains=block_lists,
        expect_sizes=predict.expect_sizes,
    )


def read_latent_spec(convention: Convention) -> LatentSpec:
    """Return the latent space that was measured."""
    suffix = f"_{convention.pipeline.removesuffix('Pipeline').lower()}.npz"
    return replace(
        LATENTS,
        channels=convention.latent_shape[1],
        downscale=convention.downscale,
        cache_suffix=suffix,
        has_alpha=convention.has_alpha,
    )


def build_text(watched: Watched, convention: Convention, loader: PipelineLoader) -> CapturedText:
    """Build the text pipeline; captions are counted by the tokenizer that takes most tokens."""
    tokenizer, length = find_tokenizer(watched.pipe.components)
    limit = watched.options.get("max_sequence_length")
    default = limit.default if limit is not None and isinstance(limit.default, int) else length or NUM_TOKENS
    example = capture_text(watched, convention, PROMPTS[0])
    most = min(default, 1 << 16)
    return CapturedText(watched, convention, loader.text_names, example, tokenizer, most, loader.text_dtype)


def find_tokenizer(components: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the tokenizer that takes most tokens, and how many; 0 if none of them says it, as Kolors' own."""
    parts = [part for name, part in components.items() if name.startswith(("tokenizer", "processor"))]
    # Processors of text and images have one.
    tokenizers = [getattr(part, "tokenizer", part) for part in parts if part is not None]
    if not tokenizers:
        raise Refused("it has no tokenizer by which captions are counted; use a copy of the model that has one")
    lengths = [int(getattr(part, "model_max_length", 0)) for part in tokenizers]
    return tokenizers[lengths.index(max(lengths))], max(lengths)


def build_text_cache(options: PipelineOptions, loader: PipelineLoader, text: CapturedText) -> TextCacheSpec:
    # Diffusers' code puts captions into the templates of the model.
    convention, software = text.convention, f"diffusers {version('diffusers')}"
    return TextCacheSpec(
        options=options.text_caching,
        suffix=read_latent_spec(convention).cache_suffix.replace(".npz", "_te.npz"),
        keys=text.keys,
        encoders=lambda: fingerprint(*(part.weights for part in loader.texts)),
        settings=f"{software} {loader.text_dtype} {sorted(convention.extra.items())} {convention.unconditional}",
        tokenizers=(text.tokenizer,),
        padding={format_path(path): 0.0 for path in convention.text},
        on_host=text.host_keys,
        can_train=False,
        keeps_bits=True,
    )
