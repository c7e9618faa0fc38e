"""Data sets of the library datasets, in folders and on a stand-in for the hub. What only the library reads is tested
where it is installed; its save_to_disk folders are read without it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from library.base.errors import UserError
from library.data.plan.data_plan import DataPlan, with_revisions
from library.data.sources import dataset_name
from tests.hiding import hide
from tests.running import ROOT
from tests.unit.data.builders import write_folder
from tests.unit.data.shard_builders import open_subset

COLUMNS = 'image_column = "picture"\ncaption_column = "words"\n'
needs_library = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")


def table_of(folder: Path) -> pa.Table:
    """Return the images of a folder as the library stores them."""
    files = sorted(folder.glob("*.png"))
    pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    words = [file.with_suffix(".txt").read_text() for file in files]
    return pa.table({"picture": pa.array(pictures, kind), "words": words})


def save(folder: Path, table: pa.Table, num_files: int = 2, batch: int = 2) -> Path:
    """Write a split as save_to_disk does."""
    folder.mkdir(parents=True)
    names, rows = [f"data-{n:05}-of-{num_files:05}.arrow" for n in range(num_files)], -(-len(table) // num_files)
    for number, name in enumerate(names):
        part = table.slice(number * rows, rows)
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(part, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "plain", 5, (80, 64))


def describe(plan: DataPlan) -> tuple[list[str], list[list[int]], list[bytes]]:
    """Return captions, sizes and contents of all images."""
    (images,) = plan.samples.subsets
    contents = [plan.storage.content(image) or Path(image.key).read_bytes() for image in images]
    return list(images.captions), images.sizes_N2.tolist(), contents


def test_a_saved_data_set_trains_as_its_folder_and_needs_no_library(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide("datasets", monkeypatch)
    save(tmp_path / "saved", table_of(images))
    plan = open_subset(tmp_path, f'dataset_name = "{(tmp_path / "saved").as_posix()}"\n{COLUMNS}')
    folder = open_subset(tmp_path, f'image_dir = "{images.as_posix()}"\ncaption_extension = ".txt"')
    assert describe(plan) == describe(folder) and plan.num_batches == folder.num_batches
    keys = [Path(key).parent.name + "/" + Path(key).name for key in plan.samples.subsets[0].each_key()]
    assert keys == [f"data-0000{n // 3}-of-00002.arrow/{n % 3}" for n in range(5)]
    again = open_subset(tmp_path, f'dataset_name = "{(tmp_path / "saved").as_posix()}"\n{COLUMNS}')
    assert again.identity_with_contents == plan.identity_with_contents and "revisions" not in plan.identity


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ('dataset_split = "tast"', "dataset_split is 'tast', but .* has train, test"),
        ('dataset_split = "test"\nimage_column = "pix"', "image_column is 'pix', .* no such column; it has picture"),
        ("", "has no image column with a usual name; set image_column, it has picture, words"),
        ('image_column = "picture"\ncaption_column = "caption"', "caption_column is 'caption'.* it has picture, words"),
        ('image_column = "words"\ncaption_column = "picture"', "must be text"),
    ],
)
def test_a_missing_split_or_column_is_named(subset: str, message: str, images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / "saved" / split, table_of(images))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=message):
        open_subset(tmp_path, f'dataset_name = "{(tmp_path / "saved").as_posix()}"\n{subset}')


def test_splits_of_one_data_set_are_two_subsets(images: Path, tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 2)):
        save(tmp_path / "saved" / split, table_of(images).slice(0, count))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    own = f'dataset_name = "{(tmp_path / "saved").as_posix()}"\n{COLUMNS}'
    plan = open_subset(tmp_path, f'{own}[[datasets.subsets]]\n{own}dataset_split = "test"')
    assert [len(images) for images in plan.samples.subsets] == [5, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", b"{", "damaged"),
        ("state.json", b'{"_data_files": [1]}', "does not name the files"),
        ("state.json", b'{"_data_files": []}', "has no images"),
        ("data-00000-of-00002.arrow", b"ARROW1", "is no Arrow file .* or is damaged"),
        ("data-00001-of-00002.arrow", None, "1 of 2 files are missing"),
    ],
)
def test_a_damaged_saved_data_set_is_named(
    name: str, content: bytes | None, message: str, images: Path, tmp_path: Path
) -> None:
    saved = save(tmp_path / "saved", table_of(images))
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_subset(tmp_path, f'dataset_name = "{saved.as_posix()}"\n{COLUMNS}')


def test_a_cut_arrow_file_is_named(images: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "saved", table_of(images))
    file = saved / "data-00000-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"data-00000-of-00002\.arrow"):
        describe(open_subset(tmp_path, f'dataset_name = "{saved.as_posix()}"\n{COLUMNS}'))


def test_a_missing_package_and_one_that_runs_scripts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        hide("datasets", patch)
        with pytest.raises(UserError, match=r"dataset_name me/cats needs the package datasets.*pip install datasets"):
            open_subset(tmp_path, 'dataset_name = "me/cats"')
    monkeypatch.setattr(dataset_name, "import_needed", lambda *words: None)
    monkeypatch.setattr(dataset_name, "version_of", lambda package: "3.6.0")
    with pytest.raises(UserError, match=r"datasets 3\.6\.0 runs scripts of data sets.*pip install --upgrade datasets"):
        open_subset(tmp_path, 'dataset_name = "me/cats"')


def test_a_resumed_run_reads_the_commit_of_its_state(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, saved = list[str](), save(tmp_path / "saved", table_of(images))
    files = [str(path) for path in sorted(saved.glob("*.arrow"))]

    def open_data_set(name: str, config: Any) -> tuple[str, list[str]]:
        opened.append(name)
        return (name if "@" in name else f"{name}@{'b' * 40}"), files

    monkeypatch.setattr(dataset_name, "open_data_set", open_data_set)
    monkeypatch.setattr(dataset_name, "check_packages", lambda config: None)
    monkeypatch.setattr(dataset_name, "SOURCE", dataset_name.Source(dataset_name.KEYS, dataset_name.scan))
    plan = open_subset(tmp_path, f'dataset_name = "me/cats"\n{COLUMNS}')
    assert plan.identity["revisions"] == {"me/cats": "b" * 40} and opened == ["me/cats"]
    assert plan.subsets[0].base_name == f"cats@{'b' * 40}"  # in the metadata of saved files
    pinned = with_revisions(plan.config, {"me/cats": "a" * 40})
    assert [s.patterns for d in pinned.datasets for s in d.subsets] == [(f"me/cats@{'a' * 40}",)]
    named = open_subset(tmp_path, f'dataset_name = "me/cats@main"\n{COLUMNS}')  # whose own revision counts
    assert with_revisions(named.config, {"me/cats": "a" * 40}) == named.config


# With the library


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images and metadata", "Parquet"])
def test_a_folder_for_the_library_trains_as_plain_images(kind: str, images: Path, tmp_path: Path) -> None:
    folder, columns = tmp_path / "made", "" if kind != "Parquet" else COLUMNS
    if kind == "Parquet":
        (folder / "data").mkdir(parents=True)
        parquet.write_table(table_of(images), folder / "data" / "train-00000-of-00001.parquet")
    else:
        shutil.copytree(images, folder, ignore=shutil.ignore_patterns("*.txt"))
        lines = [{"file_name": f"p{n}.png", "text": f"a tag {n}"} for n in range(5)]
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.data import test_hub_data_sets as tests
from tests.unit.data.shard_builders import open_subset
here = Path({str(tmp_path)!r})
made = open_subset(here, 'dataset_name = "' + (here / "made").as_posix() + '"\\n' + {columns!r})
plain = open_subset(here, 'image_dir = "' + (here / "plain").as_posix() + '"\\ncaption_extension = ".txt"')
assert tests.describe(made) == tests.describe(plain)
"""
    run_alone(program, {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})


