"""Where other programs keep base models: ComfyUI, Forge, A1111, InvokeAI's imports and the Hugging Face cache."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOYS = (ROOT / "configs" / "quickstart" / "toy_base",)
PROGRAMS = ("ComfyUI", "comfyui", "stable-diffusion-webui-forge", "stable-diffusion-webui", "sd-webui-forge", "forge",
            "sd-webui-forge-classic", "reForge", "StabilityMatrix/Data", "StabilityMatrix", "SwarmUI")  # fmt: skip
KINDS = ("checkpoints", "diffusion_models", "unet", "Stable-diffusion", "StableDiffusion")  # in their `models`
ADAPTERS = ("loras", "Lora")
ENDINGS = (".safetensors", ".ckpt")
DENOISERS = ("transformer", "unet")
MOST_MODELS, MOST_VISITED = 200, 5_000


def list_parents() -> Iterator[Path]:
    """Yield the folders that people install such programs in."""
    home = Path.home()
    yield from (ROOT.parent, home, home / "Documents", home / "Desktop", home / "ai", home / "AI", home / "apps")
    yield from (Path(f"{letter}:/") for letter in "CDEF" if os.name == "nt")
    yield from (Path("/workspace"), Path("/opt"))


def find_model_folders() -> list[Path]:
    """Return the folders of base models of the programs that are installed."""
    found = (
        models / kind
        for parent in list_parents()
        for program in PROGRAMS
        for models in (parent / program / "models", parent / program / "Models")
        for kind in KINDS
    )
    return list(dict.fromkeys(path.resolve() for path in found if path.is_dir()))


def find_adapter_folders() -> list[Path]:
    """Return the folders that such programs load adapters from."""
    folders = (models.parent / name for models in find_model_folders() for name in ADAPTERS)
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def hub_cache() -> Path:
    """Return the folder of models that were downloaded from the Hugging Face hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def find_models(more: Sequence[Path]) -> list[Path]:
    """Return the files and diffusers folders that may be base models: in `more` folders, those of other programs and
    the hub's cache, and last the quickstart's toy."""
    found: dict[Path, None] = {}
    for folder in (*more, *find_model_folders()):
        found.update(dict.fromkeys(walk_models(folder)))
    for snapshot in sorted(hub_cache().glob("models--*/snapshots/*")):
        if is_pipeline(snapshot):
            found[snapshot] = None
    found.update(dict.fromkeys(path for path in TOYS if path.is_dir()))
    return list(found)[:MOST_MODELS]


def is_pipeline(path: Path) -> bool:
    return (path / "model_index.json").is_file() and any((path / name).is_dir() for name in DENOISERS)


def walk_models(root: Path) -> Iterator[Path]:
    """Yield the files and diffusers folders in a folder and those below it."""
    for number, (folder, names, files) in enumerate(os.walk(root)):
        if number > MOST_VISITED:
            return
        path = Path(folder)
        if is_pipeline(path):
            names.clear()
            yield path
            continue
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (path / name for name in sorted(files) if name.endswith(ENDINGS) and not name.startswith("."))
