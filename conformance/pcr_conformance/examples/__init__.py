"""Adapters for libraries that pcr_core does not know, as somebody else would write them from docs/adapter.md.

Each is one file to copy from: `c_kernel` is a kernel of one's own behind NumPy, `dask` an array library on which
pcr_core runs, `mlx` one on which it does not.

    pcr-conformance run --adapter pcr_conformance.examples.c_kernel:CKernel
"""
