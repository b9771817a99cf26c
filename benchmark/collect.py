"""Turns finished run folders into benchmark/results/runs.csv (a line per evaluation) and diagnostics.csv.

    python benchmark/collect.py                                          # whatever is finished, of all command files
    python benchmark/collect.py benchmark/commands/force-state.sh --runs runs/benchmark

Every number comes from a run's own files; what they don't tell stays empty. A run replaces its own lines, all others
stay: those of other files, and of other machines. Runs of one row that differ in code, settings or versions, come from
uncommitted code, or don't fit the row's command are refused; `--allow-mixed` takes them, and the tables say so.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import stats  # noqa: E402
from benchmark.rows import (  # noqa: E402
    BOOKKEEPING,
    ROOT,
    CommandError,
    Row,
    all_commands,
    load_script,
    misfit,
    read_commands,
    read_csv,
)

RESULTS = ROOT / "benchmark" / "results"
EVALUATION = {
    "num_episodes": "eval/num_episodes", "success_once": "eval/success_once", "success_at_end": "eval/success_at_end",
    "episode_len": "eval/episode_len", "eval_s": "time/eval_s",
}  # columns, and what they are in a run  # fmt: skip
COLUMNS = (
    "row", "method", "ablation", "backbone", "obs_mode", "env_id", "seed",
    "stage", "select",  # what was evaluated: the stage that had been trained, and (CO-RFT) which of its policies
    "spawn",  # where objects started in it (CO-RFT)
    "final",  # 1: the run's result
    "global_step",  # control steps taken in training, summed over environments
    "update_step",
    *list(EVALUATION)[:4],  # episode_len: mean control steps to success, over successes
    "wall_s",  # seconds since the run's first log entry, while it was running
    "eval_s",  # of them in this evaluation
    "seconds",  # of the whole run, by its own clock
    "demo_steps_to_success", "git_commit",
    "code",  # hash of the script and the backbones at that commit
    "config_hash",  # of all flags but those that say which run it is
    "versions", "device", "demonstrations",
    "settings",  # flags that differ from the script's defaults
    "command", "notes",
)  # fmt: skip
DIAGNOSTICS = (
    "calib/q_minus_return", "calib/abs_error", "calib/correlation", "calib/bound_rate", "values/q_data",
    "values/mc_return", "values/q_std", "vgpd/zeta", "vgpd/candidate_std", "vgpd/ess", "intervention/rate",
    "train/success_once", "train/episode_len", "val/td_error", "val/q_policy", "val/mc_return",
)  # fmt: skip
PLACE = ("row", "seed", "global_step", "update_step")  # of a line of diagnostics.csv
KEEP = 40  # values of a diagnostic per run
SAME = ("code", "settings", "versions", "device", "demonstrations")  # within a row, over its seeds


def number(value) -> str:
    """As it goes into a CSV: six significant digits (whole numbers in full), empty for None."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


# ---- where a run comes from ----
@cache
def code_of(commit: str, script: str) -> str:
    """Hash of the script, make_demos.py and the backbones at `commit`: commits that differ elsewhere have the same."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet"]
    names = [f"{commit.removesuffix('-dirty')}:{name}" for name in (script, "backbones", "make_demos.py")]
    found = [subprocess.run([*git, name], capture_output=True, text=True) for name in names]
    if any(f.returncode for f in found[:2]):  # early commits have no make_demos.py
        return commit
    return hashlib.sha1("".join(f.stdout for f in found).encode()).hexdigest()[:12]


def without_places(args: dict) -> dict:
    """Flags that say how a run learns; of files only their names, and of runs of the same seed only the row."""
    kept = {name: value for name, value in args.items() if name not in BOOKKEEPING}
    for name in ("demo_path", "checkpoint", "sft_checkpoint", "critic_weights", "record_demos"):
        if kept.get(name) and "://" not in kept[name]:
            kept[name] = Path(kept[name]).name.removesuffix(f"-{args['seed']}")
    return kept


def settings_of(args: dict, script: str) -> str:
    """Flags that differ from the script's defaults, as "name=value ...", without bookkeeping and machine paths."""
    defaults = dataclasses.asdict(load_script(ROOT / script).Args())
    differing = {n: v for n, v in without_places(args).items() if v != defaults.get(n)}
    return " ".join(f"{n}={v}" for n, v in sorted(differing.items()) if n not in ("env_id", "obs_mode"))


