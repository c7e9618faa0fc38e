"""The folder of a pipeline in diffusers' layout: what is refused by its class, and the loading of its parts.

The pipeline is built from its parts, each by a class that was checked: `DiffusionPipeline.from_pretrained` of diffusers
before 0.38 runs Python files of a local folder unasked. Folders that cannot be trained are merged into, too.
"""

import inspect
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.any_pipeline.classes import INDEX, FolderClasses, find_components, is_absent
from library.architectures.any_pipeline.experts import (
    BOUNDARY,
    COMPONENTS,
    EVERYWHERE,
    SAVED_AS,
    Expert,
    Experts,
    choose_expert,
    expert_of,
    name_modules,
    read_boundary,
)
from library.architectures.any_pipeline.published_names import names_of
from library.architectures.any_pipeline.refusals import NO_VAE, find_cause
from library.architectures.any_pipeline.targets import BASE, with_targets
from library.architectures.any_pipeline.watch import SMALL, Watched, describe_package, is_vae, stand_in
from library.base.errors import UserError, about
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_files import check_variant, require_base_name
from library.checkpoints.base_model import BaseModel, WeightFile
from library.checkpoints.model_lookup import read_json, read_model_config
from library.checkpoints.weights import Weights
from library.environment.packages import describe_lack, list_lacks
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.loading import Component, MaybeComponent, materialise, open_if_there, text_encoder_dtype
from library.options.model import BASE_FLAG
from networks.core.targets.targets import AdapterTargets, adaptation_kind

logger = logging.getLogger(__name__)

VERSION = 8  # of the rules that measure
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
LEFT_OUT = {  # not needed to draw from text
    **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder", "watermark")),
    "requires_safety_checker": False,
}


