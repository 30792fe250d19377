"""Adapters of training stacks; each file imports its library, and is imported only when it is asked for."""