def config_hash(args: dict) -> str:
    return hashlib.sha1(json.dumps(without_places(args), sort_keys=True).encode()).hexdigest()[:12]


def notes_on(row: Row, config: dict, summary: dict, run: stats.Lines) -> list[str]:
    """What is wrong with a run."""
    notes, last = [], stats.result(run)
    online = stats.handover(run) is not None
    claims = {"success_once": last["success_once"], "success_at_end": last["success_at_end"]}
    claims |= {"steps_to_success": last["episode_len"]}
    claims |= {"handover_success_once": number(stats.handover(run))} if online else {}
    if wrong := [name for name, value in claims.items() if name in summary and number(summary[name]) != value]:
        notes.append(f"summary.json disagrees with its evaluations: {', '.join(wrong)}")
    if difference := misfit(row, config):
        notes.append(f"not the row's command: {difference}")
    start, end = config["git_commit"], summary["git_commit"]
    if start.endswith("-dirty"):
        notes.append("uncommitted code")
    if code_of(start, row.script) != code_of(end, row.script):
        notes.append(f"the code changed while it ran: {start[:8]} to {end[:8]}")
    return notes


# ---- what a run has measured ----
def read_metrics(folder: Path) -> list[tuple[int, int, str, str]]:
    """metrics.csv: (global_step, update_step, name, value) for each line; none if there is no file."""
    if not (path := folder / "metrics.csv").exists():
        return []
    with path.open(newline="") as file:
        return [(int(g), int(u), name, value) for g, u, name, value in list(csv.reader(file))[1:]]


