"""Complete runs on a CUDA GPU."""
