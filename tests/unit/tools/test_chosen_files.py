"""Which adapter files contact_sheet.py and choose_checkpoint.py look at."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.options.train import TrainOptions
from tools.contact_sheet import chosen_files


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
