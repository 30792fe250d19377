"""The command pcr-train."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

# two cores shared with other programs: threads that spin while they wait cost more than they save
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    raise SystemExit(
        f"pcr-train needs typer and rich ({missing}); install with: pip install 'pcr-grpo[demo]'"
    ) from None

from pcr_core import RULES
from pcr_train import plot_command, report, tasks
from pcr_train.engine import load_engine
from pcr_train.help import HELP
from pcr_train.run import Interrupted, train
from pcr_train.settings import FRAMEWORKS, PRECISIONS, PRESETS, Settings, make_settings, parse_options

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("plot", help=plot_command.HELP)(plot_command.plot)


@app.callback(help=HELP, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def run(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="smollm2, tiny, a local folder, or a hub id. [smollm2]")] = None,
    framework: Annotated[
        str | None, typer.Option(help=f"{' or '.join(FRAMEWORKS)}; JAX trains the model tiny. [torch]")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A reasoning-gym data set; see --list-tasks. [chain_sum]")] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(help="An option of the data set as name=value; may be repeated.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples in every prompt. [4; smollm2 1; tiny 0]")] = None,
    style: Annotated[
        str | None, typer.Option(help="Prompts: compact (shared words dropped), full, or auto. [auto]")
    ] = None,
    rule: Annotated[str | None, typer.Option(help=f"{', '.join(RULES)}, or your own as module:name. [pcr]")] = None,
    alpha: Annotated[
        str | None,
        typer.Option(help="How much of the conflict to remove: 0 to 1, variance (the paper's), or snr. [0.5]"),
    ] = None,
    max_boost: Annotated[float | None, typer.Option(help="Cap on the extra KL weight of a block. [10]")] = None,
    prior: Annotated[
        str | None, typer.Option(help="Prior of both gradients: flat, shrinkage, temporal. [flat]")
    ] = None,
    discount: Annotated[float | None, typer.Option(help="Forgetting of the temporal prior. [0.9]")] = None,
    update: Annotated[str | None, typer.Option(help="anchored (adds the KL gradient) or literal. [anchored]")] = None,
    gate: Annotated[str | None, typer.Option(help="sign or probability of a conflict. [sign]")] = None,
    conflict: Annotated[str | None, typer.Option(help="raw, or debiased of the shared noise. [raw]")] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Parameters under the rule: mlp, all, or a regular expression; list prints them. [mlp]"),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="One block per tensor, module, layer, or global. [tensor]")
    ] = None,
    norms: Annotated[
        str | None, typer.Option(help="How noise is measured: auto, fast, or loop (one pass a response). [auto]")
    ] = None,
    noise_every: Annotated[
        int | None,
        typer.Option(help="Measure the gradients' noise in every K-th step; 0: never. [10; 1 for rules that need it]"),
    ] = None,
    baseline: Annotated[
        float | None,
        typer.Option(
            help="Share, such as 0.5, of the shift of advantages that measured gradient norms call for. [off]"
        ),
    ] = None,
    router_loss: Annotated[
        float | None, typer.Option(help="Coefficient of a mixture of experts' load-balancing loss. [0]")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="KL coefficient, > 0. [0.04]")] = None,
    kl: Annotated[
        str | None,
        typer.Option(help="Estimator of the KL divergence: k3, or k3_ratio. [torch k3_ratio, as TRL; jax k3]"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Of Adam, constant. [4e-6; tiny 3e-4]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all. [12]")] = None,
    prompts: Annotated[int | None, typer.Option(help="Problems a step. [4; tiny 8]")] = None,
    generations: Annotated[int | None, typer.Option(help="Responses to each problem. [8]")] = None,
    micro_prompts: Annotated[
        int | None, typer.Option(help="Problems a forward pass; less needs less memory. [all of a step]")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help=f"{' or '.join(PRECISIONS)} matrix products; weights and statistics are float32. [float32]"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest response, in tokens. [what the answers need]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampled responses. [1]")] = None,
    heldout: Annotated[int | None, typer.Option(help="Held-out problems, measured before and after. [64]")] = None,
    samples: Annotated[int | None, typer.Option(help="Sampled responses to each of them. [2]")] = None,
    retention_task: Annotated[
        str | None, typer.Option(help="Second data set, to see what is forgotten; none for none. [products]")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; the last is saved. [50]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of problems, sampling and the tiny model. [0]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results. [runs/MODEL-TASK-RULE-sSEED]")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder, with its settings; --steps may be raised.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [all cores; tiny 1]")] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard files too; needs pcr-grpo[tensorboard].")
    ] = False,
    list_tasks: Annotated[bool, typer.Option("--list-tasks", help="Print the names of all tasks and stop.")] = False,
) -> None:
    if context.invoked_subcommand is not None:
        given_here = [name for name, value in context.params.items() if value not in (None, False, [], ())]
        if given_here:
            raise ValueError(f"--{given_here[0].replace('_', '-')} is an option of training; leave it out")
        return
    given = {
        "framework": framework,
        "task": task,
        "shots": shots,
        "style": style,
        "rule": rule,
        "alpha": alpha,
        "max_boost": max_boost,
        "prior": prior,
        "discount": discount,
        "update": update,
        "gate": gate,
        "conflict": conflict,
        "blocks": blocks,
        "granularity": granularity,
        "norms": norms,
        "noise_every": noise_every,
        "baseline": baseline,
        "router_loss": router_loss,
        "beta": beta,
        "kl": kl,
        "learning_rate": learning_rate,
        "steps": steps,
        "prompts": prompts,
        "generations": generations,
        "micro_prompts": micro_prompts,
        "precision": precision,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "heldout": heldout,
        "samples": samples,
        "retention_task": retention_task,
        "save_every": save_every,
        "seed": seed,
        "task_options": parse_options(task_option) if task_option else None,
    }
    console = Console()
    warnings.filterwarnings("ignore", category=FutureWarning)  # leaves the terminal to the progress bar
    if list_tasks:
        console.print("\n".join(tasks.task_names()), highlight=False)
        return
    if resume is not None and out is not None:
        raise ValueError("--resume and --out: a resumed run stays in its folder; give only one of them")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    if model and model not in PRESETS and Path(model).is_dir():
        model = str(Path(model).absolute())  # a run is resumed from any folder
    if resume is None:
        settings = make_settings("smollm2" if model is None else model, **given)
    else:
        settings = _resumed(resume, model, given)
    if settings.blocks == "list":
        kind = load_engine(settings.framework)
        kind.check(settings)
        console.print(kind.blocks_table(settings), highlight=False, soft_wrap=True)
        return
    folder = resume or out or Path("runs") / _name(settings)
    _go(settings, folder, resume is not None, tensorboard, threads, console)


def _resumed(folder: Path, model: str | None, given: dict[str, Any]) -> Settings:
    """The run's own settings, overlaid with what was given now; `run.train` judges the differences."""
    file = folder / "settings.json"
    if not file.exists():
        raise ValueError(f"--resume: {folder} holds no settings.json, so no run of pcr-train was started there")
    saved = Settings.load(file)
    changed = {name: value for name, value in {"model": model, **given}.items() if value is not None}
    return Settings(**{**saved.__dict__, **changed})


