"""Diffusion transformers whose captions one language model encodes: their files, recipe, tokenizer and text cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol, TypeVar

from torch import nn

from library.checkpoints.base_files import BaseFiles, open_base, open_without_base
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.weights import Weights, configure, fingerprint
from library.diffusion.flow import RECORDS
from library.models.dit_loader import DitLoader, DitLoaderOptions, add_vision, check_input_width, open_dit_loader
from library.models.language_models import FLAG, WORDS, LanguageModel, choose_load
from library.models.loading import check_text_width
from library.models.qwen3 import FOLDER
from library.models.recipe import Recipe, build_flow_recipe, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.models.transformer_file import TransformerFile, file_parts
from library.models.vae.vae import TransformerVae
from library.options.dit import DitTrainOptions, PartOptions
from library.protocols import Architecture, TextCacheSpec, TextPipeline

VAE_FLAG = "--vae"
PADDING: Mapping[str, float] = {"hidden_state": 0.0, "attention_mask": 0.0}  # of the features of captions
OptionsT = TypeVar("OptionsT", bound=DitTrainOptions)


class LanguageModelOptions(DitLoaderOptions, Protocol):
    """The options that name the files and set their precision."""

    @property
    def parts(self) -> PartOptions: ...
    def flat(self) -> dict[str, Any]: ...


Build = Callable[[OptionsT], Architecture]
Assemble = Callable[[OptionsT, DitLoader, bool], Architecture]
"""Assembles a base model of the options and the opened files, which are trained if the last value is True."""


class TokenizedText(TextPipeline, Protocol):
    """A text pipeline with one tokenizer."""

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class DitFiles:
    """The files of a base model: a transformer, one language model and a VAE."""

    transformer: TransformerFile
    encoder: LanguageModel
    vae: TransformerVae
    list_specs: Callable[[], Sequence[BaseModelSpec]]  # of all base models
    fp8: str = "fp8_text_encoder"  # the option that keeps the encoder in 8 bits
    encoder_width: Callable[[Any], int] = lambda config: int(config.text_width)  # that this transformer expects
    num_states: int = 1  # states of the encoder side by side in that width


def open_models(files: DitFiles, options: LanguageModelOptions) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(files.transformer, options)
    return open_with(files, options, base, files.transformer.read(files.list_specs(), base))


def open_dit(transformer: TransformerFile, options: LanguageModelOptions) -> BaseFiles:
    """Open the transformer's file, or a diffusers folder with every part that no option replaces.

    Raises UserError naming the flag if it is missing or broken.
    """
    replacements = {"text_encoder": options.parts.text_encoder, "vae": options.model.vae}
    return open_base(
        options.model,
        f"the file of {transformer.title}'s transformer, or a diffusers folder",
        [folder for folder in ("transformer", "text_encoder", "vae") if replacements.get(folder) is None],
    )


def open_with(files: DitFiles, options: LanguageModelOptions, base: BaseFiles, weights: Weights) -> DitLoader:
    """Open the parts around a transformer of these weights. Raises UserError for a part that does not fit it."""
    transformer, encoder = files.transformer, files.encoder
    config = configure(weights, transformer.read_config)
    loader = open_parts(files, options, base, weights, partial(transformer.build, config))
    check_input_width(base.path, config.in_features, files.vae.num_inputs, files.vae.unit, transformer.title)
    width = files.encoder_width(config)
    check_text_width(FLAG, loader.text.component, WORDS, width, encoder.hub_name, files.num_states)
    return loader


def open_parts(
    files: DitFiles,
    options: LanguageModelOptions,
    base: BaseFiles,
    weights: Weights,
    build: Callable[[], nn.Module] | None = None,
) -> DitLoader:
    """Open the encoder and the VAE; without `build` there is no transformer."""
    encoder = files.encoder
    # The language and the vision model are in the same files, whose headers are read once.
    opened = cache(lambda: base.open_text_encoder(FLAG, options.parts.text_encoder, FOLDER, encoder.prefix))
    loader = open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[
            (lambda: encoder.open(*opened()), choose_load(encoder.load, encoder.name, is_in_8_bits(files, options)))
        ],
        vae=lambda: files.vae.open(files.transformer.title, options.model.vae, base),
        load_vae=files.vae.load,
    )
    if encoder.vision is None:
        return loader
    open_vision, load_vision = encoder.vision
    return add_vision(loader, lambda: open_vision(opened()[1]), load_vision)


def part_of(options: LanguageModelOptions, flag: str) -> str | None:
    """Return the name that the flag of the VAE or of the encoder gives."""
    return options.model.vae if flag == VAE_FLAG else options.parts.text_encoder


def ways_to_build(
    files: DitFiles, recipe: Recipe, open_loader: Callable[[OptionsT], DitLoader], assemble: Assemble[OptionsT]
) -> tuple[Build[OptionsT], Build[OptionsT], Callable[[OptionsT], Callable[[], nn.Module]]]:
    """Return `build`, `build_for_caching` and `open_vae` of a base model.

    The first assembles it for training, the second for caching captions, and the third opens the VAE for caching
    latents; nothing is loaded yet. Without a base model, which caching does not need, the part that encodes is opened
    alone. Raises UserError naming the flag for a file or a setting that does not fit.
    """

    def open_to_cache(flag: str, options: OptionsT) -> DitLoader:
        if options.model.pretrained_model_name_or_path:
            return open_loader(options)
        return open_parts(files, options, *open_without_base(flag, part_of(options, flag)))

    def build(options: OptionsT) -> Architecture:
        recipe.check(options)
        return assemble(options, open_loader(options), True)

    def build_for_caching(options: OptionsT) -> Architecture:
        recipe.check(options)
        return assemble(options, open_to_cache(FLAG, options), False)

    build.__module__ = assemble.__module__  # by which the package of a base model is found
    return build, build_for_caching, lambda options: open_to_cache(VAE_FLAG, options).vae


def shared_parts(
    files: DitFiles,
    recipe: Recipe,
    options: LanguageModelOptions,
    loader: DitLoader,
    text: TokenizedText,
    suffix: str,
    **cache: Any,
) -> dict[str, Any]:
    """Return the parts of an `Architecture` that follow from its files and its text.

    `suffix` ends the names of text caches; `cache` as for `cache_text`.
    """
    return {
        **file_parts(files.transformer, recipe, options, loader, files.list_specs()),
        "text": text,
        "text_cache": cache_text(files, options, loader, text, suffix, **cache),
    }


def is_in_8_bits(files: DitFiles, options: LanguageModelOptions) -> bool:
    return bool(options.parts.flat()[files.fp8])


def build_recipe(
    file: TransformerFile,
    page: str,
    *,
    version: str = "",
    weighted_captions: str,
    clip_skip: str,
    num_tokens: int,
    needs: Mapping[str, str] | None = None,
) -> Recipe:
    """Return what a base model refuses, ignores and records.

    `page` is that of its implementation, `version` its ss_base_model_version if that is not its name; the options'
    names stand for the reasons why they are not supported.
    """
    return build_flow_recipe(
        file.title,
        page,
        version or file.base,
        file.architecture if isinstance(file.architecture, str) else "",
        weighted_captions=weighted_captions,
        refuses={"network_train_text_encoder_only": "its text encoder cannot be trained"},
        records=RECORDS,
        needs=needs,
        clip_skip=clip_skip,
        max_token_length=f"its text encoder reads {num_tokens} tokens",
    )


def load_tokenizer(encoder: LanguageModel, options: LanguageModelOptions, loader: DitLoader) -> Any:
    """Load the tokenizer, which is searched next to the base model and the encoder. Raises UserError for another
    model's."""
    folders = tokenizer_folders(loader.path, options.parts.text_encoder, encoder.tokenizer_folders)
    tokenizer = encoder.load_tokenizer(folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, encoder.marks, encoder.hub_name)
    return tokenizer


def cache_text(
    files: DitFiles,
    options: LanguageModelOptions,
    loader: DitLoader,
    text: TokenizedText,
    suffix: str,
    settings: str = "",
    **more: Any,
) -> TextCacheSpec:
    """Return the text cache of states and their mask, which the denoiser reads on the host.

    `settings` are what affects the values besides the encoder; `more` are other fields, in place of the usual ones.
    """
    cache = TextCacheSpec(
        options=options.text_caching,
        suffix=suffix,
        keys=tuple(PADDING),
        encoders=lambda: fingerprint(*(part.component.weights for part in loader.texts)),
        settings=" ".join(filter(None, (str(loader.text.dtype), str(is_in_8_bits(files, options)), settings))),
        tokenizers=(text.tokenizer,),
        padding=PADDING,
        on_host=("attention_mask",),
        can_train=False,
        sees_images=files.encoder.vision is not None,
    )
    return replace(cache, **more)
