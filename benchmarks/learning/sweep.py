"""How every rule is tuned alike: choices of learning rate and beta from mean scores on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Both in increasing order, evenly spaced in the logarithm or nearly so."""

    learning_rates: tuple[float, ...]
    betas: tuple[float, ...]

    def cells(self) -> list[tuple[float, float]]:
        """All pairs, beta running fastest."""
        return list(product(self.learning_rates, self.betas))

    def table(self, values: Sequence[float]) -> Scores:
        """(learning rates, betas) from values in the order of `cells`."""
        return np.asarray(values, dtype=float).reshape(len(self.learning_rates), len(self.betas))


def best_pair(grid: Grid, scores: Scores) -> tuple[float, float]:
    """The top of a parabola in log learning rate and log beta through the 3 x 3 cells about the best cell.

    The grid is coarse beside the differences between rules: off it, each rule gets its own best to second order. Where
    the nine cells are not all there or have no maximum inside, the same along the best beta only.

    Example:
        >>> grid = Grid((1e-3, 1e-2, 1e-1), (1e-3, 1e-2, 1e-1))
        >>> x, y = np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij")
        >>> best_pair(grid, -((x - 0.5) ** 2) - y**2)  # half a step above 1e-2
        (0.0316, 0.01)
    """
    i, j = (int(k) for k in np.unravel_index(np.argmax(scores), scores.shape))
    best = grid.learning_rates[i], grid.betas[j]
    rows, columns = slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2)
    x = np.log(np.asarray(grid.learning_rates[rows]) / best[0])
    y = np.log(np.asarray(grid.betas[columns]) / best[1])
    if x.size < 3:
        return best
    if y.size == 3:
        xx, yy = (m.ravel() for m in np.meshgrid(x, y, indexing="ij"))
        design = np.stack([np.ones_like(xx), xx, yy, xx**2, xx * yy, yy**2], axis=1)
        _, gx, gy, hxx, hxy, hyy = np.linalg.lstsq(design, scores[rows, columns].ravel(), rcond=None)[0]
        hessian = np.asarray([[2 * hxx, hxy], [hxy, 2 * hyy]])
        if np.linalg.eigvalsh(hessian).max() < -1e-9:
            dx, dy = np.linalg.solve(hessian, [-gx, -gy])
            if x[0] <= dx <= x[-1] and y[0] <= dy <= y[-1]:
                return _short(best[0] * float(np.exp(dx))), _short(best[1] * float(np.exp(dy)))
    curvature, slope, _ = np.polyfit(x, scores[rows, j], 2)
    if curvature >= 0:
        return best
    return _short(best[0] * float(np.exp(np.clip(-slope / (2 * curvature), x[0], x[-1])))), best[1]


def best_beta_over_rates(grid: Grid, scores: Scores, rates: Sequence[float]) -> float:
    """The beta with the highest mean score over these learning rates of the grid."""
    rows = [grid.learning_rates.index(rate) for rate in rates]
    return grid.betas[int(np.argmax(scores[rows].mean(axis=0)))]


def matched_beta(grid: Grid, retention: Scores, rate: float, wanted: float) -> float:
    """The beta at which a rule's retention, at this learning rate of the grid, is the wanted one (log-linear between).

    Where all betas retain more or all retain less, the one at that end.
    """
    row = retention[grid.learning_rates.index(rate)]
    logs = np.log(grid.betas)
    for k in range(row.size - 1):
        if row[k] <= wanted <= row[k + 1]:
            share = (wanted - row[k]) / max(row[k + 1] - row[k], 1e-12)
            return _short(float(np.exp(logs[k] + share * (logs[k + 1] - logs[k]))))
    return grid.betas[int(np.argmin(np.abs(row - wanted)))]


def nearest(values: Sequence[float], wanted: float) -> float:
    """On a logarithmic scale."""
    return min(values, key=lambda value: abs(np.log(value / wanted)))


def front_height(target: Scores, general: Scores, low: Scores, high: Scores, floor: float) -> Scores:
    """Mean target accuracy along each instance's front, over general accuracies from `low` to `high`.

    The front is the upper envelope of the points, straight between them; beyond a method's most retentive point it is
    `floor`, since the method did not get there.

    Args:
        target, general: (points, instances).
        low, high: (instances,).

    Example:
        >>> one = np.asarray
        >>> round(float(front_height(one([[0.5], [1.0]]), one([[1.0], [0.5]]), one([0.5]), one([1.0]), 0.0)[0]), 6)
        0.75
    """
    out = np.empty(low.shape)
    for k, (t, g) in enumerate(zip(target.T, general.T)):
        order = np.argsort(g)
        envelope = np.maximum.accumulate(t[order][::-1])[::-1]
        out[k] = np.interp(np.linspace(low[k], high[k], 101), g[order], envelope, right=floor).mean()
    return out


def _short(value: float) -> float:
    return float(f"{value:.3g}")
