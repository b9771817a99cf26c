"""Turns finished run folders into benchmark/results/SUITE.csv (a line per run) and SUITE-curves.csv.

    python benchmark/collect.py force-state

Every number comes from a run's own files. Runs of the committed CSV that aren't in the runs folder (another machine's)
are kept. Runs of one row that differ in code, settings or versions, come from uncommitted code, or don't fit the row's
command are refused; `--allow-mixed` takes them, and the report says so below the table.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import tyro
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark.suites import BOOKKEEPING, ROOT, Row, load_script, misfit, suite_of  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
COLUMNS = (
    "row", "method", "env_id", "obs_mode", "seed", "success_once", "low", "high", "success_at_end", "episodes",
    "steps_to_success", "demo_steps_to_success", "sft_success_once", "sft_low", "sft_high", "sft_episodes",
    "handover_success_once", "largest_drop", "online_env_steps", "env_steps", "online_env_steps_at_80", "seconds",
    "git_commit", "code", "torch", "mani_skill", "device", "demonstrations", "settings", "command", "notes",
)  # fmt: skip
EVALUATION = {
    "success_once": "eval/success_once", "low": "eval/success_once_low", "high": "eval/success_once_high",
    "episodes": "eval/num_episodes", "episode_len": "eval/episode_len",
}  # columns of SUITE-curves.csv and what they are in a run  # fmt: skip
CURVE_KEYS = ("row", "method", "env_id", "obs_mode", "seed", "stage", "online_env_step", "update_step")
DIAGNOSTICS = re.compile(r"calib/.*|vgpd/(zeta|candidate_std|ess)|values/q_std")
ONLINE = ("online", "done")  # stages of evaluations from hand-over on
KEEP = 40  # values of a diagnostic per run
SAME = ("code", "settings", "torch", "mani_skill", "device", "demonstrations")  # within a row, over its seeds


def number(value) -> str:
    """As it goes into a CSV: six significant digits, empty for None."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"


@cache
def code_of(commit: str, script: str) -> str:
    """Hash of the script and the backbones at `commit`: commits that differ elsewhere have the same."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet"]
    names = [f"{commit.removesuffix('-dirty')}:{name}" for name in (script, "backbones")]
    found = [subprocess.run([*git, name], capture_output=True, text=True) for name in names]
    if any(f.returncode for f in found):
        return commit
    return hashlib.sha1("".join(f.stdout for f in found).encode()).hexdigest()[:12]


def derive(evaluations: list[dict]) -> dict:
    """Numbers of a run from its evaluations: the last one, the one after SFT, hand-over, drop, steps to 80 %.

    Steps at 80 %: control steps since hand-over at the first online evaluation with success of at least 80 % that also
    holds at the next one. Drop: hand-over's success minus the lowest online success (negative: never fell).
    """
    wilson = [binomtest(successes(e), int(e["eval/num_episodes"])).proportion_ci(method="wilson") for e in evaluations]
    sft = next((i for i, e in enumerate(evaluations) if stage_of(e).startswith("sft")), None)
    online = [e for e in evaluations if stage_of(e) in ONLINE]
    rate, last = [e["eval/success_once"] for e in online], evaluations[-1]
    lowest_two = map(min, rate, rate[1:] + rate[-1:])
    steady = [e["global_step"] for e, low in zip(online, lowest_two, strict=True) if low >= 0.8]
    return {
        "success_once": last["eval/success_once"], "low": wilson[-1].low, "high": wilson[-1].high,
        "success_at_end": last["eval/success_at_end"], "episodes": last["eval/num_episodes"],
        "steps_to_success": last["eval/episode_len"],
        "sft_success_once": None if sft is None else evaluations[sft]["eval/success_once"],
        "sft_low": None if sft is None else wilson[sft].low, "sft_high": None if sft is None else wilson[sft].high,
        "sft_episodes": None if sft is None else evaluations[sft]["eval/num_episodes"],
        "handover_success_once": rate[0] if rate else None, "largest_drop": rate[0] - min(rate) if rate else None,
        "online_env_steps_at_80": steady[0] - online[0]["global_step"] if steady else None,
    }  # fmt: skip


def stage_of(evaluation: dict) -> str:
    return evaluation.get("stage", "bc")  # bc.py has one stage only


def successes(evaluation: dict) -> int:
    return round(evaluation["eval/success_once"] * evaluation["eval/num_episodes"])


def settings_of(args: dict, script: str) -> str:
    """Flags that differ from the script's defaults, as "name=value ...", without bookkeeping and machine paths."""
    defaults = dataclasses.asdict(load_script(ROOT / script).Args())
    left_out = ("env_id", "obs_mode", *BOOKKEEPING)
    differing = {name: v for name, v in args.items() if v != defaults.get(name) and name not in left_out}
    for name in ("demo_path", "checkpoint"):
        if "://" not in (value := differing.get(name) or ""):
            differing |= {name: Path(value).name} if value else {}
    return " ".join(f"{n}={v}" for n, v in sorted(differing.items()))


