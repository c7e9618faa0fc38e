"""Small modules that know nothing of the rest: errors, formatting, progress, randomness."""
