"""The names of the files of a run."""

import re
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.overwriting import FileKind
from library.options.output.saving import SavingOptions
from library.training.reporting.events import SavedFor
from library.training.saving.own_files import adapter_kind, state_kind
from library.training.saving.state_names import MOMENT, STATE, TIMED, is_of_run, is_state_name

STEM_ENDING = re.compile(rf"({MOMENT}|-best)?")


@dataclass(frozen=True)
class Names:
    """The file names of a run, based on its output name, else on `epoch`, `at` and `last`."""

    folder: Path
    output_name: str | None
    extension: str

    @classmethod
    def build(cls, options: SavingOptions) -> "Names":
        assert options.output_dir is not None
        return cls(Path(options.output_dir), options.output_name or None, options.save_model_as or "safetensors")

    def of_epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.output_name or 'epoch'}-{epoch:06d}.{self.extension}"

    def of_step(self, step: int) -> Path:
        return self.folder / f"{self.output_name or 'at'}-step{step:08d}.{self.extension}"

    def of_end(self) -> Path:
        return self.folder / f"{self.output_name or 'last'}.{self.extension}"

    def of_best(self) -> Path:
        return self.folder / f"{f'{self.output_name}-' if self.output_name else ''}best.{self.extension}"

    def of_timed_state(self, step: int) -> Path:
        return self.of_step(step).with_name(f"{self.of_step(step).stem}{TIMED}{STATE}")

    def list_timed_states(self) -> list[Path]:
        """List the folders of the run's states of --save_every_n_minutes, whole or not."""
        folders = self.folder.glob(f"*{TIMED}{STATE}")
        return sorted(path for path in folders if path.is_dir() and is_state_name(path.name, self.starts))

    def find_purpose(self, path: Path) -> SavedFor:
        """Return the purpose for which a file of this run was saved."""
        if path == self.of_end():
            return "end"
        if path == self.of_best():
            return "best"
        return "step" if re.fullmatch(r".*-step\d{8}", path.stem) else "epoch"

    def path_with_ending(self, ending: str) -> Path:
        """Return a file of the run that is not weights, such as its report."""
        return self.folder / f"{self.output_name or 'last'}{ending}"

    @property
    def adapter_kind(self) -> FileKind:
        """Return the kind of this run's weight files, to tell them from other files of these names."""
        return adapter_kind(self.output_name)

    @property
    def state_kind(self) -> FileKind:
        """Return the kind of this run's states, to tell them from other folders of these names."""
        return state_kind(self.output_name, self.starts)

    def of_report(self) -> Path:
        return self.path_with_ending("-report.html")

    def of_profile(self) -> Path:
        return self.path_with_ending("-profile.json.gz")

    def has_stem(self, stem: str) -> bool:
        """Return True if a weights file or report of this run may have this name (without extension)."""
        if stem in (self.of_best().stem, self.of_report().stem):
            return True
        return is_of_run(stem, self.starts, STEM_ENDING)

    @property
    def starts(self) -> tuple[str, ...]:
        """Return the prefixes of this run's file names."""
        return (self.output_name,) if self.output_name else ("epoch", "at", "last")


def state_folder(weights: Path) -> Path:
    return weights.with_name(weights.stem + STATE)
