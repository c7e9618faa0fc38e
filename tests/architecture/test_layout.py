"""Layers hold: imports point down and resolve, and files and functions stay short."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, python_files, scripts, source_of, text_of

PATHS = python_files("library", "networks")
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}

# Every folder, and every module next to folders, from the bottom up. One line is one layer, whose parts may import
# each other as long as there is no cycle. A longer name takes precedence over a shorter one.
LAYERS = (
    ("library.base",),
    ("library.types", "library.environment"),
    ("library.processes",),
    ("library.options",),
    ("library.checkpoints",),
    ("library.memory.small_convolutions", "library.memory.devices", "library.memory.pinned"),
    ("library.memory.codecs",),
    ("library.memory.formats", "library.memory.offload", "library.memory"),
    ("library.memory.planner",),
    ("library.diffusion",),
    ("networks.core.protocol",),
    ("networks.core.arguments",),
    ("networks.core.targets",),
    ("networks.core.changes",),
    ("networks.core.registry",),
    ("networks.core.kinds",),
    ("networks.core.files",),
    ("networks.core.network",),
    ("library.protocols",),
    ("library.models",),
    ("library.architectures.specs", "library.architectures.scripts"),
    ("library.architectures",),
    ("library.data.description",),
    ("library.data.decoding",),
    ("library.data.scanned",),
    ("library.data.sources",),
    ("library.data.plan",),
    ("library.data.caching",),
    ("library.data.batches",),
    ("library.data.concepts",),
    ("library.data.training_data", "library.data.debug_dataset"),
    ("library.training.config_file",),
    ("library.translation",),
    ("library.training.step",),
    ("library.training.optimization",),
    ("library.training.reporting",),
    ("library.training.report_page",),
    ("library.training.run_parts",),
    ("library.training.saving",),
    ("library.training.failures",),
    ("library.training.evaluation",),
    ("library.training.models",),
    ("library.training.loop",),
    ("library.training.planning",),
    ("library.training.run",),
    ("library.training.sweep",),
    ("library.training.offline",),
    ("library.training.command_line",),
    ("library.commands",),
    ("library.train_photos", "library.front_ends"),
    ("library.training.run_queue",),
    ("library.page",),
)
LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}

# Modules that scripts share, that other programs import as sd-scripts, or that --network_module and front ends name:
# they have no content of their own, may import anything, and nothing imports them.
IMPORTED = (
    "train_util", "model_util", "sdxl_model_util", "flux_train_utils", "huggingface_util", "utils", "args",
    "compile_utils", "qwen_image_autoencoder_kl_2d", "errors",
    "training.command_line.training_script", "training.command_line.caching_script",
)  # fmt: skip
ENTRY_POINTS = {f"library.{name}" for name in IMPORTED} | {
    module for module in MODULES if module.startswith("networks.") and not module.startswith("networks.core")
}
PACKAGES = ("library", "networks", "networks.core", "library.data", "library.training")  # their __init__ has no names

# In addition to the order: layers that must not import one below them, except for the listed modules.
FORBIDDEN = {
    "library.training": ("library.architectures", "library.models", "networks.core"),
    "library.data": ("library.architectures", "library.models", "library.diffusion", "library.memory", "networks"),
    "library.architectures": ("networks.core",),
    "library.models": ("networks.core",),
    "library.protocols": ("networks.core",),
    "networks": ("library.architectures", "library.models", "library.memory", "library.diffusion", "library.options"),
    "library.diffusion": ("library.checkpoints",),
    "library.memory": ("library.options", "library.checkpoints", "library.types"),
}
EXCEPT = (
    "networks.core.protocol", "networks.core.targets.targets", "library.options.declared", "library.options.kinds",
    "library.options.network_args", "library.options.other_programs",
)  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Return the project modules that a file imports, including imports in functions and for type checking."""
    names: set[str] = set()
    for module, taken in source_of(path).imports:
        submodules = {f"{module}.{name}" for name in taken}
        names |= {name if name in MODULES else module for name in submodules} if taken else {module}
    return {name for name in names if name in MODULES}


