"""How a micro-batch is given to `PCR`: as an objective, as two cotangents, or one stream at a time."""

from __future__ import annotations

from torch import Tensor

from pcr_core import Objective
from pcr_torch.baseline import Applied, Baseline


class Entrances:
    """`accumulate` and its variants, and the baseline that advantages are shifted by; `PCR` takes what they give."""

    _baseline: Baseline | None

    def _pull(
        self,
        streams: tuple[int, ...],
        logp: Tensor,
        cotangents: tuple[Tensor, ...],
        group_ids: Tensor,
        applied: Applied | None,
    ) -> None:
        raise NotImplementedError

    def accumulate(
        self,
        logp: Tensor,
        objective: Objective[Tensor],
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Accumulate both streams of one micro-batch, in two backward passes over logp's graph, which is freed.

        With every > 1 one pass, unless the step is `measuring`. Where the loop measures the noise, many.

        Gradients of parameters outside the blocks are added to their `.grad`; the blocks' streams are kept apart until
        `resolve`.

        Args:
            logp: (n, T) token log-probabilities with their graph.
            objective: `pcr_core.grpo_objective` of these; its normalisation must be that of the whole batch.
            group_ids: (n,) integers, the prompt of each response.
            advantages: (n,) as the objective was given them, with a baseline; see `shifted`.
            weight: (n,) as `shifted` was given it.

        Raises:
            ValueError: shapes that do not match, a group of one response with strata="group", a block's parameter that
                was frozen meanwhile, or what the fast path cannot measure (docs/supported.md).
            TypeError: arguments that are not tensors of the right kind.
            RuntimeError: an earlier call ended within its backward passes; see `discard`.
        """
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected a pcr_core.Objective, got {type(objective).__name__}")
        cotangents = objective.plasticity_cotangent, objective.stability_cotangent
        self.accumulate_cotangents(logp, *cotangents, group_ids=group_ids, advantages=advantages, weight=weight)

    def accumulate_cotangents(
        self,
        logp: Tensor,
        plasticity: Tensor,
        stability: Tensor,
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Accumulate both streams of any loss, from its two (n, T) derivatives with respect to logp."""
        applied = None if self._baseline is None else self._baseline.check(logp, advantages, weight)
        self._pull((0, 1), logp, (plasticity, stability), group_ids, applied)

    def accumulate_plasticity(
        self,
        logp: Tensor,
        cotangent: Tensor,
        *,
        group_ids: Tensor,
        advantages: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Accumulate the plasticity stream alone, from a separate forward pass; `cotangent` (n, T) is d loss/d logp."""
        applied = None if self._baseline is None else self._baseline.check(logp, advantages, weight)
        self._pull((0,), logp, (cotangent,), group_ids, applied)

    def accumulate_stability(self, logp: Tensor, cotangent: Tensor, *, group_ids: Tensor) -> None:
        """Accumulate the stability stream alone, such as a loss on replayed or pretraining data, beta included.

        Sequences take the place of responses, and what they were sampled from (a data set, a prompt) that of groups.
        Streams of different forward passes are taken to have independent noise: their covariance is 0.
        """
        self._pull((1,), logp, (cotangent,), group_ids, None)

    @property
    def shift(self) -> float:
        """The baseline b of this step; 0 without one."""
        return 0.0 if self._baseline is None else self._baseline.shift

    def shifted(self, advantages: Tensor, weight: Tensor | None = None) -> Tensor:
        """Advantages (n,) less b times `weight`, of which to make this step's loss; as they are without a baseline.

        The expected gradient stays as it is where the weight times what the loss divides by is the same for all
        responses: 1 (the default) for dr_grpo, and nearly for dapo and bnpo; for grpo the response's length over a
        constant length.

        Args:
            advantages: (n,), after any division by a standard deviation.
            weight: (n,).

        Example:
            >>> import torch, pcr_core
            >>> from pcr_torch import PCR
            >>> _ = torch.manual_seed(0)
            >>> policy = torch.nn.Linear(4, 5)
            >>> method = PCR(policy, blocks="weight", baseline=0.5)
            >>> optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
            >>> ids, mask = torch.arange(32) // 8, torch.ones(32, 1, dtype=torch.bool)
            >>> reference = torch.full((32, 1), -1.6)
            >>> for step in range(2):
            ...     optimizer.zero_grad()
            ...     log_policy = policy(torch.randn(4, 4)[ids]).log_softmax(-1)
            ...     actions = log_policy.exp().multinomial(1)
            ...     logp = log_policy.gather(1, actions)
            ...     applied = method.shifted(pcr_core.group_advantages((actions[:, 0] == 0).float(), ids))
            ...     objective = pcr_core.grpo_objective(
            ...         logp, logp.detach(), reference, applied, mask, beta=0.04, normalization="dr_grpo"
            ...     )
            ...     method.accumulate(logp, objective, group_ids=ids, advantages=applied)
            ...     report = method.resolve()
            ...     optimizer.step()
            >>> report.baseline.reduction is None  # with noise_every=None every tenth step is measured
            True
        """
        return advantages if self._baseline is None else self._baseline.shifted(advantages, weight)