def clock(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Seconds at which the run logged each (name, update_step) that belongs to an evaluation, from TensorBoard's files.

    Counted while the run was running: the time between a kill and the resumption is left out, work done twice is in.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    times, before = {}, 0.0
    for path in sorted((folder / "tensorboard").glob("events.*"), key=lambda p: p.name.split(".")[3]):
        first = last = None
        for event in EventFileLoader(str(path)).Load():
            first, last = event.wall_time if first is None else first, event.wall_time
            for value in event.summary.value:
                if value.tag.startswith("eval/success_once"):
                    times.setdefault((value.tag, event.step), []).append(before + last - first)
        before += last - first if first else 0.0
    return times


def read_run(row: Row, folder: Path) -> stats.Lines:
    """A finished run as lines of runs.csv, one per evaluation."""
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    args, evaluations = config["args"], summary["evaluations"]
    evaluated = re.compile("eval/success_once(_selected)?(_ood)?")
    logged = [(name, u) for _, u, name, _ in read_metrics(folder) if evaluated.fullmatch(name)]
    places = logged if len(logged) == len(evaluations) else [None] * len(evaluations)
    times = clock(folder)
    versions = {"python": config.get("python")} | config["packages"]
    common = {
        "row": row.name, "method": row.method, "ablation": row.ablation, "backbone": args.get("backbone"),
        "obs_mode": args["obs_mode"], "env_id": args["env_id"], "seed": args["seed"], "seconds": summary.get("seconds"),
        "demo_steps_to_success": summary.get("demo_steps_to_success"), "git_commit": config["git_commit"],
        "code": code_of(config["git_commit"], row.script), "config_hash": config_hash(args),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
        "device": config["gpu"] if args["device"] == "cuda" else "cpu",
        "demonstrations": Path(config["demonstrations"]).name, "settings": settings_of(args, row.script),
        "command": row.command,
    }  # fmt: skip
    lines = []
    for i, (e, place) in enumerate(zip(evaluations, places, strict=True)):
        same = [t for t in places[i:] if t and t == place]  # two evaluations may fall on one update
        wall = times.get(place, [])
        own = {
            "stage": e.get("stage", "bc"), "select": e.get("select"), "spawn": e.get("spawn"), "global_step": e.get("global_step", 0),
            "update_step": place[1] if place else e.get("update"),
            "wall_s": wall[-len(same)] if place and len(wall) >= len(same) else None,
        }  # fmt: skip
        lines.append(common | own | {column: e.get(name) for column, name in EVALUATION.items()})
    wanted = {name: (None, args.get(flag)) for name, flag in (("select", "select"), ("spawn", "eval_spawn"))}
    chosen = [line for line in lines if all(line[name] in known for name, known in wanted.items())]
    (chosen or lines[:1])[-1]["final"] = 1  # CO-RFT's --select sft: the first evaluation
    lines = [{name: number(line.get(name)) for name in COLUMNS} for line in lines]
    notes = "; ".join(notes_on(row, config, summary, lines))
    return [line | {"notes": notes} for line in lines]


def read_diagnostics(row: Row, seed: str, folder: Path) -> stats.Lines:
    """A run's diagnostics as lines of diagnostics.csv: at most KEEP values of each, evenly spaced, ends included."""
    series: dict[str, list[tuple[int, int, str]]] = {}
    for global_step, update_step, name, value in read_metrics(folder):
        if name in DIAGNOSTICS:
            series.setdefault(name, []).append((global_step, update_step, value))
    merged: dict[tuple[int, int], dict[str, str]] = {}
    for name, values in series.items():
        last = len(values) - 1
        for i in sorted({round(k * last / (KEEP - 1)) for k in range(KEEP)}) if last >= KEEP else range(last + 1):
            merged.setdefault(values[i][:2], {})[name] = values[i][2]
    key = {"row": row.name, "seed": seed}
    ordered = sorted(merged.items(), key=lambda item: item[0][::-1])
    return [key | {"global_step": str(g), "update_step": str(u)} | values for (g, u), values in ordered]


# ---- the two files ----
def mixed(runs: list[stats.Lines]) -> str:
    """What differs between the runs of one row; empty if nothing does."""
    values = {name: sorted({run[0][name] for run in runs}) for name in SAME}
    return "; ".join(f"{name}: {' | '.join(found)}" for name, found in values.items() if len(found) > 1)


def write_csv(path: Path, columns: tuple[str, ...], lines: stats.Lines) -> None:
    """Atomic: the file is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    os.replace(temporary, path)


def merge(path: Path, columns: tuple[str, ...], found: dict[tuple[str, int], stats.Lines]) -> None:
    """Put the lines of runs into a CSV, in the place of the same runs' lines; ordered by row and seed."""
    runs = stats.by_run(read_csv(path) if path.exists() else []) | found
    write_csv(path, columns, [line for run in sorted(runs) for line in runs[run]])


def main(
    commands: tyro.conf.Positional[tuple[Path, ...]] = (),
    runs: Path = Path("runs/benchmark"),
    results: Path = RESULTS,
    allow_mixed: bool = False,
) -> int:
    """Collect finished runs; exit code 1 if there are none, or if some don't belong in one table.

    Args:
        commands: command files; default: all of benchmark/commands.
        runs: folder of the run folders, from the repository's root.
        results: where the CSVs go.
        allow_mixed: take them all the same; the tables say so.
    """
    try:
        files = [read_commands(path) for path in commands] or all_commands()
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, found, diagnostics = {row.name: row for file in files for row in file.rows}, {}, {}
    for row in rows.values():
        folders = [f for f in (ROOT / runs).glob(f"{row.name}-*") if f.name.removeprefix(f"{row.name}-").isdigit()]
        for folder in folders:
            seed = int(folder.name.rpartition("-")[2])
            if (folder / "summary.json").exists():
                found[row.name, seed] = read_run(row, folder)
                diagnostics[row.name, seed] = read_diagnostics(row, str(seed), folder)
            elif folder.is_dir():
                print(f"{folder.name}: not finished, left out", file=sys.stderr)
    if not found:
        print(f"error: no finished run in {runs}", file=sys.stderr)
        return 1
    path, problems = results / "runs.csv", []
    everything = stats.by_run(read_csv(path) if path.exists() else []) | found
    for name in dict.fromkeys(row for row, _ in found):
        group = {run: lines for run, lines in everything.items() if run[0] == name}
        problems += [f"{name}-{seed}: {lines[0]['notes']}" for (_, seed), lines in group.items() if lines[0]["notes"]]
        if differing := mixed(list(group.values())):
            problems.append(f"{name}: its runs differ in {differing}")
    for problem in problems:
        print(f"{'note' if allow_mixed else 'error'}: {problem}", file=sys.stderr)
    if problems and not allow_mixed:
        print("nothing written; --allow-mixed takes these runs, and the tables say so", file=sys.stderr)
        return 1
    merge(path, COLUMNS, found)
    merge(results / "diagnostics.csv", (*PLACE, *DIAGNOSTICS), diagnostics)
    print(f"{len(found)} runs of {len(rows)} rows; {path.name} now holds {len(everything)}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
