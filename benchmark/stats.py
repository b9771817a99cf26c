"""What follows from the lines of results/runs.csv: numbers of a run, and statistics over runs. Nothing is read here.

A run is its lines (one per evaluation, in order). Rates are fractions, steps are control steps summed over environments.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import CensoredData, binomtest, ecdf, trim_mean

Lines = list[dict[str, str]]
ONLINE = ("online", "done")  # stages of evaluations from hand-over on
TARGET = 0.8  # success rate of "steps at 80 %"


# ---- one run ----
def by_run(lines: Lines) -> dict[tuple[str, int], Lines]:
    """The lines of each (row, seed)."""
    runs: dict[tuple[str, int], Lines] = {}
    for line in lines:
        runs.setdefault((line["row"], int(line["seed"])), []).append(line)
    return runs


def curve(run: Lines) -> tuple[list[float], list[float]]:
    """Online evaluations: control steps since hand-over, and success rates; empty without an online stage."""
    online = [line for line in run if line["stage"] in ONLINE]
    steps = [float(line["global_step"]) for line in online]
    return [step - steps[0] for step in steps], [float(line["success_once"]) for line in online]


def result(run: Lines) -> dict[str, str]:
    """The evaluation that counts: of the last checkpoint, with the policy that the run selects."""
    return next(line for line in run if line["final"])


def after_sft(run: Lines) -> dict[str, str] | None:
    """The evaluation after supervised fine-tuning; None for a run that has none of its own (bc.py)."""
    return next((line for line in run if line["stage"].startswith("sft")), None)


def elsewhere(run: Lines) -> Lines:
    """Evaluations of the cloned and of the last policy where objects start outside the task's rectangle (CO-RFT)."""
    return [line for line in run if line.get("spawn") == "ood" and not line["final"] and line["select"] == "last"]


def handover(run: Lines) -> float | None:
    """Success when online learning begins."""
    return next(iter(curve(run)[1]), None)


def before_handover(run: Lines) -> float | None:
    """Control steps taken before online learning begins: warm-up's rollouts."""
    return next((float(line["global_step"]) for line in run if line["stage"] in ONLINE), None)


def largest_drop(run: Lines) -> float | None:
    """Success at hand-over minus the lowest online success: 0 if it never fell below; None without online steps."""
    _, rates = curve(run)
    return rates[0] - min(rates) if len(rates) > 1 else None


def steps_at_target(run: Lines) -> tuple[float, bool] | None:
    """Control steps since hand-over at the first evaluation of at least 80 % that the next one confirms, and True.

    (steps, False) if no evaluation did, or only the last one, which nothing confirms: the run was followed for so many
    steps and is censored there. None without online steps. A run that is there at hand-over has 0.
    """
    steps, rates = curve(run)
    if len(steps) < 2:
        return None
    good = np.asarray(rates) >= TARGET - 1e-9
    confirmed = np.flatnonzero(good[:-1] & good[1:])
    return (steps[confirmed[0]], True) if len(confirmed) else (steps[-1], False)


# ---- several runs ----
def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval."""
    interval = binomtest(successes, episodes).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def pooled(evaluations: Lines) -> tuple[float, float, float] | None:
    """Mean success over evaluations (a run each), and Wilson's interval over all their episodes; None if there are none."""
    if not evaluations:
        return None
    rates, counts = (np.array([float(e[name]) for e in evaluations]) for name in ("success_once", "num_episodes"))
    return float(rates.mean()), *wilson(int(np.rint(rates * counts).sum()), int(counts.sum()))


def difference(before: tuple[float, float, float], after: tuple[float, float, float]) -> tuple[float, float, float]:
    """after - before of two rates with Wilson intervals (`pooled`), and Newcombe's 95 % interval of the difference.

    Source: Newcombe, Statistics in Medicine 17, 1998, method 10; the two samples are taken as independent.
    """
    (p, p_low, p_high), (q, q_low, q_high) = before, after
    return q - p, q - p - np.hypot(q - q_low, p_high - p), q - p + np.hypot(q_high - q, p - p_low)


def bootstrap_iqm(scores: list[list[float]], samples: int = 20_000, seed: int = 0) -> tuple[float, float, float]:
    """Interquartile mean over the runs of several tasks, with a 95 % stratified bootstrap interval.

    scores: one list of per-seed scores for each task; runs are drawn with replacement within their task.
    Source: Agarwal et al., arXiv:2108.13264; with the generator seeded, so that the interval is reproducible.
    """
    generator = np.random.default_rng(seed)
    drawn = [np.asarray(task)[generator.integers(len(task), size=(samples, len(task)))] for task in scores]
    low, high = np.quantile(trim_mean(np.concatenate(drawn, 1), 0.25, axis=1), [0.025, 0.975])
    return float(trim_mean(np.concatenate(scores), 0.25)), float(low), float(high)


def survival(times: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier: times at which the share of runs that are not there yet changes, and that share from then on.

    times: (steps, True if reached there, False if censored there) for each run.
    """
    reached, censored = ([t for t, there in times if there is wanted] for wanted in (True, False))
    if not reached:
        return np.array([]), np.array([])
    curve = ecdf(CensoredData(uncensored=reached, right=censored)).sf
    return curve.quantiles, curve.probabilities


def median_time(times: list[tuple[float, bool]]) -> float | None:
    """Median of the Kaplan-Meier curve; None if more than half of the runs are not there where the curve ends."""
    at, share = survival(times)
    found = np.flatnonzero(share <= 0.5 + 1e-12)
    return float(at[found[0]]) if len(found) else None


def restricted_mean(times: list[tuple[float, bool]], horizon: float) -> float:
    """Area under the Kaplan-Meier curve up to `horizon`: mean steps to the target, counted up to there."""
    at, share = survival(times)
    keep = at < horizon
    edges = np.concatenate([[0.0], at[keep], [horizon]])
    return float(np.sum(np.diff(edges) * np.concatenate([[1.0], share[keep]])))
