"""docs/notebook.ipynb runs cell by cell on the toy base, as in a notebook service."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.running import make_images

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.slow
def test_its_cells_train_and_show_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PATH", f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    images = make_images(tmp_path / "images", 2)
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    settings, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    values = {
        "IMAGES": str(images),
        "MODEL": str(ROOT / "configs" / "quickstart" / "toy_base"),
        "OUTPUT": str(tmp_path / "out"),
        "MORE": ["--steps", "2"],
    }
    assert values.keys() <= {line.split(" = ")[0] for line in settings.source.splitlines()}
    settings.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": ROOT / "docs"}}).execute()
    image_outputs = [output for output in cells[-1].outputs if "image/png" in output.get("data", {})]
    assert len(image_outputs) == 2
    assert (tmp_path / "out" / "mine.safetensors").is_file()