def run_alone(program: str, own: dict[str, str]) -> str:
    """Run a program whose hub client and library have their own settings, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**environment, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for the data set me/cats, whose branch main is at `head`; `data` has its commits."""

    head: ClassVar[str] = ""
    data: ClassVar[dict[str, dict[str, bytes]]] = {}

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        commit = next((commit for commit in self.data if commit in path), self.head)
        files, json_type = self.data[commit], {"Content-Type": "application/json"}
        if "me/cats" not in path:
            self.answer(404, b"{}", {**json_type, "X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            own = {"X-Repo-Commit": commit, "ETag": f'"{commit[:8]}{len(name)}"'}
            if name in files:
                self.answer(200, files[name], own)
            else:
                self.answer(404, b"", {**own, "X-Error-Code": "EntryNotFound"})
        elif "/tree/" in path or "/paths-info/" in path:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": commit}
                for name, content in files.items()
                if "/tree/" in path or name in asked.replace("%2F", "/")
            ]
            self.answer(200, json.dumps(tree).encode(), json_type)
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": "me/cats", "sha": commit, "siblings": siblings}).encode(), json_type)

    do_HEAD = do_POST = do_GET


@pytest.fixture
def hub(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A data set of five images, of which an earlier commit had three."""
    data = {}
    for commit, count in (("a" * 40, 3), ("b" * 40, 5)):
        parquet.write_table(table_of(images).slice(0, count), tmp_path / "part.parquet")
        content = (tmp_path / "part.parquet").read_bytes()
        data[commit] = {"README.md": b"---\n{}\n---\n", "train.parquet": content}
    monkeypatch.setattr(Hub, "data", data)
    monkeypatch.setattr(Hub, "head", "b" * 40)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(name: str, address: str, folder: Path, columns: str = COLUMNS) -> str:
    """Return the number of images and the commits of a data set, or the error."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from library.base.errors import UserError
from tests.unit.data.shard_builders import open_subset
try:
    plan = open_subset(Path({str(folder)!r}), 'dataset_name = "{name}"\\n' + {columns!r})
    print("found", len(plan.samples), plan.identity.get("revisions"))
except UserError as error:
    print("refused", error)
"""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    output = run_alone(program, own)
    return next(line for line in output.splitlines() if line.startswith(("found", "refused")))


NOWHERE = "http://127.0.0.1:1"


@needs_library
@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_by_its_commit_also_without_the_hub(hub: str, tmp_path: Path) -> None:
    first, second = "a" * 40, "b" * 40
    assert look("me/cats", hub, tmp_path) == f"found 5 {{'me/cats': '{second}'}}"
    assert look(f"me/cats@{first}", hub, tmp_path) == f"found 3 {{'me/cats': '{first}'}}"
    assert look(f"me/cats@{second}", NOWHERE, tmp_path) == f"found 5 {{'me/cats': '{second}'}}"
    assert look(f"me/cats@{first}", NOWHERE, tmp_path) == f"found 3 {{'me/cats': '{first}'}}"
    assert "not" not in look("me/cats", NOWHERE, tmp_path)  # the newest that is there
    assert "write the commit" in look("me/cats@main", NOWHERE, tmp_path)
    assert "cannot be downloaded" in look(f"me/cats@{'c' * 40}", NOWHERE, tmp_path)


@needs_library
@pytest.mark.slow
def test_what_the_hub_lacks_is_named(hub: str, tmp_path: Path) -> None:
    assert "refused dataset_name me/dogs" in look("me/dogs", hub, tmp_path)
    missing = look("me/cats", hub, tmp_path, 'image_column = "photo"')
    assert missing.startswith("refused image_column is 'photo'") and "picture, words" in missing


@needs_library
@pytest.mark.slow
def test_a_script_of_a_data_set_is_refused_and_not_run(hub: str, tmp_path: Path, monkeypatch) -> None:
    mark = tmp_path / "ran"
    script = f"open({str(mark)!r}, 'w').close()".encode()
    monkeypatch.setattr(Hub, "data", {c: {**files, "cats.py": script} for c, files in Hub.data.items()})
    assert "scripts are no longer supported" in look("me/cats", hub, tmp_path) and not mark.exists()