def _go(
    settings: Settings, folder: Path, resume: bool, tensorboard: bool, threads: int | None, console: Console
) -> None:
    load_engine(settings.framework).configure(settings, threads)
    again = f"pcr-train --resume {folder}"
    try:
        outcome = train(settings, folder, resume=resume, console=console, tensorboard=tensorboard)
    except Interrupted as stopped:
        console.print(f"Stopped after step {stopped.step}; saved. Continue with:\n  {again}", highlight=False)
        raise typer.Exit(130) from None
    Console(width=max(console.width, 100)).print(report.table(outcome, settings))  # 80 columns would cut the numbers
    console.print(outcome.meter.sentence, highlight=False)
    console.print(f"{outcome.seconds:.0f} s in all; peak memory {report.peak_memory():.1f} GB", highlight=False)
    for label, path in (("plot", outcome.plot), ("metrics", outcome.metrics), ("model", outcome.model)):
        console.print(f"{label:8}{path}", highlight=False, soft_wrap=True)
    console.print(f"{'go on':8}{again} --steps {settings.steps * 2}", highlight=False, soft_wrap=True)


def _name(settings: Settings) -> str:
    model = Path(settings.model.rstrip("/")).name or "model"
    framework = "" if settings.framework == "torch" else f"-{settings.framework}"
    rule = settings.rule.rpartition(":")[2]
    return f"{model}-{settings.task}-{rule}{framework}-s{settings.seed}"


def _by_option(message: str) -> str:
    """What a library says of one of its arguments, under the name of the option that gave it."""
    name, sign, rest = message.partition(":")
    return f"--{name.replace('_', '-')}:{rest}" if sign and name in Settings.__dataclass_fields__ else message


def main() -> None:
    """Entry point: errors that a user can mend are one line, without a traceback."""
    try:
        code = app(prog_name="pcr-train", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        print("\npcr-train: stopped; nothing was saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("PCR_TRACEBACK"):
            raise
        print(f"pcr-train: {_by_option(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        print("pcr-train: the model's probabilities are not finite any more, training has diverged: lower "
              "--learning-rate; the steps so far are in metrics.jsonl", file=sys.stderr)  # fmt: skip
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            sys.exit(getattr(error, "exit_code", 2))
        raise


if __name__ == "__main__":
    main()
