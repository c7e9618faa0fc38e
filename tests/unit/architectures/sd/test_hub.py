"""Models given as a repository name on the Hugging Face Hub, with a fake hub."""

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from library.base.errors import UserError
from library.checkpoints.model_lookup import find_model
from library.train_photos.base import recognise
from tools import draw


class Hub:
    """A fake repository that copies requested files from `folder` to `snapshot`."""

    def __init__(self, folder: Path, snapshot: Path) -> None:
        self.folder, self.snapshot = folder, snapshot
        self.got: set[str] = set()
        self.asked: set[tuple[str, str | None]] = set()

    def download(
        self,
        name: str,
        allow_patterns: list[str],
        local_files_only: bool,
        tqdm_class: None,
        revision: str | None = None,
    ) -> str:
        self.asked.add((name, revision))
        for file in self.folder.rglob("*"):
            path = file.relative_to(self.folder).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):
                (self.snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.snapshot / path)
                self.got.add(path)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_sd_folder) -> Hub:
    shutil.copytree(tiny_sd_folder, tmp_path / "repository")
    fake = Hub(tmp_path / "repository", tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, name, timeout, revision=None: None)
    return fake


def test_a_repository_loads_like_its_folder(hub, open_sd):
    arch = open_sd("someone/tiny-sd")
    assert arch.load.path == hub.snapshot
    assert arch.load.denoiser() is not None and arch.load.vae() is not None
    assert arch.text.tokenize(["a cat"]).ids_BLT[0].shape == (1, 1, 77)


def test_a_revision_stands_behind_the_name(hub, open_sd):
    assert open_sd("someone/tiny-sd@refs/pr/1").load.denoiser() is not None
    assert {asked for asked in hub.asked if asked[0] == "someone/tiny-sd"} == {("someone/tiny-sd", "refs/pr/1")}


def test_only_one_format_of_the_weights_is_downloaded(hub, open_sd):
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (hub.folder / "unet" / name).write_bytes(b"another format")
    (hub.folder / "safety_checker").mkdir()
    (hub.folder / "safety_checker" / "model.safetensors").write_bytes(b"not needed")
    (hub.folder / "v1-5-pruned.safetensors").write_bytes(b"all of it again")
    open_sd("someone/tiny-sd")
    assert {path for path in hub.got if not path.endswith((".json", ".txt"))} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_train_py_downloads_one_format_though_no_repository_has_a_unet_and_a_transformer(hub):
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (hub.folder / "unet" / name).write_bytes(b"another format")
    assert recognise("someone/tiny-sd").spec.script == "train_network.py"
    weights = {path for path in hub.got if not path.endswith((".json", ".txt"))}
    assert weights == {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}


def test_a_repository_with_only_half_precision_weights_loads(hub, open_sd):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (hub.folder / part / f"{stem}.safetensors").rename(hub.folder / part / f"{stem}.fp16.safetensors")
    assert open_sd("someone/tiny-sd").load.denoiser() is not None


def save_variant(part: Path, stem: str, name: str) -> dict[str, torch.Tensor]:
    """Write another half of a part's weights as its variant `name`, and return them."""
    other = {key: (value / 2).half() for key, value in load_file(part / f"{stem}.safetensors").items()}
    save_file(other, part / f"{stem}.{name}.safetensors", {"format": "pt"})
    return other


@pytest.mark.parametrize("name", ["fp16", "non_ema"])
def test_of_a_variant_nothing_else_is_downloaded_and_a_part_without_it_is_whole(hub, open_sd, caplog, name):
    unet = save_variant(hub.folder / "unet", "diffusion_pytorch_model", name)
    save_variant(hub.folder / "text_encoder", "model", name)
    arch = open_sd("someone/tiny-sd", variant=name)
    assert {path for path in hub.got if path.endswith(".safetensors")} == {
        f"unet/diffusion_pytorch_model.{name}.safetensors",
        f"text_encoder/model.{name}.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert f"--variant {name}:" in caplog.text and "vae has no such weights; taking" in caplog.text
    loaded = arch.load.denoiser().state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in unet.items())


def test_a_folder_has_the_variant_that_is_named_or_its_plain_weights(hub, open_sd):
    unet = save_variant(hub.folder / "unet", "diffusion_pytorch_model", "ema")
    plain = load_file(hub.folder / "unet" / "diffusion_pytorch_model.safetensors")
    for variant, expected in ((None, plain), ("ema", unet)):
        loaded = open_sd(hub.folder, variant=variant).load.denoiser().state_dict()
        assert all(torch.equal(loaded[key], value.float()) for key, value in expected.items())


def test_a_sharded_variant_is_found_by_its_index(hub, open_sd):
    part, stem = hub.folder / "unet", "diffusion_pytorch_model"
    unet = save_variant(part, stem, "fp16")
    (part / f"{stem}.fp16.safetensors").unlink()
    names = sorted(unet)
    files = {key: f"{stem}.fp16-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(names)}
    for file in set(files.values()):
        save_file({key: unet[key] for key in names if files[key] == file}, part / file, {"format": "pt"})
    (part / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    loaded = open_sd("someone/tiny-sd", variant="fp16").load.denoiser().state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in unet.items())


def test_a_variant_that_no_part_has_is_named(hub, open_sd, tiny_sd_file):
    for base in ("someone/tiny-sd", hub.folder, tiny_sd_file):
        with pytest.raises(UserError, match="--variant bf16 is in the name of no weight file of"):
            open_sd(base, variant="bf16")


@pytest.mark.parametrize("has_subfolder", [True, False])
def test_a_vae_by_name_downloads_nothing_else_of_its_repository(hub, open_sd, tiny_sd_folder, has_subfolder):
    if not has_subfolder:
        for file in (hub.folder / "vae").iterdir():
            shutil.copy(file, hub.folder / file.name)
        shutil.rmtree(hub.folder / "vae")
    assert open_sd(tiny_sd_folder, vae="someone/vae").load.vae() is not None
    assert not any(path.startswith(("unet/", "text_encoder/")) for path in hub.got)


def test_an_error_of_the_hub_names_the_flag_and_a_solution(monkeypatch, tmp_path):
    def refuse(self, name, timeout):
        raise OSError("no route to host")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(ValueError, match=r"--vae someone/never is neither .*no route to host.*use the path"):
        find_model("--vae", "someone/never", (("",),))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_name_on_the_hub_is_drawn_with_its_vae(hub, tmp_path, variant):
    save_variant(hub.folder / "unet", "diffusion_pytorch_model", "fp16")
    words = ["someone/tiny-sd", "--prompt", "a cat --w 64 --h 64 --s 1", "--output", str(tmp_path / "drawn")]
    assert draw.main([*words, *([] if variant is None else ["--variant", variant])]) == 0
    unets = {path for path in hub.got if path.startswith("unet/") and path.endswith(".safetensors")}
    assert unets == {f"unet/diffusion_pytorch_model.{'' if variant is None else 'fp16.'}safetensors"}
    assert "vae/diffusion_pytorch_model.safetensors" in hub.got and list((tmp_path / "drawn").glob("*.png"))
