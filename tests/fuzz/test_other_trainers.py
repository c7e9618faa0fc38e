"""Values of every type in other trainers' configurations are translated, listed as without an equal, or refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.translation.reading import read_configuration
from library.translation.translating import translate
from library.translation.writing import TranslatedFiles, describe, render_files
from tests.contracts.other_trainers import Example, list_examples
from tests.fuzz.budget import any_input, works_or_says_why
from tests.fuzz.test_files_of_models import places, values, with_value

EXAMPLES = {f"{example.program} {example.form}": example for example in reversed(list_examples())}


def translate_file(path: Path) -> None:
    """Translate a file as tools/translate.py does."""
    configuration = read_configuration(path, "config")
    if configuration is not None:
        translation = translate(configuration)
        describe(translation, path, render_files(translation, path, TranslatedFiles(path.with_name("x.toml"))))


@pytest.mark.parametrize("name", EXAMPLES)
@any_input(40)
@given(data=st.data())
def test_any_value_in_a_configuration(name: str, data: st.DataObject, tmp_path: Path) -> None:
    example: Example = EXAMPLES[name]
    part = "options" if example.form == "command" else "content"
    valid = getattr(example, part)
    place = data.draw(st.sampled_from([path for path in places(valid) if path]))
    changed = with_value(valid, place, data.draw(values))
    path = replace(example, **{part: changed}).write(tmp_path)
    works_or_says_why(lambda: translate_file(path))
