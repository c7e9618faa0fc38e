"""The page as a user has it: clicks in Chromium, trainings of the quickstart's toy model."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.page.store import Store
from tests.browser import in_browser
from tests.chromium import Tab, browsing
from tests.page.serving import serving
from tests.running import ROOT
from tests.simulated_gpu.build import cache_folder, extension, obstacle

pytestmark = [in_browser, pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="passes pipes to a shell")]

PHOTOS = ROOT / "configs" / "quickstart" / "dataset"
TOY = ROOT / "configs" / "quickstart" / "toy_base"
EVIL = "<img src=x onerror=alert(1)>, a heart"
FIRST_BYTES, FIRST_REQUESTS = 100_000, 10


def copy_photos(folder: Path, number: int) -> list[Path]:
    """Copy the first photos of the quickstart with their captions."""
    folder.mkdir()
    files = [PHOTOS / f"heart_{n:02}{ending}" for n in range(number) for ending in (".png", ".txt")]
    return [Path(shutil.copy(file, folder)) for file in files]


def choose_folder(tab: Tab, folder: Path) -> None:
    tab.click("Use a folder of this computer")
    tab.write("Folder", str(folder))
    tab.click("Use this folder")


def choose_toy(tab: Tab) -> None:
    tab.click("Next: base model")
    tab.click("Use this: toy_base")
    tab.click("Next: plan")


def make_plan(tab: Tab, steps: int) -> None:
    tab.see("What is decided, and why")
    tab.choose("Length", "steps")
    tab.write("How many", str(steps))
    tab.see("The settings have changed")
    tab.click("Make the plan again")
    tab.see(f"batches of 8, {steps} steps")


def test_dropped_photos_of_any_name_are_taken_with_their_captions(tmp_path: Path) -> None:
    """Upload names that macOS gives screenshots and that Windows refuses; `._` files of macOS are left out."""
    names = ["Shot at 10.00\u202fAM", 'a<b>:"?*', "a<b>|?*:", "x" * 240, "\U0001f468\u200d\U0001f469"]
    (tmp_path / "mine").mkdir()
    for number, name in enumerate(names):
        shutil.copy(PHOTOS / f"heart_{number:02}.png", tmp_path / "mine" / f"{name}.Png")
        (tmp_path / "mine" / f"{name}.TXT").write_text(f"caption {number}")
    (tmp_path / "mine" / "._a.png").write_bytes(b"x")
    with serving(tmp_path / "suite") as server, browsing(tmp_path) as browser:
        tab = browser.open(server.address.first_url)
        tab.see("Train a LoRA on your photos")
        tab.drop(".drop", sorted((tmp_path / "mine").iterdir()))
        tab.see(f"{len(names)} of {len(names)} photos are trained")
        captions = tab.run("[...document.querySelectorAll('textarea')].map((one) => one.value)")
        assert sorted(captions) == [f"caption {number}" for number in range(len(names))]
        assert browser.told == []


def test_dropped_photos_become_a_file(tmp_path: Path) -> None:
    files = copy_photos(tmp_path / "mine", 6)
    (tmp_path / "mine" / "broken.png").write_bytes(files[0].read_bytes()[:300])
    (tmp_path / "mine" / "notes.pdf").write_bytes(b"x")
    (tmp_path / "mine" / "heart_00.txt").write_text(EVIL)
    files = sorted((tmp_path / "mine").iterdir())
    before = {path: path.read_bytes() for path in files}
    loras = tmp_path / "ComfyUI" / "models" / "loras"
    for folder in (loras, loras.with_name("checkpoints")):
        folder.mkdir(parents=True)
    with serving(tmp_path / "suite") as server, browsing(tmp_path) as browser:
        tab = browser.open(server.address.first_url)
        tab.see("Train a LoRA on your photos")
        loaded = tab.run("performance.getEntriesByType('resource').map((one) => [one.name, one.transferSize])")
        first = tab.run("performance.getEntriesByType('navigation')[0].transferSize")
        assert len(loaded) < FIRST_REQUESTS and first + sum(size for _, size in loaded) < FIRST_BYTES, loaded
        tab.drop(".drop", files)
        tab.see("Neither photos nor captions, and left out (1): notes.pdf")
        tab.see("6 of 6 photos are trained")
        assert "Cannot be trained on: 1" in tab.run("document.body.innerText")
        assert tab.run("document.querySelectorAll('img[onerror], img[src=x]').length") == 0
        assert tab.run("document.querySelector('textarea').value") == EVIL
        tab.write("Trigger word, and what it is", "zheart, a heart")
        tab.click("heart_05.png: trained")
        tab.see("5 of 6 photos are trained")
        tab.write("Caption of heart_01.png", "one that is small")
        tab.see("trained as: zheart, one that is small")
        tab.write("Find in captions", "background")
        tab.write("Replace with", "backdrop")
        tab.click("Replace all")
        tab.see("captions changed")
        tab.see("on a black backdrop")
        tab.click("Next: base model")
        tab.see("predicts noise")  # what is found moves what stands below
        tab.write("Path of a file or folder, or a Hugging Face name", str(tmp_path / "missing.safetensors"))
        tab.click("Use this")
        tab.click("Next: plan")
        tab.see(f"This did not work: --base {tmp_path / 'missing.safetensors'}")
        tab.click("2 Base model")
        tab.write("Path of a file or folder, or a Hugging Face name", str(TOY / "vae"))
        tab.click("Use this")
        tab.when(f"return document.querySelector('form input').value === {json.dumps(str(TOY / 'vae'))}")
        tab.click("3 Plan")
        tab.click("Make the plan")
        tab.see(f"This did not work: --base {TOY / 'vae'}")
        tab.click("2 Base model")
        tab.click("Use this: toy_base")
        tab.click("Next: plan")
        tab.click("Make the plan")
        make_plan(tab, 4)
        tab.click("Train")
        tab.see("The LoRA is finished")
        output = tmp_path / "suite" / "output" / "zheart"
        assert str(output / "zheart.safetensors") in tab.run("document.body.innerText")
        assert load_file(output / "zheart.safetensors")
        tab.click("Draw at several strengths")
        tab.click("Cancel")
        tab.when("return !document.querySelector('progress')")
        assert not list(output.glob("zheart-strengths*"))
        tab.click("Draw at several strengths")
        tab.see(f"Use {output / 'zheart.safetensors'}: the last one")
        tab.when("return document.querySelector('img.sheet')")
        assert tab.run("document.querySelector('img.sheet').decode().then(() => true)")
        tab.click("Copy")
        tab.see(f"zheart.safetensors is in {loras} now")
        assert (loras / "zheart.safetensors").read_bytes() == (output / "zheart.safetensors").read_bytes()
        tab.click("Copy")
        tab.see("exists already and is kept")
        chosen = [json.loads(line) for line in (output / "zheart-photos.jsonl").read_text().splitlines()]
        assert [Path(one["image_path"]).name for one in chosen] == [f"heart_0{number}.png" for number in range(5)]
        assert [one["caption"] for one in chosen[:2]] == [EVIL, "one that is small"]
        tab.click("Again with changes: zheart")
        tab.see("What is decided, and why")
        tab.when("return document.querySelector('input[type=number]').value === '4'")
        tab.click("Train a LoRA")
        tab.click("Train longer: zheart")
        tab.see("Goes on where zheart ended")
        tab.click("Make the plan again")
        tab.see("batches of 8, 6 steps")
        tab.click("Train")
        tab.when("return document.querySelector('h1')?.textContent === 'zheart-2'")
        tab.see("The LoRA is finished")
        longer = output.with_name("zheart-2")
        assert "at step 4 of 6" in "".join(
            path.read_text() for path in (output.parent / "queue" / "logs").glob("*.log")
        )
        assert json.loads((longer / "zheart-2-state" / "train_state.json").read_text())["current_step"] == 6
        assert load_file(longer / "zheart-2.safetensors") and (output / "zheart.safetensors").exists()
        (told,) = browser.told
        assert "400" in told  # the second copy
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_a_dropped_folder_keeps_photos_of_one_name_in_folders_below_apart(tmp_path: Path) -> None:
    for folder in (tmp_path / "mine", tmp_path / "mine" / "old"):
        copy_photos(folder, 1)
    (tmp_path / "mine" / "old" / "heart_00.txt").write_text("an old one")
    with serving(tmp_path / "suite") as server, browsing(tmp_path) as browser:
        tab = browser.open(server.address.first_url)
        tab.see("Train a LoRA on your photos")
        tab.drop(".drop", [tmp_path / "mine"])
        tab.see("2 of 2 photos are trained")
        captions = tab.run("[...document.querySelectorAll('textarea')].map((one) => one.value)")
        assert sorted(captions) == sorted(["an old one", (PHOTOS / "heart_00.txt").read_text().strip()])
        assert browser.told == []
    root = next((tmp_path / "suite" / "output" / "page" / "uploads").glob("*/*"))
    assert sorted(path.name for path in root.iterdir()) == [
        "heart_00.png", "heart_00.txt", "old_heart_00.png", "old_heart_00.txt",
    ]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.skipif(obstacle() is not None, reason="no GPU can be simulated here")
def test_a_base_that_does_not_fit_the_card_is_named_with_what_the_least_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_photos(tmp_path / "zheart", 4)
    extension()  # built here, because the server has a home folder of its own
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder().parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "simulated_gpu" / "startup"))
    monkeypatch.setenv("SIMULATED_BYTES", "200000000")
    with serving(tmp_path / "suite") as server, browsing(tmp_path) as browser:
        tab = browser.open(server.address.first_url)
        choose_folder(tab, tmp_path / "zheart")
        choose_toy(tab)
        tab.see("This did not work: --fit")
        tab.see("nothing fits: the least is")
        trains = "[...document.querySelectorAll('button')].find((one) => one.textContent === 'Train')"
        assert tab.run(f"{trains}.getClientRects().length") == 0
        assert browser.told == []


@pytest.mark.nightly
def test_trainings_outlive_the_server_and_stop_and_go_on_in_every_tab(tmp_path: Path) -> None:
    copy_photos(tmp_path / "zheart", 4)
    suite = tmp_path / "suite"
    queue = Store(suite).queue
    with browsing(tmp_path) as browser:
        with serving(suite) as server:
            tab = browser.open(server.address.first_url)
            choose_folder(tab, tmp_path / "nowhere")
            tab.see("is no folder")
            tab.write("Folder", str(tmp_path / "zheart"))
            tab.click("Use this folder")
            tab.see("4 of 4 photos are trained")
            choose_toy(tab)
            make_plan(tab, 30)
            plan = tab.run("location.hash")
            for name in ("zheart", "zheart-2", "zheart-3"):
                tab.click("Train")
                tab.when(f"return document.querySelector('h1')?.textContent === {json.dumps(name)}")
                tab.run(f"location.hash = {json.dumps(plan)}")
            other = browser.open(server.address.first_url)
            other.click("Stop and save: zheart-3")
            other.see("stopped")
            tab.click("Train a LoRA")
            tab.see("stopped")
            tab.see("step ")
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            tab.see("The page has no connection to its server")
        (ticket,) = queue.list_tickets("running")
        assert ticket.claim is not None and ticket.claim.is_training
        with serving(suite) as server:
            tab, other = browser.open(server.address.first_url), browser.open(server.address.first_url)
            tab.see("training")
            other.click("Stop and save: zheart")
            tab.click("Continue: zheart")  # now behind zheart-2
            for run in ("zheart", "zheart-2"):
                tab.when(
                    "return [...document.querySelectorAll('.run.done')]"
                    f".some((one) => one.querySelector('a').textContent === {json.dumps(run)})"
                )
            tab.click("Take off the list: zheart-3")
            tab.when("return document.querySelectorAll('.run').length === 2")
            other.when("return document.querySelectorAll('.run').length === 2")
    for run in ("zheart", "zheart-2"):
        assert load_file(suite / "output" / run / f"{run}.safetensors")
    assert not (suite / "output" / "zheart-3" / "zheart-3.safetensors").exists()
    assert (tmp_path / "zheart" / "heart_00.txt").read_bytes() == (PHOTOS / "heart_00.txt").read_bytes()


@pytest.mark.nightly
def test_a_training_draws_and_saves_when_it_is_asked(tmp_path: Path) -> None:
    copy_photos(tmp_path / "zheart", 4)
    output = tmp_path / "suite" / "output" / "zheart"
    with serving(tmp_path / "suite") as server, browsing(tmp_path) as browser:
        tab = browser.open(server.address.first_url)
        choose_folder(tab, tmp_path / "zheart")
        choose_toy(tab)
        make_plan(tab, 4000)
        tab.click("Train")
        tab.click("Save now: zheart")
        tab.when(
            "return [...document.querySelectorAll('li')].some((one) => /-step\\d+.safetensors/.test(one.textContent))"
        )
        tab.click("Draw now: zheart")
        tab.see("draws after this step")
        tab.when("return document.body.innerText.includes('Draw now')")
        step = "Number(/step (\\d+) of/.exec(document.body.innerText)?.[1])"
        begun = tab.run(step)
        tab.when(f"return {step} > {begun} + 1")  # a signal would cut the previews short
        tab.click("Stop and save: zheart")
        tab.see("stopped at step")
        assert browser.told == []
    every = int(re.findall(r"sample_every_n_steps = (\d+)", (output / "zheart.toml").read_text())[0])
    drawn = {int(path.name.split("_")[1]) for path in (output / "sample").glob("zheart_0*.png")}
    assert any(step % every for step in drawn)
