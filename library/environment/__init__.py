"""This Python: versions, packages, and the build of torch for this machine."""
