"""What PCR costs on an accelerator, and whether it is right there, by one command: `python -m benchmarks.gpu`.

A part a file, each run in a process of its own (`isolated.py`), so that one that fails or hangs takes no other along.
"""
