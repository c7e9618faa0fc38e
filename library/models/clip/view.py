"""The module tree of a CLIP text encoder for network modules."""

from torch import nn


class ClipView(nn.Module):
    """The layers of a CLIP text encoder below "text_model.", which adapter names have and transformers 5 dropped."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.text_model = body