@cache
def imports() -> dict[str, set[str]]:
    """Return the imports of each module."""
    return {module: imports_of(path) for module, path in MODULES.items()}


def layer_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    matches = [part for part in LAYER if module == part or module.startswith(part + ".")]
    assert matches, f"{module} is in no layer; add its folder to LAYERS"
    return max(matches, key=len)


def folders() -> dict[str, str]:
    """Return the folder of each module; a module next to folders counts as its own folder."""
    parents = {path.parent for path in PATHS}
    with_folders = {folder for folder in parents if any(folder in other.parents for other in parents)}
    return {
        module: module if path.parent in with_folders else ".".join(path.parent.parts)
        for module, path in MODULES.items()
    }


def inside(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def upward_imports() -> Iterator[str]:
    yield from (module for module in MODULES if module not in ENTRY_POINTS and module not in PACKAGES)


def test_no_folders_import_each_other_in_a_cycle() -> None:
    folder = folders()
    graph: dict[str, set[str]] = {name: set() for name in folder.values()}
    for module, imported in imports().items():
        graph[folder[module]] |= {folder[other] for other in imported} - {folder[module]}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        cycle = error.args[1]
        lines = [
            f"{module} imports {other}"
            for module, imported in imports().items()
            for other in imported
            if folder[module] != folder[other] and folder[module] in cycle and folder[other] in cycle
        ]
        pytest.fail("\n".join([" <- ".join(cycle), *sorted(lines)]))


def test_imports_point_down() -> None:
    for module in upward_imports():
        here = layer_of(module)
        for other in imports()[module] - set(PACKAGES):
            assert other not in ENTRY_POINTS, f"{module} imports {other}, which is for other programs"
            there = layer_of(other)
            assert LAYER[there] <= LAYER[here], f"{module} ({here}) imports {other} from the layer above it ({there})"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_layers_import_only_what_they_may(part: str) -> None:
    for module in upward_imports():
        if inside(module, (part,)):
            violations = {
                other
                for other in imports()[module]
                if inside(other, FORBIDDEN[part]) and not inside(other, (part, *EXCEPT))
            }
            assert not violations, f"{module} imports {sorted(violations)}; {part} must not know {FORBIDDEN[part]}"


def test_no_base_model_imports_another() -> None:
    for module in MODULES:
        if module.startswith("library.architectures.") and module.count(".") > 2:
            own_package = ".".join(module.split(".")[:3])
            other_models = {o for o in imports()[module] if o.startswith("library.architectures.") and o.count(".") > 2}
            assert all(inside(other, (own_package,)) for other in other_models), f"{module} imports {other_models}"


def test_only_the_command_line_knows_sweeps() -> None:
    """A sweep goes around runs: no part of a run is there for several of them. A plan counts a sweep's."""
    sweep = ("library.training.sweep",)
    users = {module for module, imported in imports().items() if any(inside(other, sweep) for other in imported)}
    assert {user for user in users if not inside(user, sweep)} == {
        "library.training.command_line.sweeps",
        "library.commands.counted_plan",
    }


@pytest.mark.parametrize("folder", [".", "tools", "networks", "src/musubi_tuner"])
def test_no_file_beside_a_script_has_a_standard_name(folder: str) -> None:
    """The folder of a started script comes first on the module path: torch would import its queue.py."""
    names = {path.stem for path in (ROOT / folder).glob("*") if path.suffix == ".py" or path.is_dir()}
    assert not names & sys.stdlib_module_names


def test_every_layer_exists() -> None:
    for part in LAYER:
        assert any(module == part or module.startswith(part + ".") for module in MODULES), part


def test_old_paths_of_tools_have_no_options_of_their_own() -> None:
    doors = [path for path in python_files("networks", "finetune") if len(path.parts) == 2]
    assert len(doors) > 20 and [str(path) for path in doors if "add_argument" in text_of(path)] == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    """Imports inside functions count: one there hides a cycle, it does not break it."""
    list(TopologicalSorter({module: others - {module} for module, others in imports().items()}).static_order())


def test_files_are_written_and_recognised_without_torch() -> None:
    modules = "library.base.atomic_files, library.checkpoints.headers, library.checkpoints.marks"
    command = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


# Every import of our modules resolves, also inside functions that no test calls, such as in benchmarks.

OURS = ("library", "networks", "tools", "finetune", "tests", "benchmarks")
MADE_UP = ("library.architectures.knots", "tests.made_up.knots")  # where a test copies a package to, and its source


def file_of(module: str) -> Path | None:
    """Return the source of one of our modules."""
    path = Path(*module.replace(*MADE_UP).split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / p).is_file()), None)


