"""Choices are frozen between selection and confirmation, and the code sees to the order.

`frozen.json` holds what `choose` made of selection's rows, and the hash of those rows. While it is there selection does
not run; without it, or when it is not what `choose` makes of the rows, confirmation does not run.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.learning.experiment import Choices, Experiment
from benchmarks.learning.record import digest, read_environments, read_rows


class OutOfOrder(RuntimeError):
    """A stage was asked for that must not run now; the message says why and what to do."""


def frozen_path(folder: Path) -> Path:
    return folder / "frozen.json"


def check_selection_may_run(experiment: Experiment, folder: Path) -> None:
    """Raises OutOfOrder once choices are frozen, or confirmation's seeds have been looked at."""
    if (folder / "confirmation.jsonl").exists():
        raise OutOfOrder(
            f"{experiment.name}: confirmation.jsonl exists, so the confirmation seeds have been looked at. To select "
            "anew, give the experiment new confirmation seeds and remove its results"
        )
    if frozen_path(folder).exists():
        raise OutOfOrder(f"{experiment.name}: the choices are frozen; delete frozen.json to select anew")


def freeze(experiment: Experiment, folder: Path) -> Choices:
    """Writes frozen.json from a finished selection.

    Raises:
        OutOfOrder: jobs of selection are missing, or choices are frozen already.
    """
    check_selection_may_run(experiment, folder)
    rows = read_rows(folder / "selection.jsonl")
    if missing := {job.key for job in experiment.jobs(experiment.selection_seeds, None)} - {row.key for row in rows}:
        raise OutOfOrder(f"{experiment.name}: {len(missing)} jobs of selection are missing, such as {min(missing)}")
    frozen_path(folder).write_text(json.dumps(_contents(experiment, folder), indent=1) + "\n", encoding="utf-8")
    return read_frozen(experiment, folder)


def read_frozen(experiment: Experiment, folder: Path) -> Choices:
    """The frozen choices.

    Raises:
        OutOfOrder: there are none; or the rows, the seeds or the choices are not those that were frozen.
    """
    path = frozen_path(folder)
    if not path.exists():
        raise OutOfOrder(f"{experiment.name}: no choices are frozen; run selection first")
    stored = json.loads(path.read_text(encoding="utf-8"))
    for field, now in json.loads(json.dumps(_contents(experiment, folder))).items():
        if stored.get(field) != now:
            raise OutOfOrder(
                f"{experiment.name}: {field} in frozen.json is not what selection's rows and the code give"
            )
    choices: Choices = stored["choices"]
    return choices


def check_confirmation_may_go_on(experiment: Experiment, folder: Path) -> None:
    """Raises OutOfOrder where earlier lines of confirmation.jsonl were run with other choices."""
    now = digest(frozen_path(folder))
    for environment in read_environments(folder / "confirmation.jsonl"):
        if environment.get("frozen") != now:
            raise OutOfOrder(f"{experiment.name}: confirmation.jsonl was begun with other frozen choices")


def _contents(experiment: Experiment, folder: Path) -> dict[str, object]:
    path = folder / "selection.jsonl"
    return {
        "experiment": experiment.name,
        "selection_sha256": digest(path) if path.exists() else None,
        "selection_seeds": list(experiment.selection_seeds),
        "confirmation_seeds": list(experiment.confirmation_seeds),
        "choices": experiment.choose(read_rows(path)),
    }
