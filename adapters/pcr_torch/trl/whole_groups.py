"""GRPO's trainer, with every response's group known and groups kept whole: the noise is measured within them."""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.grpo_trainer as stock
from trl import GRPOTrainer

from pcr_torch.trl.groups import Text, owners, shuffle_groups, texts, texts_of
from pcr_torch.trl.replaced import replaced

GROUP_IDS, TEXTS = "pcr_group_ids", "pcr_texts"


class WholeGroups(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` whose micro-batches hold whole groups, and carry which group each row is of."""

    _generated: list[Text]

    def _generate(self, prompts: Any) -> Any:
        output = super()._generate(prompts)
        self._generated = texts(output[0], output[1], self._tokenizer.pad_token_id)
        return output

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._generated = []
        output = super()._generate_and_score_completions(inputs)
        count = self.num_generations if self.model.training else self.num_generations_eval
        n = len(self._generated)
        first = self.accelerator.process_index * n  # a process holds a slice, which may begin within a group
        ids = [row // count for row in range(first, first + n)]
        return self._with_groups(output, self._generated, ids)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but for the shuffle before the split into micro-batches: whole groups in place of responses."""

        def shuffle(batch: dict[str, Any]) -> dict[str, Any]:
            batch = self._with_groups(batch, *carried_groups(batch))
            return shuffle_groups(batch, batch[GROUP_IDS])

        with replaced(stock, shuffle_sequence_dict=shuffle):
            return super()._prepare_inputs(generation_batch)

    def _with_groups(self, batch: dict[str, Any], known: list[Text], ids: list[int]) -> dict[str, Any]:
        """The batch with each row's group and texts, where `known` texts are of the groups `ids`."""
        rows = self._texts_of(batch)
        device = batch["completion_ids"].device
        groups = owners(rows, known, ids, by_prompt=batch.get("pixel_values") is None)
        return {**batch, GROUP_IDS: torch.tensor(groups, device=device), TEXTS: torch.tensor(rows, device=device)}

    def _texts_of(self, rows: dict[str, Any]) -> list[Text]:
        return texts_of(rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], self._tokenizer.pad_token_id)


def carried_groups(batch: dict[str, Any]) -> tuple[list[Text], list[int]]:
    """Texts and groups that came with a batch; none where they do not belong together."""
    known, ids = batch.get(TEXTS), batch.get(GROUP_IDS)
    if known is None or ids is None or len(known) != len(ids):
        return [], []
    return [(prompt, response) for prompt, response in known.tolist()], ids.tolist()
