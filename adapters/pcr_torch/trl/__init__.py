"""PCR as a drop-in for TRL's GRPO: `PCRTrainer` and `PCRConfig` in place of `GRPOTrainer` and `GRPOConfig`.

The losses stay TRL's own, or a subclass's. A loss that is the sum of a reward term and a KL term is evaluated once, and
gives the derivatives of both terms with respect to the log-probabilities. Two backward passes take the place of one,
and `.grad` is written when gradients synchronise. `PCRTrainer` is built in steps, each a subclass of the one before:

    trl.GRPOTrainer
    whole_groups.py   a micro-batch holds whole groups, and says which row is of which group
    shared_loss.py    the loss, evaluated once so that its two terms can be told apart
    bound.py          `pcr_torch.PCR` of the trained model
    two_passes.py     two backward passes in place of one; resolve where gradients synchronise
    resuming.py       checkpoints from which a run goes on bit for bit
    trainer.py        PCRTrainer
"""

try:
    import accelerate as _accelerate  # noqa: F401
    from trl import GRPOTrainer as _stock  # noqa: F401
except ImportError as error:
    raise ImportError("pcr_torch.trl needs TRL 1.16: pip install 'pcr-grpo[trl]'") from error

from pcr_torch.trl.config import PCRConfig
from pcr_torch.trl.trainer import PCRTrainer

__all__ = ["PCRConfig", "PCRTrainer"]
