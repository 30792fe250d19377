"""Who computes what to how many digits: several adapters on the same numbers, against one reference.

`problems` makes long vectors, `reference` and `token_reference` evaluate them in extended precision, `quantities` says
what is compared, `measure` holds adapters against the reference and against each other, `page` draws it.
"""
