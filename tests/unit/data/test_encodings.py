"""Errors for text that is not UTF-8 suggest the likely encoding."""

from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.data.plan.collect import collect
from library.options.config_file import read_toml
from library.options.encodings import likely_encoding
from library.options.output.prompts import read_prompts
from tests.unit.data.builders import write_config, write_folder

CASES = [
    ("猫、座っている、青い空", "cp932", "Shift-JIS"),
    ("a cat in a café", "latin-1", "Latin-1"),
    ("a cat", "utf-16", "UTF-16"),
    ("一个女孩坐在草地上", "gb18030", "GB18030"),
    ("fille blonde, forêt", "latin-1", "Latin-1"),
    ("ein mädchen, größe", "cp1252", "Latin-1"),
    ("niño, cabaña", "latin-1", "Latin-1"),
    ("jeune fille à l’école", "cp1252", "Latin-1"),
    ("девушка сидит на траве", "cp1251", "Cyrillic"),
    ("1girl, 猫耳, 青い空の下で座っている", "cp932", "Shift-JIS"),
    ("소녀가 풀밭에 앉아 있다", "cp949", "EUC-KR"),
]


@pytest.mark.parametrize(("text", "encoding", "name"), CASES)
def test_the_likely_encoding_is_detected(text: str, encoding: str, name: str) -> None:
    assert (likely_encoding(text.encode(encoding)) or "").startswith(name)


def test_all_captions_in_other_encodings_are_listed_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 4)
    for number, (text, encoding, _) in enumerate(CASES[:3]):
        (tmp_path / f"a/p{number}.txt").write_bytes(text.encode(encoding))
    subset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\ncaption_extension = '.txt'"
    config = load_dataset_config(write_config(tmp_path / "data.toml", subset))
    with pytest.raises(UserError, match=r"3 caption files .* p0\.txt \(Shift-JIS.*p1\.txt \(Latin-1.*p2\.txt \(UTF-16"):
        collect(config)


def test_captions_of_all_subsets_are_listed_at_once(tmp_path: Path) -> None:
    subsets = "[[datasets]]\nresolution = 64\n"
    for name in "ab":
        write_folder(tmp_path / name, 2)
        (tmp_path / name / "p1.txt").write_bytes("forêt".encode("latin-1"))
        subsets += f"[[datasets.subsets]]\nimage_dir = '{{here}}/{name}'\ncaption_extension = '.txt'\n"
    config = load_dataset_config(write_config(tmp_path / "data.toml", subsets))
    with pytest.raises(UserError, match=r"(?s)a/p1\.txt is not UTF-8.*\n.*b/p1\.txt is not UTF-8"):
        collect(config)


def test_errors_for_toml_and_prompt_files_suggest_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes("image_dir = 'bilder/mädchen, größe'".encode("latin-1"))
    with pytest.raises(UserError, match="it looks like Latin-1"):
        read_toml(tmp_path / "a.toml", "--dataset_config")
    (tmp_path / "p.txt").write_bytes("猫、座っている".encode("cp932"))
    with pytest.raises(UserError, match="it looks like Shift-JIS"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["meta.json", "meta.jsonl"])
def test_the_error_for_a_metadata_file_suggests_the_encoding(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "a", 1)
    line = '{"image_path": "p0.png", "caption": "猫、座っている、青い空"}'
    (tmp_path / name).write_bytes((line if name.endswith("l") else f'{{"p0": {line}}}').encode("cp932"))
    subset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    subset += f"metadata_file = '{{here}}/{name}'"
    with pytest.raises(UserError, match=rf"metadata_file .*{name} is not UTF-8 text.*it looks like Shift-JIS"):
        collect(load_dataset_config(write_config(tmp_path / "data.toml", subset)))


@pytest.mark.parametrize("path", [r"C:\data\cat", r"C:\users\me"])
def test_the_error_for_a_windows_path_in_double_quotes_suggests_single_quotes(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.toml").write_text(f'image_dir = "{path}"')
    with pytest.raises(UserError, match="write paths with / or in single quotes"):
        read_toml(tmp_path / "a.toml", "--dataset_config")


def test_other_toml_errors_do_not_suggest_single_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('image_dir = "a\\\\b"\nx = \n')
    with pytest.raises(UserError) as raised:
        read_toml(tmp_path / "a.toml", "--dataset_config")
    assert "quotes" not in str(raised.value)


def test_a_backslash_parsed_as_a_tab_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subset = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "C:\\train"'
    collect(load_dataset_config(write_config(tmp_path / "data.toml", subset)))
    assert "in single quotes" in caplog.text
