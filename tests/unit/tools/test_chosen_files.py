"""The adapter files that contact_sheet.py and choose_checkpoint.py use."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.base.errors import UserError
from library.checkpoints.files import display_path
from library.options.output.saving import SavingOptions
from library.training.saving.saved_files import drop_copies
from tools.contact_sheet import choose_files, label_rows


def test_a_folder_saved_by_peft_resolves_to_the_file_in_it(tmp_path: Path) -> None:
    inside, file = tmp_path / "saved" / "adapter_model.safetensors", tmp_path / "a.safetensors"
    inside.parent.mkdir()
    inside.touch()
    file.touch()
    assert choose_files([inside.parent, file], SavingOptions()) == [inside, file]
    with pytest.raises(UserError, match=r"--files .* is a folder without adapter_model\.safetensors"):
        choose_files([tmp_path], SavingOptions())
    with pytest.raises(UserError, match=r"--files .*none\.pt does not exist"):
        choose_files([tmp_path / "none.pt"], SavingOptions())


def test_peft_files_are_labelled_by_their_folders() -> None:
    files = [Path("out/cat.v2/adapter_model.safetensors"), Path("out/dog/adapter_model.bin"), Path("out/a.safetensors")]
    assert label_rows(files) == ["without an adapter", "cat.v2", "dog", "a"]
    assert [display_path(path).name for path in files] == ["cat.v2", "dog", "a.safetensors"]
    assert display_path(Path("adapter_model.safetensors")) == Path("adapter_model.safetensors")


def test_copies_of_an_adapter_are_used_once(tmp_path: Path) -> None:
    """Even with other training metadata; another alpha, shape or PEFT setting makes another adapter."""
    weights = {"a.lora_down.weight": torch.arange(6.0).reshape(2, 3), "a.alpha": torch.tensor(1.0)}
    original, step, other, alpha = (tmp_path / f"{name}.safetensors" for name in ("one", "step", "other", "alpha"))
    save_file(weights, original, {"ss_steps": "4"})
    save_file(weights, step, {"ss_steps": "4", "modelspec.date": "today"})
    save_file({**weights, "a.lora_down.weight": torch.arange(6.0).reshape(3, 2)}, other, {"ss_steps": "4"})
    save_file({**weights, "a.alpha": torch.tensor(2.0)}, alpha, {"ss_steps": "4"})
    pickled = [tmp_path / "one.pt", tmp_path / "two.pt"]
    torch.save(weights, pickled[0])
    pickled[1].write_bytes(pickled[0].read_bytes())
    peft = [tmp_path / name / "adapter_model.safetensors" for name in ("p1", "p2", "p3")]
    for path, text in zip(peft, ("1", "2", "1"), strict=True):
        path.parent.mkdir()
        save_file(weights, path)
        (path.parent / "adapter_config.json").write_text(f'{{"lora_alpha": {text}}}')
    unique = drop_copies([original, step, other, alpha, *pickled, *peft])
    assert unique == [original, other, alpha, pickled[0], peft[0], peft[1]]
