"""The values of --base_format and how they store a weight."""

from library.memory.codecs.weight_format import load_format
from library.options.machine.base_formats import BASE_FORMATS

CODECS = {name: load_format(name).codec for name in BASE_FORMATS}
EIGHT_BIT_FORMATS = tuple(name for name in BASE_FORMATS if load_format(name).supports_8bit_matmul)
