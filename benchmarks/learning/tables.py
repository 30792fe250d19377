"""Tables and plots of a suite on the bandit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.learning.experiment import Results
from benchmarks.learning.paired import paired_interval
from benchmarks.learning.parts import Plot, Table
from benchmarks.learning.suite import Measures, Suite, diagnostics, measures, settings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = Mapping[str, Mapping[str, Measures]]


def measure_all(suite: Suite, results: Results) -> Measured:
    """By regime and method; regimes whose confirmation is unfinished are left out."""
    instances = {regime: _instances(results, regime) for regime in suite.places}
    whole = max(instances.values(), default=0)
    return {
        regime: {method: measures(suite, results.confirmation, regime, method) for method in suite.methods}
        for regime in suite.places
        if whole and instances[regime] == whole
    }


def difference_table(
    suite: Suite, measured: Measured, measure: str, title: str, note: str, against: str | None = None
) -> Table:
    """Methods in rows, regimes in columns; paired differences to the baseline (or `against`), in units of 0.01."""
    base = against or suite.baseline
    rows = [[f"{base}, itself", *(f"{100 * getattr(of[base], measure).mean():.2f}" for of in measured.values())]]
    for method in suite.methods:
        if method == base:
            continue
        cells = []
        for of in measured.values():
            found = paired_interval(100 * getattr(of[method], measure), 100 * getattr(of[base], measure))
            cells.append(f"**{found:+.2f}**" if found.p < 0.05 else f"{found:+.2f}")
        rows.append([method, *cells])
    return Table(title, ["", *measured], rows, note)


def level_table(suite: Suite, measured: Measured, measure: str, title: str, note: str) -> Table:
    """Means of a measure, in units of 0.01."""
    rows = [
        [method, *(f"{100 * getattr(of[method], measure).mean():.2f}" for of in measured.values())]
        for method in suite.methods
    ]
    return Table(title, ["", *measured], rows, note)


def settings_table(suite: Suite, results: Results) -> Table:
    """Frozen best learning rate and beta."""
    choices = results.choices or {}
    rows = [
        [method, *("{:.3g}, {:.3g}".format(*settings_of(choices, regime, method).best) for regime in suite.places)]
        for method in suite.methods
    ]
    return Table("Learning rate, beta: each method's own best on selection seeds", ["", *suite.places], rows)


def diagnostic_table(suite: Suite, results: Results, measured: Measured, methods: Sequence[str], title: str) -> Table:
    """What the rules saw and did, at their own best settings."""
    columns = ("median of b - 1", "b - 1 >= 10", "conflict", "v_ps/c, first third", "v_ps/c, last third", "v_p/v_s")
    rows = []
    for regime in measured:
        for method in methods:
            found = diagnostics(suite, results.confirmation, regime, method)
            rows.append([regime, method, *(f"{value:.3g}" for value in found.values())])
    return Table(title, ["regime", "method", *columns], rows, "Means over instances of each run's figure.")


def front_plot(suite: Suite, measured: Measured, methods: Sequence[str], name: str) -> Plot:
    """Target against general accuracy over beta."""
    caption = "Target against general accuracy over beta, each method at its own best learning rate (means)."
    return Plot(name, caption, partial(_draw, suite, measured, methods, True), (11.0, 6.4))


def rates_plot(suite: Suite, measured: Measured, methods: Sequence[str], name: str) -> Plot:
    """Score against learning rate, less the baseline's."""
    caption = (
        f"Score less {suite.baseline}'s, against learning rate, each method with its best beta over these rates "
        "(means, units of 0.01; differences beyond 5 are cut off)."
    )
    return Plot(name, caption, partial(_draw, suite, measured, methods, False), (11.0, 6.4))


def _draw(suite: Suite, measured: Measured, methods: Sequence[str], front: bool, figure: Figure) -> None:
    columns = 3
    axes = np.atleast_1d(figure.subplots(-(-len(measured) // columns), columns)).ravel()
    for ax in axes[len(measured) :]:
        ax.set_axis_off()
    for ax, (regime, of) in zip(axes, measured.items(), strict=False):
        for i, method in enumerate(methods):
            found = of[method]
            style = {"marker": "o", "markersize": 3, "linewidth": 1, "linestyle": "-" if i < 10 else "--"}
            if front:
                ax.plot(found.front[1], found.front[0], label=method, **style)
            else:
                difference = 100 * (found.over_rates - of[suite.baseline].over_rates)
                ax.plot(suite.places[regime].rates, difference, label=method, **style)
        ax.set_title(regime, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.set_xlabel("general accuracy" if front else "learning rate", fontsize=8)
        ax.set_ylabel("target accuracy" if front else "difference of scores", fontsize=8)
        if not front:
            ax.set_xscale("log")
            ax.set_ylim(max(ax.get_ylim()[0], -5), min(ax.get_ylim()[1], 5))
            ax.set_xticks(suite.places[regime].rates, [f"{rate:g}" for rate in suite.places[regime].rates])
            ax.minorticks_off()
    axes[0].legend(fontsize=6)


def _instances(results: Results, regime: str) -> int:
    return sum(row.settings["seeds"] for row in results.confirmation if row.settings["regime"] == regime)
