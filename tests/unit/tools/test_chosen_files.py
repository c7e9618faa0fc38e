"""Which adapter files contact_sheet.py and choose_checkpoint.py look at."""

from pathlib import Path

import pytest

from library.checkpoints.files import told_path
from library.errors import UserError
from library.options.train import TrainOptions
from tools.contact_sheet import chosen_files, labels_of


def test_a_folder_that_peft_saved_is_the_file_in_it(tmp_path: Path) -> None:
    inside, file = tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "a.safetensors"
    inside.parent.mkdir()
    inside.touch()
    file.touch()
    assert chosen_files([inside.parent, file], TrainOptions()) == [inside, file]
    with pytest.raises(UserError, match=r"--files .* is a folder without adapter_model\.safetensors"):
        chosen_files([tmp_path], TrainOptions())
    with pytest.raises(UserError, match=r"--files .*none\.pt does not exist"):
        chosen_files([tmp_path / "none.pt"], TrainOptions())


def test_files_of_peft_are_told_apart_by_their_folders() -> None:
    files = [Path("out/cat.v2/adapter_model.safetensors"), Path("out/dog/adapter_model.bin"), Path("out/a.safetensors")]
    assert labels_of(files) == ["without an adapter", "cat.v2", "dog", "a"]
    assert [told_path(path).name for path in files] == ["cat.v2", "dog", "a.safetensors"]
    assert told_path(Path("adapter_model.safetensors")) == Path("adapter_model.safetensors")
