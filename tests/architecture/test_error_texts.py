"""Errors carry fields and a remedy, and everything printed is escaped."""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from library.base.errors import UserError
from tests.architecture.sources import python_files, scripts, text_of

READ_ELSEWHERE: Mapping[str, str] = {  # function that reads an error's text -> whose words they are
    "library/architectures/any_pipeline/kept.py::read_convention": "safetensors' and json's first line",
    "library/architectures/any_pipeline/folder.py::PipelineFolder.load": "torch's, of memory that ran out",
    "library/architectures/any_pipeline/watch.py::own_words": "the pipeline's own",
    "library/checkpoints/files.py::load_pickle": "torch's: objects that it refuses, and its first line",
    "library/base/atomic_files.py::full_disk_named": "safetensors' and torch's, on a full disk",
    "library/checkpoints/model_lookup.py::fetch_snapshot": "the hub's",
    "library/data/sources/dataset_name.py::first_line": "those of datasets, or of the hub",
    "library/data/sources/storage/object_storage.py::clean_message": "fsspec's, which may hold passwords",
    "library/base/errors.py::reason_of": "the system's, without blanks at its ends",
    "library/environment/packages.py::describe_broken": "a package's own, of which the first line is shown",
    "library/environment/packages.py::find_missing": "transformers' and diffusers', with the package's name",
    "library/base/determinism.py::explain_nondeterminism": "torch's: the operation without a fixed order",
    "library/base/json_text.py::explain_parse_error": "json's and tomllib's advice on long numbers",
    "library/base/json_text.py::find_place": "json's and tomllib's: line and column",
    "library/memory/fused_kernels.py::*": "the compiler's first line",
    "library/memory/pinned.py::*": "CUDA's first line",
    "library/models/tokenizer_files.py::*": "tokenizers' first line",
    "library/options/config_file.py::read_toml": "tomllib's, of backslashes",
    "library/processes/process_group.py::format_first_line": "the line that other processes are told",
    "library/processes/process_group.py::Processes.reporting_failures": "torch's connections: RuntimeError alone",
    "library/training/reporting/trackers.py::start_trackers": "wandb's",
    "library/training/command_line/caching.py::select_backend": "torch's first line",
    "library/training/evaluation/image_scores.py::*": "transformers' first line",
    "library/training/failures/nondeterministic.py::*": "torch's: the operation without a fixed order",
    "library/training/failures/vae_memory.py::VaeFallback.run": "CUDA's, of memory that ran out",
    "library/training/failures/out_of_memory.py::*": "CUDA's, of memory that ran out",
    "library/training/models/arithmetic.py::*": "torch's first line",
    "library/training/optimization/optimizers.py::*": "an optimizer's, shortened",
    "library/training/run_queue/runner.py::Runner.warn": "the system's, logged once",
    "networks/core/protocol.py::*": "LyCORIS', of a layer named twice",
    "library/commands/command.py::resolve_device": "torch's first line",
    "tools/doctor.py::*": "those of torch, the driver and packages",
    "library/train_photos/captioner.py::*": "transformers' first line",
}


@cache
def user_errors() -> frozenset[str]:
    """Return the names of UserError and its subclasses in the sources."""
    classes = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for path in python_files("library", "networks", "tools")
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.ClassDef)
    }
    found = {UserError.__name__}
    while more := {name for name, bases in classes.items() if bases & found} - found:
        found |= more
    return frozenset(found)


