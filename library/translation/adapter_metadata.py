"""How an adapter was trained, as its file says: in kohya's ss_… fields, or as OneTrainer and diffusers do."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.base.json_text import InvalidJson, parse_json
from library.checkpoints.headers import read_metadata
from library.translation.configuration import Configuration, Setting

PROGRAM = "adapter_metadata"
ONETRAINER = "ot_config"
DIFFUSERS = "lora_adapter_metadata"  # JSON with PEFT's settings, each by the name of a part of the pipeline


def read_adapter(path: Path, read_tables: Callable[[Any, Path], Configuration | None]) -> Configuration | None:
    """Return the settings in an adapter file's metadata; `read_tables` reads a whole configuration that is in them."""
    metadata = read_metadata(path)
    whole = parse(metadata.get(ONETRAINER, ""))
    if isinstance(whole, dict) and (configuration := read_tables(whole, path)) is not None:
        return configuration
    values = {key: parse(value) for key, value in metadata.items() if key.startswith(("ss_", "modelspec."))}
    if isinstance(parts := parse(metadata.get(DIFFUSERS, "")), dict):
        values |= {f"peft.{key.rpartition('.')[2]}": value for key, value in parts.items()}
    settings = tuple(Setting(key, value, key) for key, value in flatten_arguments(values).items())
    return Configuration(PROGRAM, settings) if settings else None


def parse(text: str) -> Any:
    """Return the value of a metadata field: JSON where it is JSON, None where it says so, else the text."""
    if text in ("None", ""):
        return None
    if text in ("True", "False"):
        return text == "True"
    try:
        return parse_json(text)
    except InvalidJson:
        return text


def flatten_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Split kohya's `ss_optimizer` ("torch.optim.adamw.AdamW(weight_decay=0.01)") into a name and arguments."""
    optimizer = values.get("ss_optimizer")
    if not isinstance(optimizer, str) or not optimizer.endswith(")"):
        return dict(values)
    name, _, arguments = optimizer[:-1].partition("(")
    args = [part for part in arguments.split(",") if "=" in part]
    return {**values, "ss_optimizer": name, **({"ss_optimizer_args": args} if args else {})}
