"""What `pcr-train --help` says above its options."""

from __future__ import annotations

HELP = """
Train a language model with GRPO and a conflict rule on a verifiable task.

Every step samples responses, scores them with the task's verifier, and combines the reward gradient and the KL gradient
block by block with the chosen rule. At the end the model is compared with its starting point on held-out problems, on
problems it solved before, and on a fixed text, and one sentence says how much of the conflict was sampling noise.

\b
Examples:
  pcr-train
      SmolLM2-135M on one-digit sums: the demo, a few minutes on 2 cores
  pcr-train --model tiny
      the same in seconds, with a model made on the spot
  pcr-train --model tiny --rule grpo --seed 1
      plain GRPO, for comparison: it measures the conflict and changes nothing
  pcr-train --framework jax --model tiny
      the same method in JAX, one compiled program a step
  pcr-train --task gcd --task-option max_value=20 --steps 50
      any reasoning-gym data set, with its options
  pcr-train --model Qwen/Qwen2.5-0.5B --alpha snr --beta 0.02
      a model from the hub, another alpha
  pcr-train --resume runs/smollm2-chain_sum-pcr-s0 --steps 24
      go on, bit for bit, from the last checkpoint

\b
Results in the run's folder:
  plot.png        reward, KL, gradient norms, conflict by layer, alpha
  metrics.jsonl   one JSON object a step, with every block's numbers
  tensorboard     the steps' numbers as curves, with --tensorboard
  checkpoint-N    the model, and all that --resume needs

`pcr-train plot RUN...` draws the plot again, or several runs in one picture.

Ctrl-C finishes the current step, saves, and prints how to resume; a second one stops at once.

\b
What --resume may say; a refusal is one line and exit code 2:
  was not written to its end
      killed while it saved: kept as unfinished-checkpoint-N; the run goes on
      from the one before, or begins at its first step if there is none
  is damaged, is missing
      a file is not what was written: kept as damaged-checkpoint-N; the run
      goes on from the one before, or stops where none is whole
  reference model
      the model that the KL divergence is measured to was changed since
  weights are not those
      the model does not take up what was saved
  another run is going on
      two runs would write one folder; a run that was killed frees it
  differs from the run
      only --steps and --save-every may change
"""
