"""Training commands in shell text (.sh, .bat, .ps1, or a text file), read without a shell: nothing is run."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

SCRIPT = re.compile(r"(?:.*[/\\])?((?:train|\w+_train)_[\w.-]*|train)\.py", re.IGNORECASE)
ASSIGNMENT = re.compile(r"(?:export\s+|set\s+(?:/a\s+)?|\$env:|\$)?([A-Za-z_]\w*)\s?=\s?(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\{(\w+)(?:\[@\])?(?::-([^}]*))?\}|\$(\w+)|%(\w+)%")
ARRAY = re.compile(r"^[ \t]*(\w+)=\(\s*(.*?)\s*\)[ \t]*$", re.DOTALL | re.MULTILINE)
CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*(\r\n?|\n)")  # of sh, cmd and PowerShell
OPERATORS = (";", "&", "&&", "|", "||")
COMMENT = re.compile(r"\s*(#|::|rem\b|@?echo\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """A training command: the name of its script, and its options in order; flags have the value True."""

    script: str
    options: tuple[tuple[str, Any], ...]
    launch_options: tuple[tuple[str, Any], ...]  # of accelerate
    unknown_variables: tuple[str, ...]  # that the text does not set
    comment: str = ""  # behind a # in the command, where a shell stops reading


def read_commands(text: str) -> list[Command]:
    """Return the training commands of a text; variables that the text sets itself are replaced."""
    variables, commands = dict[str, str](), list[Command]()
    text = put_arrays(text)
    lines = (line for line in CONTINUED.sub(" ", text).splitlines() if not COMMENT.match(line))
    for statement in (statement for line in lines for statement in split_statements(split_words(line))):
        unknown = list[str]()
        end = next((number for number, word in enumerate(statement) if word.startswith("#")), len(statement))
        statement, comment = statement[:end], " ".join(statement[end:])
        words = [replace_variables(word, variables, unknown) for word in statement]
        place = next((number for number, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
        if place is not None:
            script = PurePosixPath(words[place].replace("\\", "/")).name
            options, launch = tuple(read_options(words[place + 1 :])), tuple(read_options(words[:place]))
            commands.append(Command(script, options, launch, tuple(dict.fromkeys(unknown)), comment))
        elif match := ASSIGNMENT.fullmatch(" ".join(statement)):
            variables[match[1]] = replace_variables(match[2], variables, [])
    return commands


def put_arrays(text: str) -> str:
    """Replace "${NAME[@]}" by the words of NAME=(…)."""
    for name, words in ARRAY.findall(text):
        joined = " ".join(line for line in words.splitlines() if not COMMENT.match(line))
        text = re.sub(rf'"?\$\{{{name}\[@\]\}}"?', joined.replace("\\", r"\\"), text)
    return ARRAY.sub("", text)


def split_statements(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words between the operators of a line."""
    statement = list[str]()
    for word in (*words, ";"):
        if word in OPERATORS:
            yield statement
            statement = []
        else:
            statement.append(word)


def split_words(line: str) -> list[str]:
    """Split a line at spaces outside of quotes. Backslashes stay where they are Windows paths."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    if re.search(r"[A-Za-z]:\\|[\w%]\\\w", line):
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError:  # a quotation that does not end
        return line.split()


def replace_variables(word: str, variables: dict[str, str], unknown: list[str]) -> str:
    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[3] or match[4]
        if name not in variables and match[2] is None:
            unknown.append(name)
        return variables.get(name, match[0] if match[2] is None else match[2])

    return VARIABLE.sub(value_of, word)


def read_options(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each option; several words behind one are a list."""
    starts = [number for number, word in enumerate(words) if re.match(r"--[A-Za-z]", word)]
    for start, end in pairwise([*starts, len(words)]):
        name, equals, first = words[start].removeprefix("--").partition("=")
        values = [to_number(word) for word in ([first] if equals else []) + list(words[start + 1 : end])]
        yield name, True if not values else values[0] if len(values) == 1 else values


def to_number(word: str) -> Any:
    """Return the number that a word is, or the word."""
    if re.fullmatch(r"[+-]?(0|[1-9]\d{0,18})", word):
        return int(word)
    return float(word) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", word, re.IGNORECASE) else word