def read_run(row: Row, folder: Path) -> dict[str, str]:
    """A finished run as a line of SUITE.csv."""
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    args = config["args"]
    derived, notes, script = derive(summary["evaluations"]), [], row.command.split()[1]
    wrong = [k for k in derived if k in summary and number(summary[k]) != number(derived[k])]
    if wrong:
        notes.append(f"summary.json disagrees with its evaluations: {', '.join(wrong)}")
    if difference := misfit(row, config):
        notes.append(f"not the row's command: {difference}")
    start, end = config["git_commit"], summary["git_commit"]
    if start.endswith("-dirty"):
        notes.append("uncommitted code")
    if code_of(start, script) != code_of(end, script):
        notes.append(f"the code changed while it ran: {start[:8]} to {end[:8]}")
    line = derived | {
        name: summary.get(name) for name in ("demo_steps_to_success", "online_env_steps", "env_steps", "seconds")
    }
    line |= {
        "row": row.name, "method": row.method, "env_id": args["env_id"], "obs_mode": args["obs_mode"],
        "seed": args["seed"], "git_commit": start, "code": code_of(start, script), "torch": config["packages"]["torch"],
        "mani_skill": config["packages"]["mani_skill"], "device": config["gpu"] if args["device"] == "cuda" else "cpu",
        "demonstrations": Path(config["demonstrations"]).name, "settings": settings_of(args, script),
        "command": row.command, "notes": "; ".join(notes),
    }  # fmt: skip
    return {name: number(line[name]) for name in COLUMNS}


def read_curves(line: dict[str, str], folder: Path) -> list[dict[str, str]]:
    """A run's evaluations (stage given), then its diagnostics (update_step given), as lines of SUITE-curves.csv."""
    evaluations = json.loads((folder / "summary.json").read_text())["evaluations"]
    start = next((e["global_step"] for e in evaluations if stage_of(e) in ONLINE), 0)
    key, lines = {name: line[name] for name in CURVE_KEYS[:5]}, []
    for e in evaluations:
        place = {"stage": stage_of(e), "online_env_step": number(e.get("global_step", 0) - start)}
        lines.append(key | place | {column: number(e[name]) for column, name in EVALUATION.items()})
    series: dict[str, list[tuple[int, int, str]]] = {}
    for global_step, update_step, name, value in list(csv.reader((folder / "metrics.csv").open()))[1:]:
        if DIAGNOSTICS.fullmatch(name):
            series.setdefault(name, []).append((int(global_step), int(update_step), value))
    merged: dict[tuple[int, int], dict[str, str]] = {}
    for name, values in series.items():
        last = len(values) - 1
        for i in sorted({round(k * last / (KEEP - 1)) for k in range(KEEP)}) if last >= KEEP else range(last + 1):
            merged.setdefault(values[i][:2], {})[name] = values[i][2]
    for (global_step, update_step), values in sorted(merged.items(), key=lambda item: item[0][::-1]):
        place = {"online_env_step": number(global_step - start), "update_step": number(update_step)}
        lines.append(key | place | values)
    return lines


def mixed(lines: list[dict[str, str]]) -> str:
    """What differs between the runs of one row; empty if nothing does."""
    values = {name: sorted({line[name] for line in lines}) for name in SAME}
    return "; ".join(f"{name}: {' | '.join(found)}" for name, found in values.items() if len(found) > 1)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: list[str], lines: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(temporary, path)


def main(
    suite: tyro.conf.Positional[str],
    runs: Path = Path("runs/benchmark"),
    results: Path = RESULTS,
    allow_mixed: bool = False,
) -> int:
    """Collect a suite's finished runs; exit code 1 if there are none, or if they don't belong in one table.

    Args:
        suite: name of the suite.
        runs: folder of the run folders, from the repository's root.
        results: where the CSVs go.
        allow_mixed: take them all the same; the report says so.
    """
    rows = {row.name: row for row in suite_of(suite).rows}
    path, curves_path = results / f"{suite}.csv", results / f"{suite}-curves.csv"
    found: dict[tuple[str, str], tuple[dict, list[dict]]] = {}
    for row in rows.values():
        folders = [f for f in (ROOT / runs).glob(f"{row.name}-*") if f.name.removeprefix(f"{row.name}-").isdigit()]
        for folder in folders:
            if (folder / "summary.json").exists():
                line = read_run(row, folder)
                found[row.name, line["seed"]] = line, read_curves(line, folder)
            else:
                print(f"{folder.name}: not finished, left out", file=sys.stderr)
    if not found:
        print(f"error: no finished run of {suite} in {runs}", file=sys.stderr)
        return 1
    old_curves = read_csv(curves_path) if curves_path.exists() else []
    for line in read_csv(path) if path.exists() else []:
        if line["row"] in rows and (run := (line["row"], line["seed"])) not in found:
            print(f"{'-'.join(run)}: kept from {path.name}", file=sys.stderr)
            found[run] = line, [c for c in old_curves if (c["row"], c["seed"]) == run]
    order = sorted(found, key=lambda run: (list(rows).index(run[0]), int(run[1])))
    lines, problems = [found[run][0] for run in order], []
    for name in rows:
        group = [line for line in lines if line["row"] == name]
        problems += [f"{'-'.join((name, line['seed']))}: {line['notes']}" for line in group if line["notes"]]
        problems += [f"{name}: its runs differ in {differing}"] if (differing := mixed(group)) else []
    for problem in problems:
        print(f"{'note' if allow_mixed else 'error'}: {problem}", file=sys.stderr)
    if problems and not allow_mixed:
        print("nothing written; --allow-mixed takes these runs, and the report says so", file=sys.stderr)
        return 1
    curves = [line for run in order for line in found[run][1]]
    names = {name for line in curves for name, value in line.items() if value} - {*CURVE_KEYS, *EVALUATION}
    write_csv(path, list(COLUMNS), lines)
    write_csv(curves_path, [*CURVE_KEYS, *EVALUATION, *sorted(names)], curves)
    print(f"{path.name}: {len(lines)} runs; {curves_path.name}: {len(curves)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
