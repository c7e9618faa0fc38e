"""Tiny SD3 models on disk: a file with all text encoders and each part in a file next to it, and one without them."""

from tests.running import tiny_model

sd3_file = tiny_model("sd3", 21)
sd3_without_text = tiny_model("sd3", 21, with_text=False)
