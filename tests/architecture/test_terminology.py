"""Identifiers use the field's terms, and base models are named only in their own packages."""

import re
from pathlib import Path

import pytest

from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from tests.architecture.sources import python_files, source_of
from tests.tiny.bases import BASES

FILES = python_files("library", "networks", "tools")
REPLACED = {  # word of an identifier -> the field's word
    "allotment": "TargetSettings",
    "door": "network module, AdapterKind",
    "picture": "image",
    "pictures": "images",
    "sidebyside": "Multiplexer",
    "modelcard": "BaseModelSpec",
    "rehearse": "preflight",
    "rehearsal": "preflight",
    "settle": "resolve",
    "sketch": "on_meta_device",
    "site": "target",
    "sites": "targets",
    "shelf": "ShardedBlock",
    "told": "conditioning, result, message, digest: what it is",
    "trainee": "network",
    "twin": "duplicate",
}
PHRASES = {  # consecutive words of an identifier
    "hand_over": "identity_collate",
    "in_words": "format_…",
    "speaking_of": "label",
    "way_out": "suggest_fix",
    "ways_out": "memory_hints",
    "without_values": "on_meta_device",
}
FILE_NAMES = {
    "adapters.py": "layers.py",
    "average.py": "ema.py",
    "card.py": "spec.py",
    "doors": "kinds",
    "forms": "formats",
    "joins.py": "dora.py",
    "noise_levels.py": "timesteps.py",
    "noise_ranks.py": "tlora.py",
    "perturbation.py": "ggpo.py",
    "places": "offload",
    "rules.py": "ranges.py, no_effect.py",
    "sites": "targets",
    "spread.py": "sharded.py",
    "starts.py": "init.py",
    "turned.py": "orthogonal.py",
}
IN_FILES = {  # fields of events, of latent origins and of shard journals
    "num_pictures",
    "picture",
    "picture_bytes",
    "picture_hash",
    "picture_mtime_ns",
    "pictures",
    "pictures_per_second",
}
MAY_HAVE = {("networks/core/targets", "rules.py")}  # a rule is a pattern with its rank, as in --network_args


