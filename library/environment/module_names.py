"""Names of packages on PyPI, and the modules that they are imported as.

An old Python must be able to parse this file, so annotations are quoted.
"""

MODULES = {
    "beautifulsoup4": "bs4", "lycoris-lora": "lycoris", "opencv-python-headless": "cv2", "pillow": "PIL",
    "prodigy-plus-schedule-free": "prodigyplus", "protobuf": "google", "pyyaml": "yaml",
}  # fmt: skip


def module_of(package: str) -> str:
    """Return the name under which a package is imported."""
    return MODULES.get(package.lower(), package.lower().replace("-", "_"))