def caught(node: ast.expr | None, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield the names of the exceptions that a handler catches, those in tuples and of constants too."""
    match node:
        case None:
            yield "BaseException"
        case ast.Tuple():
            for item in node.elts:
                yield from caught(item, constants)
        case ast.Starred():
            yield from caught(node.value, constants)
        case ast.Name(name) if name in constants:
            yield from caught(constants[name], constants)
        case _:
            yield ast.unparse(node).rpartition(".")[2]


def is_text(node: ast.AST, names: set[str]) -> bool:
    """Return True for str(error), repr(error), f"{error}" alone, error.args, error.message and error.remedy."""
    match node:
        case ast.Call(func=ast.Name("str" | "repr"), args=[ast.Name(name)]):
            return name in names
        case ast.Attribute(value=ast.Name(name), attr="args" | "message" | "remedy" | "reason"):
            return name in names
        case ast.JoinedStr(values=[ast.FormattedValue(value=ast.Name(name))]):
            return name in names
        case ast.Call(func=ast.Attribute(value=ast.Call() | ast.Attribute() | ast.JoinedStr() as text)):
            return is_text(text, names)  # str(error).strip()
    return False


def reads(body: ast.AST, names: set[str]) -> Iterator[int]:
    """Yield the lines that take an error's text apart or compare it; showing it whole is no reading."""
    texts = set(names)
    for node in ast.walk(body):
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=value) if is_text(value, names):
                texts.add(name)  # text = str(error)
    aliases = texts - names

    def is_any_text(node: ast.AST) -> bool:
        return is_text(node, names) or (isinstance(node, ast.Name) and node.id in aliases)

    for node in ast.walk(body):
        match node:
            case ast.Call(func=ast.Attribute(value=value)) if is_any_text(value):
                yield node.lineno  # str(error).removeprefix(path)
            case ast.Subscript(value=value) if is_any_text(value):
                yield node.lineno
            case ast.Compare(left=left, comparators=others) if any(map(is_any_text, [left, *others])):
                yield node.lineno
            case ast.Call(func=ast.Attribute(attr=attr), args=[*args]) if attr in PATTERNS and any(
                map(is_any_text, args)
            ):
                yield node.lineno  # NAMED.findall(str(error)), re.search("x", str(error))


PATTERNS = (
    "search",
    "match",
    "fullmatch",
    "findall",
    "finditer",
    "split",
    "sub",
    "partition",
    "count",
    "index",
    "find",
)
ERRORS = (
    "Error",
    "Exception",
    "Misfit",
    "NotThere",
    "Refused",
    "ProcessLost",
    "NotUtf8",
    "DamagedImage",
    "NoDataFound",
)


