"""What follows from the lines of results/runs.csv: numbers of a run, and statistics over runs. Nothing is read here.

A run is its lines (one per evaluation, in order). Rates are fractions, steps are control steps summed over environments.
"""

import numpy as np
from scipy.stats import CensoredData, binomtest, ecdf, sem, trim_mean
from scipy.stats import t as student

from plumbing.errors import UserError

Lines = list[dict]
Runs = dict[tuple[str, int], Lines]  # by row and seed
Measured = tuple[float, float, float]  # a value, and the ends of its 95 % interval
NUMBERS = (  # columns of runs.csv: None where nothing stands
    "final", "global_step", "num_episodes", "success_once", "success_at_end", "episode_len", "seconds", "demo_steps_to_success",
)  # fmt: skip
ONLINE = ("online", "done")  # stages of evaluations from hand-over on
TARGET = 0.8  # success rate of "steps at 80 %"


def typed(lines: Lines, source: str = "") -> Lines:
    """Lines of a CSV with numbers in the place of their texts. Raises: UserError naming `source` and the line."""
    made = []
    for number, line in enumerate(lines, 2):
        try:
            numbers = {name: float(line[name]) if line[name] else None for name in NUMBERS}
            made.append(line | numbers | {"seed": int(line["seed"])})
        except ValueError as error:
            raise UserError(f"{source}, line {number}, is torn or another file's: {error}") from error
    return made


def by_run(lines: Lines) -> Runs:
    runs: Runs = {}
    for line in lines:
        runs.setdefault((line["row"], int(line["seed"])), []).append(line)
    return runs


def curve(run: Lines) -> tuple[np.ndarray, np.ndarray]:
    """Online evaluations: control steps since hand-over, and success rates; empty without an online stage."""
    online = [line for line in run if line["stage"] in ONLINE]
    steps = np.array([line["global_step"] for line in online])
    rates = np.array([line["success_once"] for line in online])
    return steps - steps[:1].sum(), rates


def result(run: Lines) -> dict:
    """The evaluation that counts: of the last checkpoint."""
    return next(line for line in run if line["final"])


def after_sft(run: Lines) -> dict | None:
    """The evaluation after supervised fine-tuning; None for a run that has none of its own (bc.py)."""
    return next((line for line in run if line["stage"].startswith("sft")), None)


def first_elsewhere(run: Lines) -> dict | None:
    """The evaluation of the cloned policy where objects start outside the task's rectangle (CO-RFT)."""
    return next((line for line in run if line["spawn"] == "ood"), None)


def last_elsewhere(run: Lines) -> dict | None:
    return next((line for line in reversed(run) if line["spawn"] == "ood" and line["select"] in ("", "last")), None)


def handover(run: Lines) -> float | None:
    """Success when online learning begins."""
    rates = curve(run)[1]
    return float(rates[0]) if len(rates) else None


def before_handover(run: Lines) -> float | None:
    """Control steps taken before online learning begins: warm-up's rollouts."""
    return next((line["global_step"] for line in run if line["stage"] in ONLINE), None)


def largest_drop(run: Lines) -> float | None:
    """Success at hand-over minus the lowest online success: 0 if it never fell below; None without online steps."""
    rates = curve(run)[1]
    return float(rates[0] - rates.min()) if len(rates) > 1 else None


def steps_at_target(run: Lines) -> tuple[float, bool] | None:
    """Control steps since hand-over at the first evaluation of at least 80 % that the next one confirms, and True.

    (steps, False) if there is none: the run was followed for so many steps. None without online steps.
    """
    steps, rates = curve(run)
    if len(steps) < 2:
        return None
    good = rates >= TARGET - 1e-9
    confirmed = steps[:-1][good[:-1] & good[1:]]
    return (confirmed[0], True) if len(confirmed) else (steps[-1], False)


