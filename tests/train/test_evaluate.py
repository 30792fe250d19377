from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pcr_torch.train.answers import respond, text_nll
from pcr_torch.train.engine import TorchEngine
from pcr_torch.train.models import load
from pcr_train.evaluate import RETENTION_TEXT, Exam, bootstrap, exact_binomial
from pcr_train.settings import Settings
from pcr_train.tasks import load_task


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.30850), (10, 10, 0.69150, 1.0), (7, 10, 0.34755, 0.93326), (50, 100, 0.39832, 0.60168)],
)
def test_exact_binomial_interval(right: int, count: int, low: float, high: float):
    interval = exact_binomial(right, count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-5)


def test_bootstrap_interval_surrounds_the_mean_and_shrinks():
    wide, narrow = bootstrap([0.0, 1.0] * 10), bootstrap([0.0, 1.0] * 1000)
    assert wide.low < 0.5 < wide.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 5


def test_greedy_responses_end_at_the_line_and_do_not_depend_on_the_batch(tiny_folder: Path):
    task = load_task("chain_sum", shots=0)
    model, tokenizer = load(str(tiny_folder), task.stop)
    prompts = [p.prompt for p in task.heldout(10)]
    together = respond(model, tokenizer, prompts, max_tokens=6)
    assert together == respond(model, tokenizer, prompts, max_tokens=6, batch=3)
    assert all(text.count("\n") <= 1 and not text.strip().count("\n") for text in together)


def test_evaluation_leaves_mode_and_random_state(tiny_folder: Path, tmp_path: Path):
    task = load_task("chain_sum", shots=0)
    engine = TorchEngine(Settings(model=str(tiny_folder), shots=0), task, tmp_path)
    engine.model.train()
    state = torch.random.get_rng_state()
    exam = Exam(task, task.heldout(8), None, [], samples=2, temperature=1.0, max_tokens=(5, 5), seed=0)
    first, second = (exam.measure(engine, []) for _ in range(2))
    assert engine.model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == second
    assert len(first.reward) == len(first.heldout) == 8


def test_text_nll_is_the_mean_over_tokens(tiny_folder: Path):
    model, tokenizer = load(str(tiny_folder))
    ids = torch.tensor([tokenizer(RETENTION_TEXT)["input_ids"]])
    with torch.no_grad():
        assert text_nll(model, tokenizer, RETENTION_TEXT) == pytest.approx(
            model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
        )
