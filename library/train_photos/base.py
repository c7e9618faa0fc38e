"""The base model of a run: what it is, what it predicts, and the recipe that suits it."""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.headers import is_safetensors, read_metadata
from library.checkpoints.model_lookup import find_weight_file, read_json, read_pipeline_class
from library.commands.base_models import find_base
from library.diffusion.objective import DDPM
from library.models.distilled import DistilledRelease, find_diffusers_folder, is_distilled, list_names
from library.options.model import BASE_FLAG
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.recipes import Recipe, list_recipes
from library.training.models.opening import open_data_plan
from library.training.models.text_caching import TextPlan
from library.training.offline.file_losses import losses_of_files
from tools.contact_sheet import find_device

FLAG = "--base"
Kind = Literal["character", "style"]
Prediction = Literal["epsilon", "v"]
NUM_MEASURED = 5  # photos
CLEAR = 0.7  # a model's loss as what it predicts is at most this share of its loss as the other
DENOISER = "model.diffusion_model."  # in files that also hold encoders or a VAE
V_MARK, TERMINAL_MARK = "v_pred", "ztsnr"  # tensors that some checkpoints carry for programs
DISTILLED_WORDS = frozenset(("schnell", "klein", "lightning", "hyper", "lcm", "dmd", "dmd2"))
DISTILLED = DistilledRelease("a clear file name", DISTILLED_WORDS, frozenset(("raw",)))  # of any base model


@dataclass(frozen=True)
class Base:
    """A recognised base model."""

    name: str  # as the scripts take it: an absolute path, or a name on the hub
    path: Path
    spec: BaseModelSpec
    tensors: Mapping[str, Sequence[int]]  # shapes by name, in the file of the denoiser

    @property
    def values(self) -> dict[str, Any]:
        """The options of its script that select it."""
        flag, _, value = self.spec.script_flag.removeprefix("--").partition(" ")
        return {BASE_FLAG.removeprefix("--"): self.name, **({flag: value or True} if flag else {})}

    def make_parser(self) -> Any:
        """Return the parser of its script."""
        return import_module(self.spec.script.removesuffix(".py")).setup_parser()

    @property
    def title(self) -> str:
        return (read_pipeline_class(self.path) if self.spec.is_general else "") or self.spec.title

    @property
    def num_values(self) -> int:
        """The number of values of the denoiser."""
        inside = [name for name in self.tensors if name.startswith(DENOISER)]
        return sum(prod(self.tensors[name]) for name in inside or self.tensors)

    @property
    def called(self) -> str:
        """The names that may tell a release or a fine-tune, in one text."""
        return " ".join([*list_names(self.path, find_diffusers_folder(self.path)), self.name])

    @property
    def is_distilled(self) -> bool:
        return is_distilled(DISTILLED, None, self.path)


def recognise(name: str, bar: type[Any] | None = None) -> Base:
    """Recognise a file, a diffusers folder or a name on the hub. Raises UserError for what no script trains."""
    path, spec = find_base(FLAG, name, ("unet", "transformer"), "text_encoder", bar=bar)
    is_local = Path(name).expanduser().exists()
    return Base(str(path.absolute()) if is_local else name, path.absolute(), spec, list_tensors(path))


def list_tensors(path: Path) -> Mapping[str, Sequence[int]]:
    """Return the shapes of the tensors of a file, or of the denoiser in a diffusers folder."""
    if path.is_dir():
        found = (find_weight_file(path / part, part) for part in ("transformer", "unet"))
        file = next((file for file in found if file is not None), None)
    else:
        file = path
    return {} if file is None else model_lookup.open_file(FLAG, file).shapes


# --- the recipe ---


def choose_recipe(base: Base, kind: Kind) -> Recipe:
    """Return the recipe of this kind that suits the base best, or the other kind's if it has none of this one, or plain
    settings if it has neither."""
    recipes = [recipe for recipe in list_recipes() if suits(recipe, base)]
    of_kind = [recipe for recipe in recipes if recipe.name.endswith(f"_{kind}")]
    others = [recipe for recipe in recipes if recipe.name.endswith(("_character", "_style"))]
    # A recipe that asks for more of the base suits it better.
    best = max(of_kind or others, key=lambda recipe: (bool(recipe.words), bool(recipe.has)), default=None)
    return best or build_plain_recipe(base.spec, kind)


def build_plain_recipe(spec: BaseModelSpec, kind: Kind) -> Recipe:
    """Return the settings of the recipe for general pipelines that the script of another base model has, too."""
    general = {spec.script for spec in list_specs() if spec.is_general}
    plain = next(recipe for recipe in list_recipes() if recipe.script in general)
    values = {name: value for name, value in plain.values.items() if name in spec.options.defaults()}
    title = f"{spec.title} has no recipe in configs/recipes/; these are plain settings"
    return replace(plain, name=f"plain_{kind}", script=spec.script, title=title, values=values)


