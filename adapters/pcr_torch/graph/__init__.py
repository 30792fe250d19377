"""What the autograd graph of the log-probabilities says, read before any backward pass.

nodes.py            names, shapes and saved arguments of a node
order.py            the nodes in the order in which a backward pass runs them
segments.py         the graph cut where all of it runs through one node, so that two passes can alternate
rows.py             rows of activations that one log-probability alone depends on
owners.py           which response each row of a probed layer's activations belongs to, by
  owner_rules.py      an operation's inputs from its output
  owner_specials.py   the same, where it depends on what the operation saved
  owner_moves.py      the same of operations that only move elements, by running them
  owner_arrays.py     arrays of owners
"""
