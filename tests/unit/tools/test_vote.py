"""tools/vote.py without a model, and the quickstart's scores."""

import re
import urllib.request
from collections.abc import Iterable
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from library.checkpoints.marks import save_image
from library.training.report_page.local_server import LocalServer
from library.training.report_page.page import read_data
from tools import draw, vote
from tools.quickstart.draw_before_after import CAPTIONS, score
from tools.quickstart.sampling import Prompt, read_prompts
from tools.quickstart.toy_world import QUICKSTART, draw_scene, parse_caption

PROMPTS = "a cat --d 7\na dog\n"


def form_of(page: str, choice: str, **changes: str) -> bytes:
    data = read_data(page)
    return urlencode({"token": data["token"], "pair": data["pair"], "choice": choice, **changes}).encode()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Write one colour for each image instead of drawing with a model. Return the names of what was drawn."""
    names = []

    def draw_targets(*arguments: object) -> None:
        rows = arguments[-1]
        assert isinstance(rows, list)
        for target in (target for row in rows for target in row):
            colour = (10 * target.number, 0, 0)
            save_image(target.path, Image.new("RGB", (8, 8), colour), target.mark, {"parameters": "猫"})
            names.append(target.path.stem)

    monkeypatch.setattr(draw, "draw_targets", draw_targets)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return names


def run_votes(monkeypatch: pytest.MonkeyPatch, choices: Iterable[str], *words: str) -> int:
    """Run the command, vote over HTTP and interrupt it when the choices run out. Return the exit status."""

    class Voted(LocalServer):
        def serve_forever(self, poll_interval: float = 0.01) -> None:
            voter = Thread(target=self.vote)
            voter.start()
            super().serve_forever(poll_interval)
            voter.join()

        def vote(self) -> None:
            try:
                page = urllib.request.urlopen(self.url, timeout=10).read().decode()
                for choice in choices:
                    # It follows the redirection to the next page.
                    page = urllib.request.urlopen(self.url, form_of(page, choice), timeout=10).read().decode()
            finally:
                self.shutdown()

    monkeypatch.setattr(vote, "LocalServer", Voted)
    return int(vote.main(["--base", "model", "--prompts", "prompts.txt", *words]))


def red(path: str) -> int:
    return int(np.asarray(Image.open(Path("output/votes") / path))[0, 0, 0])


def list_votes() -> list[str]:
    root = Path("output/votes")
    return sorted(file.relative_to(root).as_posix() for file in root.glob("[!c]*/*"))


def test_an_interrupted_vote_goes_on_where_it_stopped(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_votes(monkeypatch, ["right"]) == 0
    assert drawn == ["01_7", "02_8", "03_1", "04_2"]
    first = ["preferred/01_7.png", "preferred/01_7.txt", "rejected/01_7.png"]
    assert list_votes() == first
    assert Path("output/votes/preferred/01_7.txt").read_text() == "a cat"
    assert (red("preferred/01_7.png"), red("rejected/01_7.png")) == (20, 10)
    Path("output/votes/candidates/04_2.png").unlink()
    assert run_votes(monkeypatch, ["skip"]) == 0
    assert drawn[4:] == ["04_2"] and list_votes() == [*first, "skipped/03_1.png"]
    assert run_votes(monkeypatch, ["left"] * 99) == 0, "all pairs have votes: there is no server"
    assert run_votes(monkeypatch, ["left", "right"], "--pairs", "2") == 0
    assert drawn[5:] == ["05_9", "06_10", "07_3", "08_4"]
    assert [red(f"{folder}/{name}.png") for name in ("05_9", "07_3") for folder in ("preferred", "rejected")] == [
        50,
        60,
        80,
        70,
    ]
    with Image.open("output/votes/preferred/05_9.png") as image:
        assert image.info["parameters"] == "猫"


def test_the_first_vote_on_a_pair_counts(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is sent twice, or from two windows, does not turn the vote."""
    pages: list[str] = []
    build = vote.VotingPages.build
    monkeypatch.setattr(vote.VotingPages, "build", lambda *args: pages.append(build(*args)) or pages[0])
    assert run_votes(monkeypatch, ["left", "right"]) == 0
    assert list_votes() == ["preferred/01_7.png", "preferred/01_7.txt", "rejected/01_7.png"]
    assert red("preferred/01_7.png") == 10


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("preferred/01_7.png", "the image of a vote on this pair"),
        ("rejected/03_1.png", "the image of a vote on this pair"),
        ("skipped/01_7.png", "the image of a vote on this pair"),
        ("preferred/01_7.txt", "the caption of this pair"),
        ("candidates/02_8.png", "the image that this command draws there"),
    ],
)
def test_files_of_others_are_kept(
    name: str, what: str, drawn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("output/votes") / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_text("a")  # the beginning of the caption
    content = path.read_bytes()
    assert run_votes(monkeypatch, ["left"]) == 1
    assert drawn == [] and path.read_bytes() == content
    error = capsys.readouterr().err
    assert f"--output {path} exists and is" in error and f"not {what}: it would be lost" in error


def test_votes_on_images_of_another_adapter_are_kept(
    drawn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.safetensors").touch()
    assert run_votes(monkeypatch, ["left"]) == 0
    before = red("preferred/01_7.png")
    assert run_votes(monkeypatch, ["right"], "--adapter", "a.safetensors") == 1
    assert "would be lost" in capsys.readouterr().err and red("preferred/01_7.png") == before


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--pairs", "0"], "--pairs is 0; it must be at least 1"),
        (["--port", "65536"], "--port is 65536; use a number from 0 (any free port) to 65535"),
        (["--adapter", "gone.safetensors"], "--adapter gone.safetensors does not exist"),
        (["--prompts", "references.txt"], "remove control_image_path (--ci); preferences are trained without it"),
    ],
)
def test_invalid_input_ends_before_anything_is_drawn(
    words: list[str], error: str, drawn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("references.txt").write_text("a cat --ci cat.png\n")
    assert run_votes(monkeypatch, [], *words) == 1
    assert drawn == [] and error in capsys.readouterr().err


def test_only_forms_of_the_page_are_taken(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {}

    class Attacked(LocalServer):
        def serve_forever(self, poll_interval: float = 0.01) -> None:
            voter = Thread(target=self.attack)
            voter.start()
            super().serve_forever(poll_interval)
            voter.join()

        def send(self, method: str, path: str = "/", body: bytes = b"", host: str = "localhost") -> int:
            connection = HTTPConnection("127.0.0.1", self.server_address[1], timeout=10)
            connection.request(method, path, body, {"Host": host})
            return connection.getresponse().status

        def attack(self) -> None:
            try:
                page = urllib.request.urlopen(self.url, timeout=10).read().decode()
                statuses.update(self.send_forms(page))
            finally:
                self.shutdown()

        def send_forms(self, page: str) -> dict[str, int]:
            good = form_of(page, "left")
            return {
                "another name": self.send("GET", "/prompts.txt"),
                "a page of another host": self.send("GET", host="evil.example"),
                "a form of another host": self.send("POST", body=good, host="evil.example"),
                "without the token": self.send("POST", body=form_of(page, "left", token="")),
                "another pair": self.send("POST", body=form_of(page, "left", pair="../01_7")),
                "another choice": self.send("POST", body=form_of(page, "both")),
                "a large form": self.send("POST", body=good + b"&a=" + b"a" * 5000),
            }

    monkeypatch.setattr(vote, "LocalServer", Attacked)
    assert vote.main(["--base", "model", "--prompts", "prompts.txt"]) == 0
    assert list(statuses.values()) == [404, 403, 403, 403, 403, 403, 413] and list_votes() == []


def test_the_page_names_nothing_outside(drawn: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    build = vote.VotingPages.build
    monkeypatch.setattr(vote.VotingPages, "build", lambda *args: pages.append(build(*args)) or pages[-1])
    assert run_votes(monkeypatch, []) == 0
    (page,) = pages
    assert not re.search(r"(src|href)=", page) and "default-src &#x27;none&#x27;; img-src data:" in page


# The quickstart's score counts prompts that stood in the training apart from new combinations.


def test_trained_and_new_prompts_are_counted_apart() -> None:
    prompts = [Prompt(f"a large red {shape} on a white background", n) for n, shape in enumerate(["square", "circle"])]
    images = [
        draw_scene(parse_caption(prompt.caption), np.random.default_rng(n)) for n, prompt in enumerate(prompts * 2)
    ]
    result = score(images, prompts * 2, {prompts[0].caption})
    assert str(result) == "2 of 2 trained on, 2 of 2 new combinations"
    wrong = score([images[1], images[1]], prompts, {prompts[0].caption})
    assert (wrong.right, wrong.of, wrong.share) == ((0, 1), (1, 1), 0.5)


def test_ten_of_the_quickstarts_prompts_are_new() -> None:
    captions = {file.read_text().strip() for file in CAPTIONS.glob("*.txt")}
    assert [p.caption in captions for p in read_prompts(QUICKSTART / "prompts.txt")] == [False] * 10 + [True] * 14
