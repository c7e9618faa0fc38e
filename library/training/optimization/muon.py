"""Muon for matrices and AdamW for other weights, as one optimizer."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) updates weights with two axes; AdamW updates all others, such as factors of
    convolutions, norms, magnitudes and single rows.

    Its groups are those that it is given, so that learning rates, charts and states see one optimizer. Muon's steps are
    scaled to the size of AdamW's (`adjust_lr_fn`, Liu et al. 2025, arXiv:2502.16982), so that one rate suits both.
    """

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """`betas` and `eps` are for AdamW, `weight_decay` for both, the others for Muon."""
        super().__init__([dict(group) for group in params], {"lr": lr})
        self._of_muon = {
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self._of_adamw = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
        self._parts = self._make_parts()
        weights = [p for group in self.param_groups for p in group["params"]]
        logger.info(
            "Muon moves %d of the %d weights, which are matrices; AdamW moves the others",
            sum(map(is_matrix, weights)),
            len(weights),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step both optimizers at the current learning rates of the groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, numbers in self._parts:
            for group, number in zip(part.param_groups, numbers, strict=True):
                group["lr"] = self.param_groups[number]["lr"]
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state, and the settings, which the parts alone have in their groups."""
        return {**super().state_dict(), "settings": {"muon": self._of_muon, "adamw": self._of_adamw}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with its settings, as torch's optimizers do."""
        super().load_state_dict(state_dict)
        settings = state_dict.get("settings")  # older states have none
        if settings is not None:
            self._of_muon, self._of_adamw = settings["muon"], settings["adamw"]
        # Loading replaces the state and the groups that the parts share.
        self._parts = self._make_parts()

    def _make_parts(self) -> list[tuple[Optimizer, list[int]]]:
        """Build Muon and AdamW on parts of our groups; their state is ours."""
        parts: list[tuple[Optimizer, list[int]]] = []
        for is_muon in (True, False):
            selected = [[p for p in group["params"] if is_matrix(p) == is_muon] for group in self.param_groups]
            numbers = [number for number, weights in enumerate(selected) if weights]
            groups = [{"params": selected[number], "lr": self.param_groups[number]["lr"]} for number in numbers]
            if not groups:
                continue
            make: Callable[..., Optimizer] = torch.optim.Muon if is_muon else torch.optim.AdamW
            part = make(groups, **(self._of_muon if is_muon else self._of_adamw))
            part.state = self.state
            parts.append((part, numbers))
        return parts


def is_matrix(weight: Tensor) -> bool:
    """Return True if a weight has two axes, both longer than 1."""
    return weight.dim() == 2 and min(weight.shape) > 1