def split_words(identifier: str) -> str:
    """Return the lower-case words of an identifier, separated by underscores."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
    return f"_{split.strip('_').lower()}_"


def private_words_in(path: Path) -> dict[str, str]:
    """Return the identifiers of a file that contain a replaced word, with the replacement."""
    words = {identifier: split_words(identifier) for identifier in source_of(path).identifiers - IN_FILES}
    terms = (REPLACED | PHRASES).items()
    return {name: f"say {new}" for name, split in words.items() for old, new in terms if f"_{old}_" in split}


def test_identifiers_use_the_terms_of_the_field() -> None:
    jargon = {path.as_posix(): private_words_in(path) for path in FILES}
    assert {path: words for path, words in jargon.items() if words} == {}


@pytest.mark.parametrize(
    ("start", "returned"), [("refuse_", r"None|NoReturn"), ("(is|has|are|mixes)_", r"bool|TypeGuard\[.*\]|Tensor|")]
)
def test_names_say_what_a_function_returns(start: str, returned: str) -> None:
    others = {
        f"{path}: {name} returns {kind}"
        for path in FILES
        for name, _, kind in source_of(path).functions
        if re.match(start, name) and not re.fullmatch(returned, kind)
    }
    assert not others


@pytest.mark.parametrize("name", FILE_NAMES)
def test_file_names_use_the_terms_of_the_field(name: str) -> None:
    paths = [path for path in FILES if name in path.parts]
    checked = [path for path in paths if (path.parent.as_posix(), path.name) not in MAY_HAVE]
    assert not checked, f"say {FILE_NAMES[name]}"


# Base models are named only in their own packages.
# The names come from the specs, so new base models are covered too.

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ROOT / "library" / "architectures"
NAMED_FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for room in ("library", "networks", "tools")
    for path in sorted((ROOT / room).rglob("*.py"))
    if ARCHITECTURES not in path.parents or path.parent == ARCHITECTURES
}
TOO_SHORT = {"sd"}  # a package name that half the words of this field begin with

DOORS = "programs start or import it by this name"
SHARED_VAE = "a VAE that several models share is called after the one that it came with"
OPTIONS = "an option of sd-scripts that has a model in its name or is for one alone"
MAY_NAME_MODELS = {
    "library/flux_train_utils.py": DOORS,
    "library/model_util.py": DOORS,
    "library/qwen_image_autoencoder_kl_2d.py": DOORS,
    "library/sdxl_model_util.py": DOORS,
    # the network modules for one model
    **{f"{base.module.replace('.', '/')}.py": DOORS for base in BASES.values() if base.module != "networks.lora"},
    "networks/oft_flux.py": DOORS,
    "networks/convert_flux_lora.py": DOORS,
    "networks/convert_anima_lora_to_comfy.py": DOORS,
    "networks/convert_hunyuan_image_lora_to_comfy.py": DOORS,
    "networks/flux_extract_lora.py": DOORS,
    "networks/flux_merge_lora.py": DOORS,
    "networks/sdxl_merge_lora.py": DOORS,
    "tools/merge_flux_lora.py": "a command of sd-scripts for one model, whose text encoders are files of their own",
    "tools/convert_stable_diffusion.py": "a command of sd-scripts for one family, whose layouts it writes",
    "tools/convert_diffusers20_original_sd.py": DOORS,
    "tools/convert_diffusers_to_flux.py": "a command of sd-scripts for one model, whose layout it writes",
    "tools/merge_sd3_safetensors.py": "a command of sd-scripts for one model, whose parts are files of their own",
    "tools/cache_latents.py": OPTIONS,
    "tools/prepare_metadata.py": OPTIONS,
    "tools/cache_text_encoder_outputs.py": OPTIONS,
    "tools/extract_lora_from_models.py": OPTIONS,
    "tools/plan_memory.py": "the example of its help is a command line of one model",
    "tools/quickstart/sampling.py": "draws with the model of the quickstart",
    "library/options/model.py": OPTIONS,
    "library/page/model_folders.py": "folders of other programs",
    "library/options/output/preview.py": OPTIONS,
    "library/options/training/flow.py": OPTIONS,
    "library/diffusion/timesteps.py": "schedules are called after the model or paper that they come from",
    "library/memory/planner/counter.py": "a measurement says what it was made on",
    "library/memory/planner/fakes.py": "a measurement says what it was made on",
    "library/models/vae/flux.py": SHARED_VAE,
    "library/models/vae/flux_2.py": SHARED_VAE,
    "library/models/vae/qwen_image.py": SHARED_VAE,
    "library/models/vae/qwen_image_2d.py": SHARED_VAE,
    "library/models/unet/unet.py": "constants of a U-Net that two packages share, by generation",
}


def names_of(specs: tuple[BaseModelSpec, ...]) -> set[str]:
    """Return package names and the names in specs and messages, without version numbers."""
    packages = {path.name for path in ARCHITECTURES.iterdir() if (path / "spec.py").is_file()} - TOO_SHORT
    called = {spec.called.partition(" ")[2] for spec in specs} | {spec.title for spec in specs}
    return packages | {spec.name for spec in specs} | {re.sub(r"[ .]?[\d.]+(\.x)?$| XL$", "", name) for name in called}


def pattern_of(name: str) -> str:
    """Return a pattern for the name as a word, with or without separators, also at the start of an identifier."""
    words = "[ _-]?".join(re.findall(r"[A-Za-z]+|\d+", name))
    return rf"(?<![a-zA-Z])(?i:{words})(?!{'[0-9]' if name[-1].isdigit() else '[a-z]'})"


PROGRAM = "stable-diffusion.cpp"
WORDS = names_of(list_specs()) - {"SD"}
NAMES = re.compile("|".join(pattern_of(name) for name in sorted(WORDS, key=len, reverse=True)))


def names_in(path: str) -> list[str]:
    return [match[0] for match in NAMES.finditer(f"{path}\n{NAMED_FILES[path]}".replace(PROGRAM, ""))]


@pytest.mark.parametrize(
    "word", ["FluxOptions", "sdxl_model", "HunyuanImage", "is_flux", "SD3", "Stable Diffusion 1.x"]
)
def test_names_are_detected_in_every_spelling(word: str) -> None:
    assert NAMES.search(word)


@pytest.mark.parametrize("word", ["influx", "sd_model", "animal", "sd15.safetensors"])
def test_other_words_are_not_matched(word: str) -> None:
    assert not NAMES.search(word)


def test_no_model_is_named_outside_its_package() -> None:
    named = {path: names_in(path) for path in NAMED_FILES if path not in MAY_NAME_MODELS}
    assert {path: names for path, names in named.items() if names} == {}, "say it on the spec, or in the package"


@pytest.mark.parametrize("path", MAY_NAME_MODELS)
def test_every_exception_is_still_needed(path: str) -> None:
    assert path in NAMED_FILES and names_in(path), f"{path} names no model; take it off the list"


@pytest.mark.parametrize("spec", list_specs(), ids=lambda spec: spec.name)
def test_every_spec_names_an_existing_script(spec: BaseModelSpec) -> None:
    assert (ROOT / spec.script).is_file()
    scripts = {path.name for path in ROOT.glob("*train_network.py")}
    assert scripts == {other.script for other in list_specs()}


@pytest.mark.parametrize("package", sorted(p.name for p in ARCHITECTURES.iterdir() if (p / "spec.py").is_file()))
def test_no_package_names_the_package_of_another(package: str) -> None:
    other_packages = {path.name for path in ARCHITECTURES.iterdir() if (path / "spec.py").is_file()} - {package}
    for path in (ARCHITECTURES / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [other for other in other_packages if re.search(rf"architectures[./]{other}\b", text)], path
