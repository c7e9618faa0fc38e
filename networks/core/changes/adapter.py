"""One adapted module, and how it takes its layer's forward without changing the base model's module tree."""

from collections.abc import Mapping

from torch import Tensor, nn

from library.base.errors import UserError
from networks.core.changes.change import Change, Forward
from networks.core.targets.targets import TargetModule


def take_forward(layer: nn.Module, forward: Forward) -> Forward:
    """Replace the forward of a layer and return the previous one."""
    base: Forward = layer.forward
    layer.forward = forward  # type: ignore[assignment]
    return base


def give_forward_back(layer: nn.Module, forward: Forward, base: Forward, path: str) -> None:
    """Undo `take_forward`. Raises UserError naming the layer where something wrapped it again since."""
    if layer.__dict__.get("forward") != forward:
        raise UserError(f"{path} was wrapped again after this adapter", "remove the later wrapping first")
    # Without the attribute of the instance the method of the layer's class is found again.
    del layer.__dict__["forward"]
    if base != layer.forward:  # it was wrapped before us
        layer.forward = base  # type: ignore[assignment]


class Adapter:
    """A change and the layer it acts on, applied with strength `multiplier`.

    While installed it replaces the layer's `forward`, so the base model's module tree, keys and hooks are unchanged.
    """

    def __init__(self, target: TargetModule, change: Change, multiplier: float) -> None:
        self.target = target
        self.change = change
        self.multiplier = multiplier
        self._base_forward: Forward | None = None

    @property
    def is_installed(self) -> bool:
        return self._base_forward is not None

    def install(self) -> None:
        """Replace the layer's forward."""
        assert not self.is_installed
        self._base_forward = take_forward(self.target.module, self.forward)

    def remove(self) -> None:
        """Restore the layer's forward. Adapters that were installed later must be removed first."""
        if self._base_forward is None:
            return
        give_forward_back(self.target.module, self.forward, self._base_forward, self.target.path)
        self._base_forward = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output.

        The parameter has the name that it has in torch's layers, which some models call by keyword.
        """
        assert self._base_forward is not None
        if self.multiplier == 0:
            return self._base_forward(input)
        # Call the method, not the module: the hooks that trace NaN are on the layer, which calls this forward.
        return self.change.forward(input, self._base_forward, self.multiplier)

    def merged(self) -> Mapping[str, Tensor]:
        """Return the layer's parameters with the adapter merged in, by name."""
        parameters = {}
        for name in self.change.changed_parameters:
            base = getattr(self.target.module, name)
            assert isinstance(base, Tensor)
            parameters[name] = self.merged_into(base, name)
        return parameters

    def merged_into(self, base: Tensor, name: str) -> Tensor:
        """Return `base` with the adapter merged in. It takes the place of the layer's own parameter `name`."""
        return self.change.merged(base, self.multiplier, name)
