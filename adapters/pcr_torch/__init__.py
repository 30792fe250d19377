"""PCR for PyTorch models: `PCR(model).accumulate(...)`, `.resolve()`, then step any optimizer.

The way from rewards to `.grad`, file by file:

    rewards, logp   pcr_core.grpo_objective: two losses, and their derivatives with respect to logp
    entrances.py    accumulate(logp, objective, group_ids): a micro-batch comes in, checked by batch.py
    paths.py        which parameters the probes can measure: graph/ reads the autograd graph of logp
    totals.py       two backward passes, cut into segments; without the noise this is all there is
    recorder.py     the same passes with probes (probe.py) on linear layers, for the noise
    products.py     a layer's gradient, and inner products per response (cpu.py, kernels/ on a GPU)
    accumulated.py  P, S and the scatter of the responses, summed over micro-batches
    statistics.py   |P|^2, |S|^2, <P, S> and noise of each block, summed over ranks
    step.py         resolve(): the rule's weights a, b of each block; update.py adds a P + b S to .grad
    method.py       PCR, which binds all of this to a model; trl/ is the trainer around it
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("pcr_torch needs PyTorch: pip install 'pcr-grpo[torch]'") from error

from pcr_torch.blocks import Block, describe_blocks, select_blocks
from pcr_torch.method import PCR
from pcr_torch.report import Report

__all__ = ["PCR", "Block", "Report", "describe_blocks", "select_blocks"]
