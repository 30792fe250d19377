"""The paper's figures, in small: drawn from what experiments have on record, and from one run of SmolLM2.

python -m benchmarks.learning.figures
"""
