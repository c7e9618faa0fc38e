"""Any text-to-image pipeline of diffusers, trained by its measured convention. See `assembly.py`."""
