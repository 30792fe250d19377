"""Names of the levels of conformance; apart, so that the pytest plugin imports nothing else at start."""

LEVELS = {
    "core": "laws 1 to 6: what the projection does, and what must not matter",
    "numerics": "numbers against exact arithmetic, dtypes, and numbers that are not finite",
    "objective": "losses and cotangents against exact arithmetic",
    "grad": "closed-form cotangents against automatic differentiation",
    "jit": "compiled against eager",
    "sharded": "strata and shards add up",
    "trainer": "the update of a whole training stack against the loop's",
}
