from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from pcr_torch.train.tiny import character_tokenizer
from pcr_train.tasks import load_task, render, shared_words


def test_compact_prompt_is_worked_examples_and_an_open_question():
    task = load_task("chain_sum", shots=2)
    (problem,) = task.heldout(1)
    lines = problem.prompt.split("\n")
    assert len(lines) == 3
    for line in lines[:2]:
        question, answer = line.split(" = ")
        assert eval(question) == int(answer)
    assert lines[2].endswith(" =")
    assert eval(lines[2].removesuffix(" =")) == int(problem.answer)
    assert "State the final answer" not in problem.prompt


def test_full_prompt_keeps_the_question():
    task = load_task("chain_sum", shots=1, style="full")
    (problem,) = task.heldout(1)
    assert problem.prompt.count("Question: State the final answer to the following") == 2
    assert problem.prompt.endswith("=\nAnswer:")


def test_examples_do_not_depend_on_the_seed():
    assert load_task("chain_sum", seed=0).examples == load_task("chain_sum", seed=5).examples


def test_reward_is_the_verifier_on_the_first_line():
    task = load_task("chain_sum")
    (problem,) = task.heldout(1)
    assert task.score(problem, f" {problem.answer}\n1 + 1 = 2") == 1
    assert task.score(problem, f" +{problem.answer}.0") == 1 or problem.answer.startswith("-")  # its own tolerance
    assert task.score(problem, f"\n{problem.answer}") == 0
    assert task.score(problem, " none") == 0
    assert 0 < task.score(problem, f" {problem.answer} or so") < 1


def test_training_and_heldout_questions_are_disjoint_and_heldout_ones_distinct():
    task = load_task("chain_sum", seed=3)
    heldout = task.heldout(64)
    questions = {p.question for p in heldout}
    assert len(questions) == 64
    training = {p.question for p in itertools.islice(task.training(heldout), 2000)}
    assert len(training) > 100
    assert not training & questions
    assert not any(q.removeprefix(task.shared[0]) in task.examples for q in training | questions)


def test_the_seed_decides_the_problems():
    def problems(seed: int) -> list[str]:
        task = load_task("chain_sum", seed=seed)
        return [p.question for p in itertools.islice(task.training(task.heldout(8)), 20)]

    assert problems(1) == problems(1)
    assert problems(1) != problems(2)


def test_user_options_go_on_top_of_the_defaults():
    (problem,) = load_task("chain_sum", {"min_terms": 4, "max_terms": 4}, shots=0).heldout(1)
    assert len(problem.prompt.split()) == 8  # 4 one-digit numbers, 3 signs, "="


@pytest.mark.parametrize("name", ["gcd", "letter_counting", "binary_matrix", "basic_arithmetic"])
def test_reference_answers_are_right(name: str):
    task = load_task(name, shots=2)
    for problem in task.heldout(4):
        assert task.score(problem, f" {problem.answer}{task.stop}more") == 1


def test_answers_of_several_lines_end_at_an_empty_line():
    task = load_task("binary_matrix", shots=1)
    assert (task.style, task.stop) == ("full", "\n\n")
    with pytest.raises(ValueError, match="several lines; use --style full"):
        load_task("binary_matrix", style="compact")


@pytest.mark.parametrize(
    ("questions", "shared"),
    [
        (["Add: 1 + 2 =", "Add: 3 + 4 ="], ("Add: ", "")),
        (["GCD: 4, 6. Only the number.", "GCD: 9, 8. Only the number."], ("GCD: ", ". Only the number.")),
        (["How many r in tea?", "How many s in sea?"], ("", "")),
        (["Same: 1.", "Same: 1."], ("", "")),
    ],
)
def test_words_shared_by_all_questions(questions: list[str], shared: tuple[str, str]):
    assert shared_words(questions) == shared


def test_a_question_without_equals_sign_gets_one():
    assert render("GCD: 4, 6. Only it.", "2", "compact", ("GCD: ", ". Only it.")) == "4, 6 = 2\n"


def test_longest_answer_counts_its_end():
    longest = load_task("chain_sum", shots=0).longest_answer(character_tokenizer())
    assert longest == len(" -9\n") == len(" 18\n")


def test_unknown_task_names_near_ones():
    with pytest.raises(ValueError, match=r"did you mean .*chain_sum"):
        load_task("chainsum")


def test_unknown_option_names_the_valid_ones():
    with pytest.raises(ValueError, match="no option 'terms'; it has min_terms, max_terms"):
        load_task("chain_sum", {"terms": 2})


def test_bad_option_value_says_why():
    with pytest.raises(ValueError, match=r"does not accept .*max_terms=1.*: max_terms must be >= min_terms"):
        load_task("chain_sum", {"max_terms": 1})


def test_more_heldout_problems_than_questions():
    with pytest.raises(ValueError, match="lower --heldout"):
        load_task("chain_sum", shots=0).heldout(201)


def test_all_questions_held_out():
    task = load_task("chain_sum", shots=0)
    with pytest.raises(ValueError, match="all its questions are held out"):
        next(task.training(task.heldout(200)))


def test_tasks_without_reference_answers_need_no_shots():
    with pytest.raises(ValueError, match="use --shots 0"):
        load_task("graph_color", shots=2)


def test_missing_pycosat_only_breaks_the_puzzle_that_needs_it():
    code = (
        "import sys; sys.modules['pycosat'] = None\n"
        "from pcr_train.tasks import load_task\n"
        "print(load_task('chain_sum', shots=0).heldout(1)[0].question)\n"
        "load_task('zebra_puzzles', shots=0).heldout(1)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "arithmetic problem" in result.stdout, result.stderr
    assert "pip install pycosat" in result.stderr
