"""Experiments on learning: does a rule help, when, and by how much?

    python -m benchmarks.learning list
    python -m benchmarks.learning run NAME              selection, frozen choices, confirmation; a killed run goes on
    python -m benchmarks.learning report [NAME]         tables, plots and claims from the recorded rows

An experiment is one file in `experiments/` that defines `EXPERIMENT`, an `experiment.Experiment`. It goes through three
stages, in this order only:

1. Selection runs its jobs on the selection seeds and appends a line per job to `results/NAME/selection.jsonl`.
2. `choose` makes the choices (learning rates, beta, which candidate) from those rows alone. They are written to
   `results/NAME/frozen.json` beside the hash of the rows. From then on selection does not run again.
3. Confirmation runs on the confirmation seeds with the frozen choices, into `results/NAME/confirmation.jsonl`. It does
   not start without the frozen file, nor if the file is not what `choose` makes of the rows.

`report` never runs anything: what it prints comes from the recorded lines.

To write an experiment:

    from benchmarks.learning.experiment import Choices, Experiment, Job, Results, Row
    from benchmarks.learning.paired import paired_interval
    from benchmarks.learning.parts import Claim, Plot, Report, Table

    def jobs(seeds: tuple[int, ...], choices: Choices | None) -> list[Job]:
        '''Those of selection where choices is None, else of confirmation.'''
        return [Job({"rule": rule, "seed": seed}, partial(train, rule, seed)) for rule in RULES for seed in seeds]

    def choose(rows: Sequence[Row]) -> Choices: ...      # JSON-able
    def report(results: Results) -> Report: ...          # claims are tested together (Holm)

    EXPERIMENT = Experiment("name", question=..., protocol=..., selection_seeds=..., confirmation_seeds=...,
                            jobs=jobs, choose=choose, report=report)

A job's settings (a flat JSON record) are its identity: a job whose settings are on record is not run again. Its
function takes a folder for partial work of its own (kept if the run is killed, removed when the job is done), and
returns a JSON record of numbers and lists. `report` must do with an unfinished record, as `Results` says.
"""