def pooled(evaluations: Lines) -> Measured | None:
    """Mean success over evaluations (a run each), and Wilson's interval over all their episodes; None if there are none."""
    if not evaluations:
        return None
    rates = np.array([line["success_once"] for line in evaluations])
    counts = np.array([line["num_episodes"] for line in evaluations])
    successes = np.rint(rates * counts).sum()
    interval = binomtest(int(successes), int(counts.sum())).proportion_ci(method="wilson")
    return float(rates.mean()), float(interval.low), float(interval.high)


def difference(before: Measured, after: Measured) -> Measured:
    """after - before of two rates with Wilson intervals, and Newcombe's 95 % interval of the difference.

    Source: Newcombe, Statistics in Medicine 17, 1998, method 10; the two samples are taken as independent.
    """
    p, p_low, p_high = before
    q, q_low, q_high = after
    down = np.hypot(q - q_low, p_high - p)
    up = np.hypot(q_high - q, p - p_low)
    return q - p, q - p - down, q - p + up


def paired_difference(pairs: list[tuple[Lines, Lines]], samples: int = 20_000, seed: int = 0) -> Measured:
    """after - before of success, mean over the pairs (before, after) of a seed each, with a 95 % bootstrap interval.

    Pairs are drawn with replacement, and the successes of each of their runs anew, from its own rate. With five pairs
    such an interval is too narrow: it takes what is seen of the seeds for all there is.
    """
    generator = np.random.default_rng(seed)
    rates = np.array([[result(run)["success_once"] for run in pair] for pair in pairs])
    counts = np.array([[result(run)["num_episodes"] for run in pair] for pair in pairs], int)
    picks = generator.integers(len(pairs), size=(samples, len(pairs)))
    drawn = generator.binomial(counts[picks], rates[picks]) / counts[picks]
    means = (drawn[..., 1] - drawn[..., 0]).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float((rates[:, 1] - rates[:, 0]).mean()), float(low), float(high)


def paired_ratio(pairs: list[tuple[float, float]]) -> Measured:
    """after / before of a positive number of a run: geometric mean over at least two pairs, with Student's 95 % interval."""
    logs = np.diff(np.log(pairs))[:, 0]
    reach = student.ppf(0.975, len(logs) - 1) * sem(logs)
    value, low, high = np.exp(logs.mean() + np.array([0.0, -reach, reach]))
    return float(value), float(low), float(high)


def bootstrap_iqm(scores: list[list[float]], samples: int = 20_000, seed: int = 0) -> Measured:
    """Interquartile mean over the runs of several tasks, with a 95 % stratified bootstrap interval.

    scores: one list of per-seed scores for each task; runs are drawn with replacement within their task.
    Source: Agarwal et al., arXiv:2108.13264; with the generator seeded, so that the interval is reproducible.
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for task in scores:
        picks = generator.integers(len(task), size=(samples, len(task)))
        drawn.append(np.array(task)[picks])
    means = trim_mean(np.concatenate(drawn, 1), 0.25, axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(trim_mean(np.concatenate(scores), 0.25)), float(low), float(high)


def survival(times: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier: times at which the share of runs that are not there yet changes, and that share from then on.

    times: (steps, True if reached there, False if censored there) for each run.
    """
    if not any(there for _, there in times):
        return np.array([]), np.array([])
    steps, there = np.array(times).T
    found = ecdf(CensoredData(uncensored=steps[there > 0], right=steps[there == 0])).sf
    return found.quantiles, found.probabilities


def median_time(times: list[tuple[float, bool]]) -> float | None:
    """Median of the Kaplan-Meier curve; None if more than half of the runs are not there where the curve ends."""
    at, share = survival(times)
    return next((float(steps) for steps in at[share <= 0.5 + 1e-12]), None)


def restricted_mean(times: list[tuple[float, bool]], horizon: float) -> float:
    """Area under the Kaplan-Meier curve up to `horizon`: mean steps to the target, counted up to there."""
    at, share = survival(times)
    early = at < horizon
    widths = np.diff([0.0, *at[early], horizon])
    return float(widths @ [1.0, *share[early]])