def find_readers(source: str) -> list[tuple[str, int, bool]]:
    """Return (function, line, whether it may be a UserError alone) of everything that reads an error's text."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Tuple)
    }
    found = []

    def visit(node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = place
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{place}.{child.name}".lstrip(".")
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                errors = {
                    a.arg
                    for a in [*child.args.args, *child.args.kwonlyargs]
                    if a.annotation is not None and ast.unparse(a.annotation).split(" | ")[0].endswith(ERRORS)
                }
                found.extend((name, line, False) for line in reads(child, errors) if errors)
            if isinstance(child, ast.ExceptHandler) and child.name is not None:
                kinds = set(caught(child.type, constants))
                found.extend((name, line, bool(kinds & user_errors())) for line in reads(child, {child.name}))
            visit(child, name)

    visit(tree, "")
    return found


def test_handlers_of_our_errors_read_no_text() -> None:
    sources = [*python_files("library", "networks", "tools"), *scripts()]
    readers = [(path.as_posix(), *found) for path in sources for found in find_readers(text_of(path))]
    assert len(user_errors()) > 12 and len(readers) > 20
    assert [f"{path}:{line} in {name}" for path, name, line, is_ours in readers if is_ours] == []
    keys = {f"{path}::{name}": f"{path}::*" for path, name, _, _ in readers}
    assert sorted(key for key, any_in_file in keys.items() if not {key, any_in_file} & READ_ELSEWHERE.keys()) == []
    assert sorted(READ_ELSEWHERE.keys() - {*keys, *keys.values()}) == [], "these read nothing"


@pytest.mark.parametrize(
    "handler",
    [
        "except UserError as e:\n    x = str(e).removeprefix(p)",
        "except (OSError, UserError) as e:\n    x = '--vae' in str(e)",
        "except CAUGHT as e:\n    x = NAMED.findall(str(e))",
        "except errors.NotThere as e:\n    x = e.args[0]",
        "except NotThere as e:\n    text = str(e)\n    x = text.startswith('--')",
        "except DamagedImage as e:\n    x = f'{e}'.split()",
        "except (*CAUGHT, KeyError) as e:\n    x = e.message == 'a'",
        "except NonFiniteError as e:\n    x = re.search('a', str(e))",
    ],
)
def test_readers_are_seen_in_every_form(handler: str) -> None:
    found = find_readers(f"CAUGHT = (OSError, UserError)\ntry:\n    pass\n{handler}\n")
    assert found and all(is_ours for _, _, is_ours in found)


@pytest.mark.parametrize(
    "shown", ["logger.info('%s', e)", "raise UserError(f'--x: {e}')", "return str(e)", "e.path.x()"]
)
def test_showing_an_error_is_no_reading(shown: str) -> None:
    assert find_readers(f"def f():\n  try:\n    pass\n  except UserError as e:\n    {shown}\n") == []


WITHOUT_SETTING: Mapping[str, str] = {  # file or folder -> why its raises name neither setting nor file
    "library/architectures/": "`configure` names the file",
    "library/checkpoints/tree_json.py": "the optimizer's state cannot be written, which no setting causes",
    "library/data/batches/batches.py": "several images, which the message lists",
    "library/data/batches/own_dataset.py": "the user's own class made the batch; no setting says how",
    "library/data/caching/": "reasons, before which the cache file is put",
    "library/data/concepts/prompts_file.py": "`read_prompt_pairs` names --prompts_file, the file and the entry",
    "library/data/decoding/npz.py": "reasons, before which the cache file is put",
    "library/data/description/dataset_file.py": "`read_file` names --dataset_config and the file",
    "library/data/plan/": "all subsets together, which the message lists",
    "library/data/sources/folders/": "several images, or reasons before which the index file is put",
    "library/base/errors.py": "copies of errors, which get their fields",
    "library/environment/": "the machine and its packages",
    "library/memory/exchange.py": "`--turbo_dit` is put before it",
    "library/models/": "`configure` names the file; a tokenizer may be in several folders",
    "library/options/": "the reader of the file names flag and file",
    "library/processes/process_group.py": "other processes and the launcher",
    "library/training/command_line/help.py": "argparse says no more of it",
    "library/training/command_line/replaced.py": "a program's own code",
    "library/training/evaluation/drawing.py": "the adapter diverged",
    "library/training/evaluation/preview_weights.py": "the memory of the machine",
    "library/training/evaluation/prompts.py": "a prompt has the place that `read_prompts` gave it",
    "library/training/failures/": "training diverged, or memory ran out: several settings may help",
    "library/training/optimization/ema.py": "the state that it belongs to is put before it",
    "library/training/saving/": "the adapter diverged, a full disk, or the state is put before it",
    "networks/core/arguments/": "`_parse` names the argument",
    "networks/core/changes/": "`naming` of the network's file names it",
    "networks/core/files/": "`read_adapter_file` and `naming` of the network's file name it",
    "networks/core/kinds/": "`naming` of the network's file names it",
    "networks/core/network/": "a network module's own code",
    "networks/core/registry/layouts.py": "`naming` of the network's file names it",
    "tools/extract_lora_from_dylora.py": "`read_adapter_file` names the file at its start",
    "tools/interrogate_lora.py": "`read_adapter_file` names the file at its start",
    "tools/merge_": "several files, of which the message names one",
    "tools/plan_memory.py": "several models may be meant",
    "tools/quickstart/": "the toy world has no option for it",
    "tools/recipes.py": "a recipe of this repository",
    "tools/release.py": "the state of the repository",
    "tools/resize_lora.py": "`read_adapter_file` names the file at its start",
    "tools/vote.py": "`read_prompts` names the file",
}


def bare_raises() -> Iterator[str]:
    """Yield the file of every raise without a setting and a path."""
    for path in (*python_files("library", "networks", "tools"), *scripts()):
        for node in ast.walk(ast.parse(text_of(path))):
            match node:
                case ast.Call(func=ast.Name(name), keywords=keywords) if name in user_errors():
                    if not {"setting", "path"} & {keyword.arg for keyword in keywords}:
                        yield path.as_posix()
                case ast.Call(func=ast.Name("error_in"), args=[], keywords=keywords):
                    if "path" not in {keyword.arg for keyword in keywords}:
                        yield path.as_posix()


def test_a_raise_without_a_setting_has_a_reason() -> None:
    files = set(bare_raises())
    covered = {start for start in WITHOUT_SETTING for file in files if file.startswith(start)}
    assert sorted(file for file in files if not file.startswith(tuple(WITHOUT_SETTING))) == []
    assert WITHOUT_SETTING.keys() == covered, "these need no reason"


# Every message for the user names something to type or change: a flag, a key, a file or a command.

OF_THE_USER = (  # parts of the names of values that name a flag, a key, a file or a part of one
    "flag|path|file|folder|dir|key|name|place|origin|source|where|url|label|setting|argument|index|item|caption|target"
    "|image|prefix|start|missing|front_end|install_command|describe|list_few|root"
)
NAMED = re.compile(
    r"--[\w{]"  # a flag
    r"|`[^`]+`|\bpip install\b"  # a command
    r"|\b[\w-]+\.(py|toml|json|txt|safetensors)\b"
    r"|(?<![\w{.])[a-z]+(_[a-z0-9]+)+\b|\b\w+=\S|\bresolution is\b"  # a key
    rf"|\{{[^}}]*(?i:{OF_THE_USER})[^}}]*\}}"
)
CALLER_ADDS = {  # files whose errors are reasons -> who puts flag and file before them
    "library/environment/packages.py": "`describe_lack` and `describe_broken`, pip's command",
    "library/processes/process_group.py": "it names the process",
    "library/architectures/": "library/models/dit_loader.py, the file whose sizes are read",
    "library/models/": "the loader of a base model, flag and file",
    "library/data/decoding/npz.py": "library/data/decoding, the cache file",
    "library/data/sources/folders/image_index.py": "the index file",
    "library/training/command_line/help.py": "argparse, the argument",
    "library/training/optimization/ema.py": "the state that it belongs to",
    "library/training/evaluation/": "the loop, which goes on without the preview",
    "library/training/offline/contact_sheet.py": "the options file",
    "library/memory/exchange.py": "--turbo_dit",
    "networks/core/": "networks/core/arguments/network_arguments.py and networks/core/files/, argument or file",
    "library/options/kinds.py": "the reader, setting and place",
    "library/options/tables.py": "itself, file and place before the problem with a key",
    "library/checkpoints/tree_json.py": "the optimizer's state",
    "tools/quickstart/": "the toy world has no option for it",
}


def message_of(node: ast.expr) -> str:
    """Return the text of a message with its values as {expression}."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(map(message_of, node.values))
        case ast.FormattedValue():
            return f"{{{ast.unparse(node.value)}}}"
        case ast.BinOp():
            return message_of(node.left) + message_of(node.right)
    return f"{{{ast.unparse(node)}}}"