def missing_in(path: Path) -> list[str]:
    """Return the names that a file imports from our modules and that do not exist."""
    missing = []
    for module, names in source_of(path).imports:
        if module.split(".")[0] in OURS:
            source = file_of(module)
            there = source_of(source).defined if source is not None else frozenset()
            missing += [f"{module}.{name}" for name in names if name not in there and not file_of(f"{module}.{name}")]
    return missing


def test_imports_of_our_modules_resolve() -> None:
    unresolved = {path.as_posix(): missing_in(path) for path in (*python_files(*OURS), *scripts())}
    assert {path: missing for path, missing in unresolved.items() if missing} == {}


# No file is too long to read at once, and no function has too many branches.

MOST_LINES, MOST_BRANCHES = 500, 20
# Functions that have more, with their number. None may be added.
MORE_BRANCHES = {
    ("tools/check_lora_weights.py", "judge"): 21,
    ("tools/merge_adapters.py", "make_metadata"): 22,
    ("tools/merge_adapters.py", "merge_adapters"): 22,
}

SOURCES = [*python_files("library", "networks", "tools", "benchmarks"), *scripts()]


def test_files_have_at_most_500_lines() -> None:
    long = {str(path): count for path in SOURCES if (count := text_of(path).count("\n")) > MOST_LINES}
    assert not long, "split them by topic"


def test_functions_have_at_most_20_branches() -> None:
    over = {
        f"{path}: {name} has {count}"
        for path in SOURCES
        for name, count, _ in source_of(path).functions
        if count > MORE_BRANCHES.get((path.as_posix(), name), MOST_BRANCHES)
    }
    assert not over


# CONTRIBUTING.md sends readers to files and names that exist.

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Where things are")[2]
PATH = r"(?<![\w./-])(?:library|networks|tests|docs|tools|benchmarks|\.ci)/[\w./-]*[\w/]"
NAMED = sorted(set(re.findall(PATH, PAGE)))
NAMED_MODULES = sorted(set(re.findall(r"(?<!\w)(?:tests|benchmarks)(?:\.[a-z_]+)+", PAGE)))  # of commands
SYMBOLS = sorted(set(re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", TABLE)))


def test_the_table_names_files_and_symbols() -> None:
    assert len(NAMED) > 40 and len(SYMBOLS) > 10
    assert len(SYMBOLS) == len(set(re.findall(r"`\S+` \(`.*?\)", TABLE))), "write `path.py` (`name`)"


@pytest.mark.parametrize("path", NAMED)
def test_named_files_exist(path: str) -> None:
    place = ROOT / path
    assert any(place.iterdir()) if path.endswith("/") else place.stat().st_size > 0


def test_named_modules_exist() -> None:
    assert len(NAMED_MODULES) > 3 and [name for name in NAMED_MODULES if find_spec(name) is None] == []


@pytest.mark.parametrize(("path", "symbol"), SYMBOLS)
def test_named_symbols_are_defined_there(path: str, symbol: str) -> None:
    """A path without folders is a module of every base model."""
    files = [ROOT / path] if "/" in path else [*(ROOT / "library" / "architectures").glob(f"*/{path}")]
    defined = {name for file in files for name in definitions(ast.parse(file.read_text(encoding="utf-8")))}
    assert symbol in defined


def definitions(tree: ast.Module) -> set[str]:
    """Return the names of functions, classes, constants and fields."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(name)):
                names.add(name)
            case ast.Assign(targets=[ast.Name(name)]):
                names.add(name)
    return names
