"""How far two numbers that should agree may lie apart, and why."""

EXACT = {"rtol": 0.0, "atol": 0.0}
FLOAT32_SAME_MATH = {"rtol": 1e-5, "atol": 1e-6}  # the same sums in another order
FLOAT32_DEEP = {"rtol": 1e-4, "atol": 1e-5}  # a whole network against another implementation of it
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}  # float64 recomputation of float64 results
FLOAT32_SAMPLED = {"rtol": 1e-3, "atol": 1e-3}  # a dozen calls of a network, each given the rounding of those before
