"""How far two numbers that should agree may lie apart, and why."""

EXACT = {"rtol": 0.0, "atol": 0.0}
FLOAT32_SAME_MATH = {"rtol": 1e-5, "atol": 1e-6}  # the same sums in another order
FLOAT32_DEEP = {"rtol": 1e-4, "atol": 1e-5}  # a whole network against another implementation of it
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}  # float64 recomputation of float64 results
FLOAT32_SAMPLED = {"rtol": 1e-3, "atol": 1e-3}  # a dozen calls of a network, each given the rounding of those before
SUMS_OF_A_PASS = 2e-5  # of a gradient in float32 where products have more rows: eps times some hundred roundings
SUMS_OF_A_RUN = 1e-4  # of a weight after some steps of SGD along such gradients, each with the rounding of those before
