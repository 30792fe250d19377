"""Products of gradients on an accelerator: fused kernels where Triton runs, plain PyTorch elsewhere.

Both do the same and neither makes the host wait for the device. On a CPU `pcr_torch.cpu` is the faster.

    serve(device)       whether they are for a device
    chosen(device)      which of the two, as a line for a log
    Layout              which rows of a layer's activations belong to which response
    weight_products     a linear layer's weight gradient, per stream, and its per-response inner products
    vector_products     the same for its bias
    pair_products       |P|^2, |S|^2 and <P, S> of many totals
    combine             a P + b S of many totals, in place
"""

from pcr_torch.kernels.choice import chosen, serve, vector_products, weight_products
from pcr_torch.kernels.layout import Layout
from pcr_torch.kernels.pairs import combine, pair_products
from pcr_torch.kernels.plain import WORKSPACE

__all__ = [
    "WORKSPACE",
    "Layout",
    "chosen",
    "combine",
    "pair_products",
    "serve",
    "vector_products",
    "weight_products",
]
