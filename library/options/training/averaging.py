"""A moving average of the adapter's weights."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole

FILES, PREVIEWS, VALIDATION = "files", "previews", "validation"


@dataclass(frozen=True)
class AveragingOptions(Options):
    """A moving average of the adapter's weights."""

    ema_decay: float | None = option(None, kind=number(0, 0.999999), short_name="ema")
    """Keep an exponential moving average of the adapter's weights with this decay per step, such as 0.999. Training
    itself does not use it. Unset keeps none."""
    ema_update_after_step: int = option(0, kind=whole(0), needs="ema_decay", short_name="emaafter")
    """Steps after which averaging begins; until then the average is the weights themselves."""
    ema_used_for: list[str] | None = option(None, needs="ema_decay", choices=(FILES, PREVIEWS, VALIDATION), nargs="+")
    """Uses of the average: files, previews, validation; the others use the trained weights. Unset is all three."""

    def averages(self, use: str) -> bool:
        """Return True if `use` (`files`, `previews` or `validation`) gets the averaged weights."""
        return bool(self.ema_decay) and (not self.ema_used_for or use in self.ema_used_for)
