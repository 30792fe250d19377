"""The command pcr-train: what of a training run knows no framework.

Tasks, settings, the order of a run, evaluation, metrics and plots are here; PyTorch and JAX each bring an `Engine`,
which is loaded when a run asks for it.
"""
