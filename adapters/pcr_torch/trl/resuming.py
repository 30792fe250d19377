"""GRPO's trainer, with checkpoints from which a run goes on bit for bit (`checkpoints.py`)."""

from __future__ import annotations

import os
from typing import Any

import transformers.trainer

from pcr_torch import checkpoint_files
from pcr_torch.trl import checkpoints
from pcr_torch.trl.carried_state import carry
from pcr_torch.trl.replaced import replaced
from pcr_torch.trl.two_passes import TwoPasses


class Resuming(TwoPasses):
    """Saves and loads what TRL's checkpoints lack, and deletes older ones when the new one is known to be whole."""

    _sampler: Any  # of prompts, in training; None for a stream of them

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        checkpoints.save(self, folder)
        rotate, late = transformers.trainer.rotate_checkpoints, []
        with replaced(transformers.trainer, rotate_checkpoints=lambda *args, **kwargs: late.append((args, kwargs))):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.args.should_save:  # older checkpoints go when this one is known to be whole
            checkpoint_files.finish(folder, lambda: [rotate(*args, **kwargs) for args, kwargs in late])

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs, steps = super()._init_training_state(*args, **kwargs)
        checkpoints.draw_epochs(self._sampler, epochs)
        return epochs, steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore_weights(self, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not os.path.isdir(best):
            raise ValueError(f"load_best_model_at_end: {best}, which holds the best model, is not there any more")
        checkpoint_files.refuse_damaged(best)
        super()._load_best_model()
        checkpoints.restore_weights(self, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resumed = checkpoints.load(self, checkpoint)
            carry(self._resumed, self._bind(self.model_wrapped), self._selection)
