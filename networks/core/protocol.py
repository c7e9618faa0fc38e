"""The protocol between network modules and the trainer.

A network module is a Python module with the two functions of `NetworkModule`, which return an `nn.Module`. Our modules,
lycoris.kohya and users' own files are all called in this way. `adopt` wraps one as an `AdoptedNetwork`, which adds what
third-party networks lack.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.base.atomic_files import atomic_path
from library.base.errors import about, error_in
from library.base.suggestions import nearest_name
from library.checkpoints.headers import is_safetensors
from library.checkpoints.marks import RUN, mark_of
from library.checkpoints.relative_change import relative_norm
from library.checkpoints.saving import mark_pickle
from library.environment.module_names import MODULES
from library.environment.packages import describe_broken, describe_fault, pip_name_of

logger = logging.getLogger(__name__)

TextEncoder = nn.Module | list[nn.Module] | None
"""The text encoder, or a list of them if the base model has several."""

OURS = "networks."  # prefix of the names of our own modules


@dataclass(frozen=True)
class NetworkModule:
    """The two functions of an imported network module. Values of network arguments arrive as strings, by keyword.

    `create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None,
    **network_args)` makes a network that is not installed yet.
    `create_network_from_weights(multiplier, file, vae, text_encoder, unet, weights_sd=None, for_inference=False,
    **network_args)` makes one shaped like a file, and returns (the network, the file's tensors), which are not loaded
    into it yet.

    A network is an `nn.Module` whose parameters are the adapter's, and has the methods
    `apply_to(text_encoder, unet, train_text_encoder, train_unet)`,
    `prepare_optimizer_params(text_encoder_lr, unet_lr, learning_rate)`, which returns the optimizer's groups, or
    (groups, their names), and may take the first two arguments only,
    `save_weights(file, dtype, metadata)`.
    Called where they exist: `load_weights(file)`, `enable_gradient_checkpointing()`,
    `prepare_grad_etc(text_encoder, unet)`, `on_epoch_start(text_encoder, unet)`, `get_trainable_params()`,
    `set_multiplier(x)`,
    `prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, learning_rate)`,
    `on_step_start(text_encoder, unet)` before each batch,
    `on_optimizer_step_start(seed, step)` before each batch too, with the run's seed and the number of optimizer steps
    that are finished: the same for all batches of one step, so what a network draws from it is drawn once per step,
    `on_noise_levels(levels)` before each run of the denoiser with the share of noise in each sample, 0 to 1, or with
    None before images are drawn,
    `on_gradients()` before each optimizer step, when its gradients are complete and not clipped yet,
    `apply_max_norm_regularization(limit, device) -> (count, mean, maximum)`,
    `prepare_for(shapes, source)` before the optimizer is built, with the shapes in the state that the run continues,
    `change_norms() -> Iterable[(norm of the change, norm of the base weight)]` at the end of a run,
    `merge_to(text_encoder, unet, weights, dtype, device)`,
    `draws_numbers() -> bool`, False if calls in training draw no random numbers; recomputation is then cheaper,
    `cast_factors() -> Iterable[(layer, modules whose weight is only multiplied with)]`, which are then cast together,
    `joined_downs() -> Iterable[down factors (modules) whose layers may get one input]`, which have a function `product`
    of their input while a block runs,
    `merging(weights, device) -> Iterable[Merging]`, which ours have, so that files are merged while the base is read.
    """

    name: str  # to import it by
    create_network: Callable[..., Any]
    create_network_from_weights: Callable[..., tuple[Any, dict[str, Tensor]]]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Merging:
    """A parameter of the base model, and a function that merges an adapter into its value."""

    layer: nn.Module
    parameter: str
    merged: Callable[[Tensor], Tensor]


def open_network_module(name: str) -> NetworkModule:
    """Import a network module.

    Raises UserError with a fix if it does not exist or is not a network module.
    """
    if name.startswith("."):
        raise about("--network_module")(f"{name} is no name of a module; {_suggest_module(name)}")
    root = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
    except Exception as error:
        # If the error names the module or a package that contains it, the module does not exist. Otherwise something
        # that it imports is missing or broken, or one of our own modules has a bug.
        absent = (error.name or name) if isinstance(error, ModuleNotFoundError) else ""
        if absent and f"{name}.".startswith(f"{absent}."):
            fault = f"there is no such module; {_suggest_module(name)}"
        elif name.startswith(OURS) and describe_fault(error) is None:
            raise
        else:
            fault = describe_fault(error) or describe_broken(root, error)
        raise about("--network_module", cause="not installed")(f"{name}: {fault}") from error
    create = getattr(module, "create_network", None)
    if not callable(create):
        raise about("--network_module")(
            f"{name} is no network module: it lacks the function create_network "
            "(networks/core/protocol.py says what it must offer)"
        )
    from_weights = getattr(module, "create_network_from_weights", None) or _cannot_read_files(name)
    # An assertion or ValueError in one of our own modules is a bug and keeps its traceback.
    if not name.startswith(OURS):
        create, from_weights = _explain_errors(name, create), _explain_reading_errors(name, from_weights)
    return NetworkModule(name, create, from_weights)


def adopt(network: Any) -> "AdoptedNetwork":
    """Wrap a network of any origin.

    Raises UserError if it is not an `nn.Module`, or lacks a method that cannot be replaced.
    """
    if not isinstance(network, nn.Module):
        raise error_in("--network_module")(
            f"the network module gave {network!r} instead of a network", "see its own messages above"
        )
    required = ("apply_to", "prepare_optimizer_params", "save_weights")
    missing = [method for method in required if not callable(getattr(network, method, None))]
    if missing:
        raise error_in("--network_module")(
            f"{type(network).__name__} cannot be trained: it lacks {', '.join(missing)} "
            "(networks/core/protocol.py says what a network must offer)"
        )
    return AdoptedNetwork(network)


class AdoptedNetwork:
    """Wrapper of any network with a uniform interface for the trainer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._trained: list[nn.Parameter] | None = None  # of this epoch; finding them takes a millisecond

    def apply_to(
        self, text_encoder: TextEncoder, denoiser: nn.Module, train_text_encoder: bool, train_denoiser: bool
    ) -> None:
        """Install the network on the models' layers. Models that are not trained are left unchanged and not saved."""
        self._method("apply_to")(text_encoder, denoiser, train_text_encoder, train_denoiser)

    def load_weights(self, path: str | Path) -> None:
        """Load an adapter file and log the network's report."""
        result = self._needed("load_weights", "--network_weights")(str(path))
        logger.info("loaded network weights: %s", result)

    def prepare_for(self, shapes: Mapping[str, Sequence[int]], source: str) -> None:
        """Let the network take the form of weights that are loaded once the optimizer is built."""
        self._optional("prepare_for", shapes, source)

    def merge_to(
        self,
        text_encoder: TextEncoder,
        denoiser: nn.Module,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Merge a file's weights into the base model permanently."""
        self._needed("merge_to", "--base_weights")(text_encoder, denoiser, weights, dtype, device)

    def merging(self, weights: Mapping[str, Tensor], device: torch.device | str) -> Iterable[Merging]:
        """Return the merges of `merge_to`, one parameter at a time, for callers that stream the base weights."""
        merges: Iterable[Merging] = self._needed("merging", "--base_weights")(weights, device)
        return merges

    def enable_gradient_checkpointing(self) -> None:
        """Notify the network that layers are recomputed in the backward pass."""
        self._optional("enable_gradient_checkpointing")

    def parameter_groups(
        self, text_encoder_lr: list[float] | None, unet_lr: float | None, learning_rate: float
    ) -> tuple[list[dict[str, Any]], list[str] | None]:
        """Return parameter groups and their names, without groups that have no parameters or no learning rate.

        The names are None if the network provides none. Raises UserError if nothing is left to train.
        """
        with_many = self._method("prepare_optimizer_params_with_multiple_te_lrs")
        if with_many is not None:
            result = with_many(text_encoder_lr, unet_lr, learning_rate)
        else:
            first_lr = text_encoder_lr[0] if text_encoder_lr else None
            if text_encoder_lr and len(set(text_encoder_lr)) > 1:
                logger.warning(
                    "--text_encoder_lr: this network module takes one value; %s is used, %s is not",
                    first_lr,
                    text_encoder_lr[1:],
                )
            result = self._one_lr_groups(first_lr, unet_lr, learning_rate)
        groups, names = result if isinstance(result, tuple) else (result, None)
        return _trained_groups(list(groups), None if names is None else list(names), learning_rate)

    def prepare_gradients(self, text_encoder: TextEncoder, denoiser: nn.Module) -> None:
        """Enable gradients for the trained parameters."""
        if self._method("prepare_grad_etc") is None:
            self.module.requires_grad_(True)
        self._optional("prepare_grad_etc", text_encoder, denoiser)

    def start_epoch(self, text_encoder: TextEncoder, denoiser: nn.Module) -> None:
        """Notify the network of a new epoch, set it to training mode and cache its trained parameters."""
        self._optional("on_epoch_start", text_encoder, denoiser)
        self.module.train()
        self._trained = self._trainable_parameters()

    def start_step(self, text_encoder: TextEncoder, denoiser: nn.Module) -> None:
        """Notify the network of the next micro-step."""
        self._optional("on_step_start", text_encoder, denoiser)

    def start_optimizer_step(self, seed: int, step: int) -> None:
        """Notify the network of the next micro-step, with the run's seed and the number of finished optimizer steps."""
        self._optional("on_optimizer_step_start", seed, step)

    def set_noise_levels(self, levels_B: Tensor | None) -> None:
        """Set the noise level, 0 to 1, of each sample of the next denoiser call; None before previews."""
        self._optional("on_noise_levels", levels_B)

    def note_gradients(self) -> None:
        """Notify the network that the gradients of an optimizer step are complete."""
        self._optional("on_gradients")

    @property
    def looks_at_gradients(self) -> bool:
        """True if the network uses `note_gradients`, or has `on_gradients` and does not declare whether it uses it."""
        declaration = self._method("looks_at_gradients")
        return self._method("on_gradients") is not None and (declaration is None or declaration())

    @property
    def draws_numbers(self) -> bool:
        """True if calls in training draw random numbers, as dropout does, or the network does not say."""
        declaration = self._method("draws_numbers")
        return declaration is None or bool(declaration())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates and whose gradient norm is clipped."""
        return self._trainable_parameters() if self._trained is None else list(self._trained)

    def _trainable_parameters(self) -> list[nn.Parameter]:
        method = self._method("get_trainable_params")
        parameters = self.module.parameters() if method is None else method()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the network; 0 disables it."""
        method = self._needed("set_multiplier", "training on prompts, pairs or with differential output preservation")
        method(multiplier)

    @property
    def can_limit_norms(self) -> bool:
        return self._method("apply_max_norm_regularization") is not None

    def limit_norms(self, limit: float, device: torch.device | str) -> Tensor:
        """Scale changes down to a norm of `limit`; return (number scaled, mean norm, maximum norm) as one tensor.

        Our networks return it on the device. Third-party networks return numbers, which need a synchronisation.
        """
        if (method := self._method("limit_norms")) is not None:
            numbers: Tensor = method(limit)
            return numbers
        numbers = self._needed("apply_max_norm_regularization", "--scale_weight_norms")(limit, device)
        return torch.tensor([float(value) for value in numbers], dtype=torch.float64)

    def cast_factors(self) -> Iterable[tuple[nn.Module, Sequence[nn.Module]]]:
        """Return the layers whose change has factors that autocast casts whole, and the modules that hold these."""
        method = self._method("cast_factors")
        return () if method is None else method()

    def joined_downs(self) -> Iterable[Sequence[nn.Module]]:
        """Return the down factors whose products are computed together where their layers get one input."""
        method = self._method("joined_downs")
        return () if method is None else method()

    def relative_change(self) -> float | None:
        """Return |W' - W| / |W| over all adapted weights; None if the network does not measure it.

        Reads every adapted weight once, decoded if it is stored in a format.
        """
        method = self._method("change_norms")
        return None if method is None else relative_norm(method())

    def save_weights(self, path: str | Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Write the network atomically; the extension decides the format."""
        # Adapters that copy a convolution's weight copy its layout too (LyCORIS' algo=full), which safetensors refuses.
        hook = self.module.register_state_dict_post_hook(_make_contiguous)  # type: ignore[no-untyped-call]
        try:
            with atomic_path(path) as temporary:
                self._method("save_weights")(str(temporary), dtype, metadata)
                if not is_safetensors(temporary):  # whose metadata names the run
                    mark_pickle(temporary, mark_of(RUN, Path(path)))
        finally:
            hook.remove()

    def _one_lr_groups(self, text_encoder_lr: float | None, unet_lr: float | None, learning_rate: float) -> Any:
        """Call `prepare_optimizer_params` with three arguments, or with two if it does not accept a third."""
        method = self._method("prepare_optimizer_params")
        try:
            # The signature is checked instead of trying the call, whose own TypeError would be taken for a wrong number
            # of arguments.
            inspect.signature(method).bind(text_encoder_lr, unet_lr, learning_rate)
        except TypeError:
            return method(text_encoder_lr, unet_lr)
        return method(text_encoder_lr, unet_lr, learning_rate)

    def _method(self, name: str) -> Any:
        """Return a method of the network, or None if it does not exist."""
        method = getattr(self.module, name, None)
        return method if callable(method) else None

    def _optional(self, name: str, *arguments: Any) -> None:
        if (method := self._method(name)) is not None:
            method(*arguments)

    def _needed(self, name: str, purpose: str) -> Any:
        method = self._method(name)
        if method is None:
            raise error_in("--network_module")(
                f"{purpose} does not work with this --network_module: its network has no {name}()"
            )
        return method


def _make_contiguous(_module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Make the tensors of a state dict contiguous, in place."""
    state.update({key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)})


def _trained_groups(
    groups: list[dict[str, Any]], names: list[str] | None, learning_rate: float
) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Keep groups with parameters and a learning rate; a group without `lr` uses `learning_rate`.

    Raises UserError if no group has parameters, or if no group is left.
    """
    kept: list[dict[str, Any]] = []
    kept_names: list[str] = []
    # Parameters can come as an iterator, which can be read only once.
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise error_in("--network_args")(
            "nothing would be trained: --network_module attached to no layer of this base model",
            "look at what --network_args, such as a preset or a pattern, and --network_train_*_only leave over",
        )
    for index, group in enumerate(groups):
        lr = group.get("lr", learning_rate)
        if not group["params"] or not lr:
            continue
        kept.append(group)
        kept_names.append(names[index] if names is not None and index < len(names) else f"group{index}")
    if not kept:
        raise error_in("--learning_rate")(
            "nothing would be trained: every part of the adapter has the learning rate 0",
            "set --learning_rate, --unet_lr or --text_encoder_lr",
        )
    return kept, kept_names if names is not None else None


def _explain_errors(name: str, create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_network` to turn AssertionError and ValueError into a UserError with the module's name and a fix.

    Third parties raise these errors for settings that they do not support.
    """

    def create_network(*arguments: Any, **keywords: Any) -> Any:
        try:
            return create(*arguments, **keywords)
        except (AssertionError, ValueError) as error:
            hint = "check --network_dim and --network_args against the documentation of that module"
            if name.startswith("lycoris.") and "duplicated lora name" in str(error):
                hint = 'its preset names a layer of this base model twice; add --network_args "preset=attn-mlp"'
            raise about("--network_module")(f"{name} cannot make a network ({error}): {hint}") from error

    return create_network


def _explain_reading_errors(name: str, create: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Tensor]]]:
    """Wrap `create_network_from_weights` to turn AssertionError into a UserError with the module's name and a fix."""

    def create_network_from_weights(
        multiplier: float, file: str, *arguments: Any, **keywords: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        try:
            result: tuple[Any, dict[str, Tensor]] = create(multiplier, file, *arguments, **keywords)
            return result
        except AssertionError as error:
            raise about("--network_module")(
                f"{name} cannot read {file} for this base model ({error})",
                "use one of networks.*, which read files of most kinds, or merge it into the base model with "
                "tools/merge_lora.py",
            ) from error

    return create_network_from_weights


def _cannot_read_files(name: str) -> Callable[..., tuple[Any, dict[str, Tensor]]]:
    def create_network_from_weights(*_: Any, **__: Any) -> tuple[Any, dict[str, Tensor]]:
        raise about("--dim_from_weights", others=["--base_weights"])(
            f"and --base_weights do not work with --network_module {name}: it lacks "
            "the function create_network_from_weights"
        )

    return create_network_from_weights


def _own_modules() -> list[str]:
    """List our own network modules; the folder also contains commands, which are not network modules."""
    files = Path(__file__).parents[1].glob("*.py")
    return sorted(f"networks.{file.stem}" for file in files if "create_network" in file.read_text(encoding="utf-8"))


def _suggest_module(name: str) -> str:
    root = name.partition(".")[0]
    if root in MODULES.values():
        return f"install it with: pip install {pip_name_of(root)}"
    known = [*_own_modules(), "lycoris.kohya"]
    nearest = nearest_name(name, known)
    return f"did you mean {nearest}?" if nearest else f"there are: {', '.join(known)}, or a Python file of your own"