def messages() -> Iterator[tuple[str, str]]:
    """Yield the file and text of every UserError that is made."""
    for path in (*python_files("library", "networks", "tools"), *scripts()):
        if "base.errors import" in text_of(path):
            for node in ast.walk(ast.parse(text_of(path))):
                match node:
                    case ast.Call(func=ast.Name("UserError") | ast.Call(func=ast.Name("error_in")), args=[*texts]):
                        yield path.as_posix(), "; ".join(map(message_of, texts))
                    case ast.Call(func=ast.Call(func=ast.Name("about" | "of_file"), args=[first, *_]), args=[*texts]):
                        yield path.as_posix(), f"{message_of(first)} {'; '.join(map(message_of, texts))}"


ADVICE = re.compile(
    r"; (add|begin|change|check|choose|close|convert|copy|correct|delete|describe|download|draw|encode|enlarge|fetch"
    r"|fix|free|give|install|keep|leave|list|load|look|lower|make|merge|move|name|pass|put|raise|re-save|remove|rename"
    r"|replace|restart|restore|rewrite|run|save|see|set|shorten|start|store|swap|take|train|try|unset|use|widen|write)\b"
)


def test_advice_is_the_remedy_and_no_part_of_the_reason() -> None:
    """`about("--rank")("is 0", "use at least 1")`: programs get the remedy by itself."""
    made = r"(about|of_file|error_in)\(.*\)|UserError|NotThere|NoDataFound"
    inside = [
        f"{path}:{node.lineno}"
        for path in (*python_files("library", "networks", "tools"), *scripts())
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
        if ADVICE.search(message_of(node.args[0])) and re.fullmatch(made, ast.unparse(node.func), re.DOTALL)
    ]
    assert inside == []


