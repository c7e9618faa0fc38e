"""Reading of weight files with torch. Their headers are checked first."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from library.base.errors import error_in, of_file
from library.checkpoints.headers import Header, holds_safetensors, is_safetensors, read_header, require_weight_file

PEFT_STEM = "adapter_model"  # of the weight file that PEFT saves in a folder
OBJECT_IN_PICKLE = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message about an object that it refuses to load

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # since torch 2.7
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def load_state_dict(path: str | Path, device: str | torch.device = "cpu", mmap: bool = False) -> dict[str, Tensor]:
    """Load all tensors of a safetensors or pickled file (.ckpt, .pt, .pth, .bin), by name.

    The content determines the format, see `holds_safetensors`. `mmap` leaves the values of a pickled file on disk until
    they are used, if its format allows it (torch >= 1.6). Pickled files are read with weights_only=True, so no code in
    them is executed; the dictionary `state_dict` that training programs write is unwrapped. Raises UserError for a
    missing or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        if not path.exists():
            raise of_file(path, cause="missing")("does not exist")
        raise of_file(path)("is a folder, not a weight file")
    require_weight_file(path)
    if holds_safetensors(path):
        from safetensors.torch import load_file

        require_dtypes(path, read_header(path))  # clearer errors for a damaged file
        # Old versions of safetensors create tensors on torch's default device, such as "meta".
        with torch.device(device):
            return dict(load_file(path, str(device)))
    content = load_pickle(path, device, mmap)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise of_file(path)(f"contains a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(name): to_tensor(str(name), value) for name, value in content.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def require_dtypes(path: Path, header: Header) -> None:
    """Raise UserError for a type that this version of torch lacks."""
    lacking = next((entry.dtype for entry in header.tensors.values() if entry.dtype not in TORCH_DTYPES), None)
    if lacking is not None:
        raise of_file(path)(f"has tensors of the type {lacking}; torch {torch.__version__} is too old for them")


def load_pickle(path: Path, device: str | torch.device = "cpu", mmap: bool = False) -> Any:
    """Load the tensors, numbers and strings of a pickled file without executing code.

    Raises UserError for a damaged file and for one with other objects.
    """
    uses_mmap = mmap and is_zipfile(path) and not is_safetensors(path)  # given a path, torch.load goes by its extension
    try:
        with path.open("rb") as file:
            return torch.load(path if uses_mmap else file, map_location=device, weights_only=True, mmap=uses_mmap)
    except Exception as error:  # unpickling a damaged file can raise anything
        foreign_object = OBJECT_IN_PICKLE.search(str(error))
        if foreign_object or type(error).__name__ == "UnpicklingError":
            object_name = f" ({foreign_object[1]})" if foreign_object else ""
            raise of_file(path, cause="unreadable")(
                f"cannot be read as a file of plain tensors: it contains other Python objects{object_name}, which are "
                "not loaded, because that could run code",
                "convert it to .safetensors with a program you trust",
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:200]
        raise of_file(path, cause="unreadable")(
            f"cannot be read as a file of plain tensors: it is truncated or damaged ({reason})",
            "download or copy it again",
        ) from error


def to_tensor(name: str, value: Any) -> Tensor | None:
    """Convert a value of a pickled dictionary to a tensor; return None unless it is a weight or an alpha.

    Alphas may be plain numbers; dropping them would change the adapter's strength.
    """
    is_alpha = name.endswith(".alpha") and isinstance(value, int | float)
    # On the CPU even where a caller has made another device the default: networks are first tried on the meta device.
    return torch.tensor(float(value), device="cpu") if is_alpha else value if isinstance(value, Tensor) else None


def file_in_folder(path: Path, where: str) -> Path:
    """Return the weight file in a folder saved by PEFT; return other paths unchanged.

    Raises UserError naming `where` for any other folder.
    """
    if not path.is_dir():
        return path
    weight_file = next(
        (file for suffix in ("safetensors", "bin") if (file := path / f"{PEFT_STEM}.{suffix}").is_file()), None
    )
    if weight_file is None:
        raise error_in(path=path)(
            f"{where} is a folder without {PEFT_STEM}.safetensors, which PEFT saves", "use an adapter file"
        )
    return weight_file


def display_path(path: Path) -> Path:
    """Return the path to show for an adapter file: the folder if PEFT saved it, because all its files have one name."""
    return path.parent if path.stem == PEFT_STEM and path.parent.name else path
