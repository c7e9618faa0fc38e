"""The classes that a pipeline's folder names. No file of the folder is run, unless the user trusts it.

A class is of diffusers or transformers. [file, class] in model_index.json means that the class is in a Python file of
the model itself: beside model_index.json for the pipeline, in the component's subfolder for a component.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from library.architectures.any_pipeline.own_code import import_own_class
from library.base.errors import UserError, about
from library.environment.packages import describe_lack, list_lacks

logger = logging.getLogger(__name__)

# Their from_pretrained imports a file that auto_map names only if it is told to trust it.
AUTO_CLASSES = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")
INDEX = "model_index.json"
LONGEST = 200  # letters of a name, which becomes that of a file


@dataclass(frozen=True)
class FolderClasses:
    """Finds the classes that the folder `path` names. Every error names `flag`, which named the folder."""

    flag: str
    path: Path
    trusts_code: bool

    def find_pipeline(self, entry: Any) -> type[Any]:
        """Return the class of `_class_name`. Raises UserError for anything but a pipeline of diffusers or, if it is
        trusted, of the folder."""
        import diffusers

        if isinstance(entry, list):
            file, name = self._read_words("_class_name", entry)
            kind = self._import(self.path / f"{file}.py", name)
        else:
            _, name = self._read_words("_class_name", ["diffusers", entry])
            kind = self._look_up(diffusers, name, name)
        if not issubclass(kind, diffusers.DiffusionPipeline):
            raise UserError(
                f"{self.flag} {self.path}: {name} is no pipeline that can be built from its parts (a DiffusionPipeline "
                "of diffusers); modular pipelines are not supported"
            )
        return kind

    def find_component(self, component: str, entry: Any, pipeline: type[Any]) -> type[Any]:
        """Return the class of a component. Raises UserError for one that cannot be loaded, or is not trusted."""
        import diffusers
        import transformers

        library, name = self._read_words(component, entry)
        file = self.path / component / f"{library}.py"
        owner = {"diffusers": diffusers, "transformers": transformers}.get(library)
        if owner is transformers and not hasattr(owner, name):
            # Diffusers adds a class of PRX to transformers, which exchanges its module in sys.modules while it loads:
            # the class may be in the old one. It is in the pipeline's package, too.
            package = sys.modules.get(pipeline.__module__.rpartition(".")[0])
            owner = package if hasattr(package, name) else owner
        if owner is None:
            owner = getattr(diffusers.pipelines, library, None)
        is_native = isinstance(owner, ModuleType) and isinstance(getattr(owner, name, None), type)
        kind = self._import(file, name) if not is_native and file.is_file() else None
        kind = kind or self._look_up(owner, name, f"its {component} {name}")
        # Not DiffusionPipeline: its from_pretrained runs files of a folder, as diffusers before 0.38 does unasked.
        bases = [diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel]
        bases += [transformers.utils.PushToHubMixin]  # of tokenizers and processors
        bases += [diffusers.BaseGuidance] if hasattr(diffusers, "BaseGuidance") else []
        if not issubclass(kind, tuple(bases)) and not (owner is transformers and name in AUTO_CLASSES):
            raise UserError(
                f"{self.flag} {self.path}: {INDEX} names {name} as {component}, which is no model, scheduler, "
                "tokenizer or processor that can be loaded",
                "download the file again",
            )
        return kind

    def _read_words(self, key: str, entry: Any) -> tuple[str, str]:
        """Return (library or file, class). Raises UserError unless both are names in Python, so no path can hide."""
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not is_pair or not all(isinstance(w, str) and w.isidentifier() and len(w) < LONGEST for w in entry):
            raise UserError(
                f"{self.flag} {self.path}: {INDEX} has {str(entry)[:80]!r} as {key}, which names no class",
                "download the file again",
            )
        return entry[0], entry[1]

    def _look_up(self, owner: Any, name: str, called: str) -> type[Any]:
        import diffusers
        import transformers

        kind = getattr(owner, name, None) if isinstance(owner, ModuleType) else None
        if type(kind).__name__ == "DummyObject":  # stands for a class whose packages are missing
            packages = vars(kind)["_backends"]
            # All are installed if one is broken or too old.
            lack = describe_lack(*(list_lacks(*packages) or packages))
            raise about(self.flag, self.path, cause="not installed")(f": {name} {lack}")
        if not isinstance(kind, type):
            own = "" if self.trusts_code else ", or add --trust_remote_code if it is code of the model itself"
            raise UserError(
                f"{self.flag} {self.path}: {called} is neither in diffusers {diffusers.__version__} nor in "
                f"transformers {transformers.__version__}",
                f"install a newer version that has it{own}",
            )
        return kind

    def _import(self, file: Path, name: str) -> type[Any]:
        """Run a file of the folder and return its class. Raises UserError unless it is trusted."""
        if not self.trusts_code:
            raise UserError(
                f"{self.flag} {self.path}: {name} is Python code of this model itself ({file}). Read that file, and "
                "add --trust_remote_code to run it"
            )
        if not file.is_file():
            raise UserError(f"{self.flag} {self.path}: {INDEX} takes {name} from {file}, which is missing")
        kind = import_own_class(file, name)
        if not isinstance(kind, type):
            raise UserError(f"{self.flag} {self.path}: {file} has no class {name}, which {INDEX} names")
        return kind


def find_components(
    classes: FolderClasses, index: Mapping[str, Any], pipeline: type[Any], taken: Mapping[str, Any]
) -> dict[str, type[Any]]:
    """Return the classes of the components that the index names and the pipeline takes, in the order of the index."""
    # Lists of numbers are settings of the pipeline.
    entries = {k: v for k, v in index.items() if isinstance(v, list) and any(isinstance(word, str) for word in v)}
    for name in sorted(entries.keys() - taken.keys()):
        logger.warning("%s: its pipeline takes no component %s; ignoring it", classes.path / INDEX, name)
    return {name: classes.find_component(name, entry, pipeline) for name, entry in entries.items() if name in taken}


def is_absent(entry: Any) -> bool:
    """Return True for the entry of a component that a pipeline goes without."""
    return isinstance(entry, list) and bool(entry) and entry[0] is None