@dataclass(frozen=True)
class PipelineFolder:
    """A folder with model_index.json. `parts` has the classes of all components, in order."""

    path: Path
    kind: type[Any]  # the pipeline
    parts: Mapping[str, type[Any]]
    settings: Mapping[str, Any]  # other arguments of the pipeline
    flag: str  # that named the folder
    expert: Expert | None = None  # the denoiser that is trained of two
    variant: str | None = None  # in the names of the weight files that are opened

    @property
    def used(self) -> list[str]:
        """The models, without the one of two denoisers that rests."""
        return [name for name in self.classes if self.expert is None or name != self.expert.resting]

    @property
    def classes(self) -> dict[str, type[Any]]:
        """The classes of the models."""
        return {name: kind for name, kind in self.parts.items() if issubclass(kind, nn.Module)}

    @property
    def scheduler(self) -> str:
        """The name of the scheduler's class; "" without one."""
        return self.parts["scheduler"].__name__ if "scheduler" in self.parts else ""

    @property
    def vae(self) -> str | None:
        """The component that encodes and decodes images; None for a pipeline that draws pixels."""
        return next((name for name, kind in self.classes.items() if is_vae(kind)), None)

    @property
    def denoisers(self) -> list[str]:
        """The models of diffusers that are no VAE; one of them is the denoiser."""
        from diffusers import ModelMixin
        from transformers import PreTrainedModel

        found = [key for key, kind in self.classes.items() if issubclass(kind, ModelMixin) and key != self.vae]
        return [key for key in found if not issubclass(self.classes[key], PreTrainedModel)]

    def published(self, modules: Collection[str]) -> BaseNames | None:
        """Return the names that the model's publisher gives some layers of the denoiser; None if they are not known."""
        return names_of(self.kind.__name__, modules)

    def fingerprint(self) -> str:
        """Return a digest of what a convention depends on: versions, classes, configurations, weight files."""
        import diffusers
        import transformers

        expert = "" if self.expert is None else f" {self.expert.name}"
        rules = f"{VERSION} {diffusers.__version__} {transformers.__version__}{expert}"
        digest = blake2b(rules.encode(), digest_size=10)
        for path in sorted(self.path.rglob("*")):
            if path.suffix in (".json", ".jinja", ".model", ".py", ".txt"):
                digest.update(f"{path.relative_to(self.path)}".encode() + path.read_bytes())
            elif path.suffix in (".safetensors", ".bin"):
                stat = path.stat()
                digest.update(f"{path.relative_to(self.path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def build_empty(self, name: str) -> nn.Module:
        """Build a model on the meta device."""
        from accelerate import init_empty_weights

        kind = self.classes[name]
        settings = read_model_config(self.path / name)
        if not settings:
            raise self._incomplete(f"{name}/config.json is missing")
        config = getattr(kind, "config_class", None)  # of transformers' models
        with init_empty_weights(include_buffers=False):  # what no file has, such as angles, stays real
            try:
                if config is None:
                    model: nn.Module = kind.from_config(settings)
                else:
                    model = build_by_config(kind, config.from_pretrained(str(self.path / name), local_files_only=True))
            except Exception as error:  # the classes compute with the values of the file
                raise self._incomplete(f"{name}/config.json: {error!r}", error) from error
        return model

    def load(self, name: str, dtype: torch.dtype) -> nn.Module:
        """Load a text encoder or the VAE, frozen, on the CPU. Raises NotThere if its files are missing."""
        self.open(name)
        try:
            model: nn.Module = self.parts[name].from_pretrained(
                str(self.path / name), torch_dtype=dtype, local_files_only=True, variant=self._find_variant(name)
            )
        except Exception as error:  # such as the package of its quantisation, which may be missing
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise
            raise self._incomplete(f"{name}: {error}", error) from error
        return model.eval().requires_grad_(False)

    def open(self, name: str) -> Component:
        """Open a model's files. Raises UserError for a denoiser whose values another program has packed."""
        packed = read_model_config(self.path / name).get("quantization_config")
        if packed and name in self.denoisers:
            method = packed.get("quant_method") if isinstance(packed, dict) else None
            raise about(self.flag, self.path)(
                f": its {name} is quantised ({method or 'in a way that its config.json does not name'}), and such "
                "weights are not read",
                "use the model in bf16; --base_format nf4 stores it in 4 bits while it trains",
            )
        return Component(*model_lookup.open_part(self.flag, self.path / name, self._file_kind(name), self.variant))

    def _file_kind(self, name: str) -> str:
        is_diffusers = name == self.vae or name in self.denoisers
        return name if is_diffusers or name in model_lookup.WEIGHT_STEMS else "text_encoder"

    def _find_variant(self, name: str) -> str | None:
        """Return the part of the file's name that from_pretrained asks for: that of the wanted file, or of the only one
        there is."""
        place = self.path / name, self._file_kind(name)
        if self.variant and model_lookup.find_weight_file(*place, self.variant) is not None:
            return self.variant
        file = model_lookup.find_weight_file(*place)
        return "fp16" if file is not None and ".fp16." in file.name else None

    def build_stage(self) -> Watched:
        """Build the pipeline with stand-ins for all models; tokenizers and scheduler are real.

        Raises UserError if a part is missing.
        """
        models = {name: self.build_empty(name) for name in self.classes}
        if self.vae is not None:  # pipelines read its statistics of latents
            weights, vae = self.open(self.vae).weights, models[self.vae]
            small = [name for name, shape in weights.shapes.items() if math.prod(shape) <= SMALL]
            vae.load_state_dict({name: weights.read(name) for name in small}, strict=False, assign=True)
        stand_ins = {name: stand_in(model) for name, model in models.items()}
        others = {name: self._read_part(name) for name in self.parts if name not in stand_ins}
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # it warns of every draw
        pipe = self._build({**self.settings, **stand_ins, **others})
        pipe.register_to_config(_name_or_path=str(self.path))
        return Watched(pipe)

    def _read_part(self, name: str) -> Any:
        """Read a scheduler, tokenizer or processor. Raises UserError if its files are missing or damaged."""
        from diffusers import ConfigMixin

        kind, folder = self.parts[name], self.path / name
        # transformers would ask on the terminal; diffusers takes no such argument.
        trust = {} if issubclass(kind, ConfigMixin) else {"trust_remote_code": False}
        try:
            if not folder.is_dir():  # the name of a missing folder would be looked up on the hub
                raise FileNotFoundError(f"there is no folder {name}")
            return kind.from_pretrained(str(folder), local_files_only=True, **trust)
        except Exception as error:  # parsers raise anything for damaged files, also bare Exception
            raise self._incomplete(f"{name}: {error}", error, folder) from error

    def _build(self, parts: Mapping[str, Any]) -> Any:
        """Build the pipeline; parts that it can do without are None. Raises UserError if another one is missing."""
        optional = set(getattr(self.kind, "_optional_components", []))
        given = {**self.settings, **parts}
        absent = {name: p for name, p in list_arguments(self.kind).items() if name not in given}
        missing = [name for name, p in absent.items() if p.default is p.empty and name not in optional]
        if missing:
            raise self._incomplete(f"{INDEX} lacks {', '.join(missing)}")
        try:
            return self.kind(**given, **dict.fromkeys(absent.keys() & optional))
        except Exception as error:  # it reads values of its parts' configurations
            raise self._incomplete(repr(error), error) from error

    def _incomplete(self, reason: str, error: Exception | None = None, folder: Path | None = None) -> UserError:
        fault = None if error is None else describe_package(error)
        # Tokenizers without tokenizer.json are built from a file that needs these, which transformers does not say.
        if folder is not None and any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists():
            lacks = list_lacks("sentencepiece", "protobuf")
            fault = describe_lack(*lacks) if lacks else fault
        if fault is not None:
            return about(self.flag, self.path, cause="not installed")(f": {self.kind.__name__} {fault}")
        return about(self.flag, self.path, cause="unreadable")(
            f"is not complete: {self.kind.__name__} cannot be opened ({reason})", "download the whole folder again"
        )


def build_by_config(kind: Any, config: Any) -> nn.Module:
    """Build a model of transformers. The sizes of an encoder may stand in a part of its configuration (T5Gemma)."""
    try:
        model: nn.Module = kind(config)
    except AttributeError:
        if getattr(config, "encoder", None) is None:
            raise
        model = kind(config.encoder)
    return model


def open_folder(
    name: str | None, trusts_code: bool, expert: str | None = None, draws_both: bool = False, variant: str | None = None
) -> PipelineFolder:
    """Open the pipeline that --pretrained_model_name_or_path names; only its JSON files are read.

    Of two denoisers the one that `expert` names is used; with `draws_both` the first is measured, and both are there.
    Raises UserError saying why a pipeline cannot be trained, as far as its class shows it.
    """
    name = require_base_name(name, "a folder in diffusers' layout, or a Hugging Face name")
    folder = read_folder(BASE_FLAG, find_folder(name, trusts_code), trusts_code)
    refuse_by_class(folder)
    boundary = read_boundary(folder.classes, folder.settings)
    wanted = "high" if draws_both and boundary is not None else expert
    if (chosen := choose_expert(folder.kind.__name__, boundary, wanted)) is not None:
        folder = replace(folder, expert=chosen, settings={**folder.settings, BOUNDARY: EVERYWHERE[chosen.name]})
    needed = list(folder.classes) if draws_both else folder.used
    if not Path(name).expanduser().exists():
        model_lookup.find_model(BASE_FLAG, name, [(part,) for part in needed], variant=variant)
    check_variant(folder.path, needed, variant)
    return replace(folder, variant=variant)


def read_folder(flag: str, path: Path, trusts_code: bool = False) -> PipelineFolder:
    """Return the folder of a pipeline by its model_index.json. Raises UserError for unknown classes."""
    index = read_json(path / INDEX)
    if "_class_name" not in index:
        raise about(flag, path)(
            f"is no pipeline of diffusers: it has no {INDEX} that names one. Use a folder in diffusers' layout, or the "
            "script of this base model"
        )
    classes = FolderClasses(flag, path, trusts_code)
    kind = classes.find_pipeline(index["_class_name"])
    arguments = list_arguments(kind)
    left_out = {name: value for name, value in LEFT_OUT.items() if name in arguments}
    entries = {name: entry for name, entry in index.items() if name not in LEFT_OUT and not name.startswith("_")}
    parts = find_components(classes, entries, kind, arguments)
    optional = {name for name, argument in arguments.items() if argument.default is not argument.empty} - parts.keys()
    settings = {name: value for name, value in entries.items() if name in optional and not is_absent(value)}
    # Such as the third text encoder of Stable Diffusion 3, of which there are others.
    stems = [name.rstrip("_0123456789") for name in parts]
    without = {name: None for name in arguments if is_absent(entries.get(name)) and name.rstrip("_0123456789") in stems}
    return PipelineFolder(path, kind, parts, {**without, **settings, **left_out}, flag)


def list_arguments(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the arguments that a pipeline is built with, by name."""
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])


def find_folder(name: str, trusts_code: bool) -> Path:
    """Return the folder of a local pipeline, or of the small files of a repository; with code if it is trusted."""
    if Path(name).expanduser().exists() or Path(name).is_absolute():
        return model_lookup.existing(BASE_FLAG, name)
    try:
        return model_lookup.fetch_snapshot(name, (*SMALL_FILES, *(["*.py"] if trusts_code else [])))
    except ConnectionError as error:
        raise about(BASE_FLAG, cause="missing")(
            f"{name} is neither a folder nor a repository that can be downloaded ({error}). Check the path"
        ) from error


def refuse_by_class(folder: PipelineFolder) -> None:
    """Raise UserError for a pipeline that is not made to draw images from text, or was distilled to few steps."""
    config = read_json(folder.path / "scheduler" / "scheduler_config.json")
    reason = find_cause(folder.kind, tuple(list_arguments(folder.kind)), folder.scheduler, config)
    if reason is None and folder.scheduler and not hasattr(folder.parts["scheduler"], "step"):
        reason = f"draws with {folder.scheduler}, which has no single step; use a model with another scheduler"
    if reason is None and folder.vae is None:
        reason = NO_VAE
    if reason is not None:
        raise about(folder.flag, folder.path)(f": {folder.kind.__name__} {reason}")


@dataclass(frozen=True)
class PipelineLoader:
    """A loader of a pipeline's models. `texts` are the models that run before the denoiser, in order."""

    folder: PipelineFolder
    name: str  # of the denoiser
    denoiser_weights: Weights
    texts: tuple[MaybeComponent, ...]
    text_names: tuple[str, ...]
    vae_component: MaybeComponent
    precision: str
    vae_dtype: torch.dtype

    @property
    def text_dtype(self) -> torch.dtype:
        return text_encoder_dtype(DTYPES[self.precision])

    def text_encoders(self) -> list[nn.Module]:
        return [self._load(name, part, self.text_dtype) for name, part in zip(self.text_names, self.texts, strict=True)]

    def vae(self) -> nn.Module:
        assert self.folder.vae is not None
        return self._load(self.folder.vae, self.vae_component, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        model = self.folder.build_empty(self.name)
        loaded = materialise(model, self.denoiser_weights, DTYPES[self.precision], weight_format)
        return with_targets(loaded, SAVED_AS.get(self.name, self.name), self.folder.published)

    def _load(self, name: str, part: MaybeComponent, dtype: torch.dtype) -> nn.Module:
        weights = part.weights
        if weights.read(min(weights.shapes, key=lambda key: len(weights.shapes[key]))).is_meta:
            return self.folder.build_empty(name).to(dtype)
        return self.folder.load(name, dtype)


@dataclass(frozen=True)
class ExpertsLoader:
    """A loader of a pipeline that draws with both of its denoisers."""

    high: PipelineLoader
    low: PipelineLoader

    def text_encoders(self) -> list[nn.Module]:
        return self.high.text_encoders()

    def vae(self) -> nn.Module:
        return self.high.vae()

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return Experts({loader.name: loader.denoiser(weight_format) for loader in (self.high, self.low)})


def open_both(high: PipelineLoader) -> ExpertsLoader:
    """Open the weights of the second denoiser, too."""
    name = COMPONENTS["low"]
    return ExpertsLoader(high, replace(high, name=name, denoiser_weights=high.folder.open(name).weights))


def open_loader(folder: PipelineFolder, denoiser: str, idle: Collection[str], options: Any) -> PipelineLoader:
    """Open the weights of all models. Those whose outputs are cached on disk may be missing."""
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    precision = options.precision.mixed_precision
    names = tuple(name for name in folder.used if name not in (denoiser, folder.vae, *idle))
    return PipelineLoader(
        folder,
        denoiser,
        folder.open(denoiser).weights,
        tuple(open_if_there(texts_are_cached, partial(folder.open, name)) for name in names),
        names,
        open_if_there(options.caching.cache_latents_to_disk, partial(folder.open, folder.vae or "vae")),
        precision,
        torch.float32 if options.model.no_half_vae else DTYPES[precision],
    )


def open_for_merging(flag: str, path: Path) -> BaseModel:
    """Open the denoiser of a pipeline's folder; only the headers of its weights are read.

    Raises UserError naming `flag` unless exactly one model may be the denoiser, or two share the noise levels.
    """
    folder = read_folder(flag, path)
    if read_boundary(folder.classes, folder.settings) is not None:
        return open_experts(folder)
    name, view = find_denoiser(folder)
    targets = view.adapter_targets
    assert isinstance(targets, AdapterTargets) and targets.names is not None
    stems = {module.kohya: str(module.diffusers).removeprefix(f"{name}.") for module in targets.names.modules}
    file = WeightFile(name, folder.open(name).weights, stems)
    return BaseModel(path, (file,), targets.names, f"{folder.kind.__name__}/lora")


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) as network modules see it, on the meta device."""
    return [], find_denoiser(read_folder("the base model", path))[1]


def open_experts(folder: PipelineFolder) -> BaseModel:
    """Open both denoisers of a pipeline; adapter files say in their metadata which one they change."""
    files: list[WeightFile] = []
    modules: list[ModuleNames] = []
    of_files: dict[str, BaseNames] = {}
    for expert, component in COMPONENTS.items():
        model = folder.build_empty(component)
        paths = [path for path, part in model.named_modules() if adaptation_kind(part) is not None]
        own, of_files[expert] = (name_modules(BASE, component, paths, is_of_file) for is_of_file in (False, True))
        stems = {names.kohya: path for names, path in zip(own.modules, paths, strict=True)}
        files.append(WeightFile(component, folder.open(component).weights, stems))
        modules += own.modules
    return BaseModel(
        folder.path, tuple(files), BaseNames(BASE, tuple(modules)), f"{folder.kind.__name__}/lora",
        lambda entries, origin: of_files[expert_of(entries, origin)],
    )  # fmt: skip


def find_denoiser(folder: PipelineFolder) -> tuple[str, nn.Module]:
    """Return the name of the model that draws, and the model itself on the meta device, with its targets.

    Raises UserError unless there is exactly one.
    """
    flag, path, names, kind = folder.flag, folder.path, folder.denoisers, folder.kind.__name__
    if not names:
        raise about(flag, path, cause="missing")(
            f": model_index.json names no model of {kind} that draws", "use another copy"
        )
    if len(names) > 1:
        raise about(flag, path)(
            f": {kind} has several models that an adapter may belong to ({', '.join(names)})",
            "load the adapter with the pipeline and call its fuse_lora",
        )
    return names[0], with_targets(folder.build_empty(names[0]), names[0], folder.published)