def test_every_message_names_something_to_type_or_change() -> None:
    found = list(messages())
    assert len({path for path, _ in found}) > 100
    unnamed = [(path, text) for path, text in found if not NAMED.search(text)]
    assert [f"{path}: {text}" for path, text in unnamed if not path.startswith(tuple(CALLER_ADDS))] == []
    stale = [start for start in CALLER_ADDS if not any(path.startswith(start) for path, _ in unnamed)]
    assert not stale, "these need no exception"


def test_a_riddle_is_not_taken_for_a_message() -> None:
    assert not NAMED.search("the images could not be drawn") and not NAMED.search("{error}: {round(value)}")
    assert (
        NAMED.search("--{name} is {number}") and NAMED.search("resolution_x is {a}") and NAMED.search("{path} is bad")
    )


# Everything that commands print goes through library/base/terminal.py, which escapes what steers a terminal.

PROGRAM = [*python_files("library", "networks", "tools", "finetune"), *scripts()]
FUNCTIONS = ("print", "input")
PARSERS = ("library/base/command_parser.py", "library/training/command_line/")  # which escape what they refuse
METHODS = ("stdout.write", "stderr.write", "stdout.writelines", "stderr.writelines", "tqdm.write")
HANDLERS = ("StreamHandler", "RichHandler")  # of log lines; a module that makes one escapes their texts


def find_prints(text: str) -> Iterator[str]:
    """Yield the calls of a source that reach the terminal by themselves."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FUNCTIONS or name.endswith(METHODS):
                yield f"line {node.lineno}: {name}"
            elif name.rpartition(".")[2] in HANDLERS and "addFilter(EscapedTexts())" not in text:
                yield f"line {node.lineno}: {name} without EscapedTexts"


@pytest.mark.parametrize(
    "line",
    [
        "print(path)",
        "input(f'{name}?')",
        "sys.stdout.write(name)",
        "sys.__stderr__.flush(); sys.stderr.write(x)",
        "tqdm.write(name)",
        "logging.StreamHandler(sys.stderr)",
    ],
)
def test_a_print_of_its_own_is_found(line: str) -> None:
    assert list(find_prints(line))


def test_every_text_goes_through_the_function_that_escapes_it() -> None:
    found = {path: list(find_prints(text_of(path))) for path in PROGRAM if path != Path("library/base/terminal.py")}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_every_command_has_a_parser_that_escapes_what_it_refuses() -> None:
    """A parser without a help reads words for another one."""
    others = [path for path in PROGRAM if not path.as_posix().startswith(PARSERS)]
    assert [p for p in others if re.search(r"ArgumentParser\((?!add_help=False)", text_of(p))] == []