def suits(recipe: Recipe, base: Base) -> bool:
    """Return True if a recipe is for this base model, by its script and flag, its name and its tensors."""
    if recipe.script != base.spec.script:
        return False
    relatives = [spec for spec in list_specs() if spec.script == recipe.script and spec.script_flag]
    selected = [spec for spec in relatives if has_flag(recipe.values, spec.script_flag)]
    has_word = any(word in base.called.lower() for word in recipe.words) or not recipe.words
    has_tensor = any(re.search(recipe.has, name) for name in base.tensors) or not recipe.has
    return selected == ([base.spec] if base.spec.script_flag else []) and has_word and has_tensor


def has_flag(values: Mapping[str, Any], flag: str) -> bool:
    name, _, value = flag.removeprefix("--").partition(" ")
    return values.get(name) == (value or True)


# --- the prediction ---


@dataclass(frozen=True)
class Predicted:
    """The prediction of a base model with the DDPM objective, and how it is known."""

    prediction: Prediction
    why: str
    is_terminal: bool = False  # its noise reaches a signal of zero

    @property
    def values(self) -> dict[str, Any]:
        is_velocity = self.prediction == "v"
        return {"v_parameterization": is_velocity, **({"zero_terminal_snr": True} if self.is_terminal else {})}


def read_prediction(base: Base) -> Predicted | None:
    """Return what the base's files say that it predicts, or None."""
    if base.path.is_dir():
        stated = read_json(base.path / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
        return Predicted("v" if stated == "v_prediction" else "epsilon", "its scheduler says so")
    if V_MARK in base.tensors:
        return Predicted("v", f"it has the tensor {V_MARK}", TERMINAL_MARK in base.tensors)
    stated = read_metadata(base.path).get("modelspec.prediction_type") if is_safetensors(base.path) else None
    return Predicted("v" if stated == "v" else "epsilon", "its metadata say so") if stated in ("v", "epsilon") else None


def find_prediction(
    base: Base, arch: Architecture, asked: Prediction | None, measure: Callable[[], Mapping[Prediction, float]]
) -> Predicted | None:
    """Return what the base predicts: as asked for, as its files say, else by the losses that `measure` returns. None if
    only one thing is possible, as for flow models. Raises UserError if the measurement is not clear."""
    if not isinstance(arch.objective, DDPM) or base.spec.is_general:
        return None
    if asked is not None:
        return Predicted(asked, "--prediction")
    return read_prediction(base) or measure_prediction(base, measure)


def measure_prediction(base: Base, measure: Callable[[], Mapping[Prediction, float]]) -> Predicted:
    """Compare the base's losses on a few photos as noise and as velocity; the smaller is what it learned."""
    losses = measure()
    if torch.cuda.is_available():  # the planner counts what is free for other programs
        gc.collect()
        torch.cuda.empty_cache()
    best: Prediction = "epsilon" if losses["epsilon"] < losses["v"] else "v"
    stated = f"loss {losses['epsilon']:.3f} as noise, {losses['v']:.3f} as velocity on {NUM_MEASURED} photos"
    if min(losses.values()) > CLEAR * max(losses.values()):
        raise about(FLAG)(
            f"{base.name}: it is not clear whether it predicts noise or velocity ({stated}); its page says "
            "which: give --prediction epsilon or --prediction v"
        )
    return Predicted(best, stated)


def measure_losses(base: Base, options: TrainOptions) -> Mapping[Prediction, float]:
    """Return the base model's mean losses on a few photos of the run, which are encoded once."""
    in_memory = {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": False, "min_snr_gamma": None}
    options = options.with_values({**in_memory, "v_parameterization": False})
    predictions: tuple[Prediction, ...] = get_args(Prediction)
    models = [replace(options.model, v_parameterization=prediction == "v") for prediction in predictions]
    archs = [base.spec.build(replace(options, model=model)) for model in models]
    arch, seed = archs[0], options.run.seed or 0
    text = TextPlan.resolve(options.network, arch.text_cache)
    num_photos = len(open_data_plan(options, arch, text, seed, 1).samples)
    share = min(NUM_MEASURED, max(num_photos - 1, 1)) / num_photos if num_photos > 1 else 0.0
    options = replace(options, validation=replace(options.validation, validation_split=share))
    plan = open_data_plan(options, arch, text, seed, 1)
    _, measured = losses_of_files(options, text, arch, plan, seed, [None], find_device(), archs[1:], False)
    means = {}
    for prediction, losses in zip(predictions, measured, strict=True):
        losses_NL = losses.mirrored_NL if losses.held_out_NL is None else losses.held_out_NL
        assert losses_NL is not None
        means[prediction] = losses_NL.mean().item()
    return means
