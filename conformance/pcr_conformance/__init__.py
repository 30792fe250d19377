"""Checks that an implementation of PCR obeys the mathematics, whatever its framework.

- `cases`: the inputs of one check, as NumPy arrays.
- `adapter`: what an implementation must offer to be checked; `dense` and `libraries` offer it for pcr_core itself.
- `drawing`, `regimes`, `groups`, `geometries`, `batches`, `arguments`: what the laws are tried on, dealt so that a
  budget covers it; `shrink` makes a failure small; `strategies` offers the same cases to Hypothesis.
- `oracle`, `oracle_objective`: exact references written from the mathematics (rationals; mpmath for the rest).
- `laws`: one function per property, which raises AssertionError where it does not hold.

Importing this package imports neither torch, jax, hypothesis nor mpmath.
"""
