"""PCR for JAX: pytrees of parameters from any library, pure functions, one compiled program.

Importing it registers the records of `pcr_core` as pytrees.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError("pcr_jax needs JAX: pip install 'pcr-grpo[jax]'") from error

from pcr_jax import records as _records  # noqa: F401
from pcr_jax.blocks import Blocks, describe_blocks, select_blocks
from pcr_jax.dense import dense
from pcr_jax.gradient_transformation import resolving
from pcr_jax.pullback import Pulled, pullback
from pcr_jax.resolve import Report, resolve
from pcr_jax.temporal import init_prior
from pcr_jax.train_step import Rollouts, StepReport, TrainState, init_state, make_train_step

__all__ = [
    "Blocks",
    "Pulled",
    "Report",
    "Rollouts",
    "StepReport",
    "TrainState",
    "dense",
    "describe_blocks",
    "init_prior",
    "init_state",
    "make_train_step",
    "pullback",
    "resolve",
    "resolving",
    "select_blocks",
]
