"""PCR for PyTorch models: `PCR(model).accumulate(...)`, `.resolve()`, then step any optimizer."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("pcr_torch needs PyTorch: pip install 'pcr-grpo[torch]'") from error

from pcr_torch.blocks import Block, describe_blocks, select_blocks
from pcr_torch.method import PCR
from pcr_torch.report import Report

__all__ = ["PCR", "Block", "Report", "describe_blocks", "select_blocks"]
