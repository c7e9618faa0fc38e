"""Every message for the user names something to type or change: a flag, a key, a file or a command."""

import ast
import re
from collections.abc import Iterator

from tests.architecture.sources import python_files, scripts, text_of

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
