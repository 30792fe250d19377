"""Who computes what to how many digits: several adapters on the same numbers, against one reference.

`problems` makes long vectors, `reference` evaluates them in extended precision, `measure` holds adapters against that
and against each other, `page` draws it.
"""
