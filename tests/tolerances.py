"""Tolerances for comparing numbers that should agree, and their reasons."""

EXACT = {"rtol": 0.0, "atol": 0.0}
FLOAT32_SAME_MATH = {"rtol": 1e-5, "atol": 1e-6}  # equal sums in another order
FLOAT32_DEEP = {"rtol": 1e-4, "atol": 1e-5}  # a whole network against another implementation of it
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}  # float64 recomputation of float64 results
FLOAT32_SAMPLED = {"rtol": 1e-3, "atol": 1e-3}  # a dozen calls of a network, whose rounding errors add up
SUMS_OF_A_PASS = 2e-5  # of a float32 gradient if products have more rows: eps times a few hundred rounding errors
SUMS_OF_A_RUN = 1e-4  # of a weight after some SGD steps along such gradients, with accumulated rounding errors
