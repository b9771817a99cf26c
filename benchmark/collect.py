"""Turns finished run folders into benchmark/results/runs.csv (a line per evaluation) and diagnostics.csv.

Every number comes from a run's own files; what they don't tell stays empty. A run replaces its own lines, all others stay.
"""

import csv
import dataclasses
import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import rows, stats  # noqa: E402
from benchmark.rows import ROOT, Row, UserError, read_csv, read_json  # noqa: E402

EVALUATION = ("num_episodes", "success_once", "success_at_end", "episode_len")  # of a run's "eval/..."
COLUMNS = {"runs": [], "diagnostics": []}  # of the two files; columns.csv says what they mean
for line in read_csv(rows.RESULTS / "columns.csv", ("file", "column", "meaning")):
    COLUMNS[line["file"]].append(line["column"])
METRICS = ("global_step", "update_step", "name", "value")  # columns of a run's metrics.csv
FILES = ("demo_path", "checkpoint", "sft_checkpoint", "critic_weights", "record_demos")  # flags that name one
KEEP = 40  # values of a diagnostic per run
BUILT_ON = {"benchmark/pa_rl.py": ("conrft.py",)}  # scripts that a script takes parts from
SAME = ("code", "settings", "versions", "device", "demonstrations")  # within a row, over its seeds


def number(value) -> str:
    """As it goes into a CSV: six significant digits (whole numbers in full), empty for None."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


@cache
def code_of(commit: str, script: str) -> str:
    """Hash of the script and of what it imports from here at `commit`: commits that differ elsewhere have the same."""
    found = []
    for name in (script, *BUILT_ON.get(script, ()), "backbones", "operators", "plumbing"):
        git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit.removesuffix('-dirty')}:{name}"]
        found.append(subprocess.run(git, capture_output=True, text=True).stdout)
    if not all(found[:2]):  # the others aren't in all commits
        return commit
    return hashlib.sha1("".join(found).encode()).hexdigest()[:12]


def settings_of(args: dict, script: str) -> str:
    """Flags that differ from the script's defaults, as "name=value ..."; of files only their names, without the seed."""
    defaults = dataclasses.asdict(rows.load_script(ROOT / script).Args())
    kept = []
    for name, value in sorted(args.items()):
        if name in FILES and value and "://" not in value:
            value = Path(value).name.removesuffix(f"-{args['seed']}")
        if name not in ("env_id", "obs_mode", *rows.BOOKKEEPING) and value != defaults.get(name):
            kept.append(f"{name}={value}")
    return " ".join(kept)


def notes_on(row: Row, config: dict, summary: dict) -> str:
    """What is wrong with a run; empty if nothing is."""
    start = config["git_commit"]
    end = summary["git_commit"]
    notes = []
    if summary["success_once"] != summary["evaluations"][-1]["eval/success_once"]:
        notes.append("summary.json disagrees with its evaluations")
    if difference := rows.misfit(row, config):
        notes.append(f"not the row's command: {difference}")
    if start.endswith("-dirty"):
        notes.append("uncommitted code")
    if code_of(start, row.script) != code_of(end, row.script):
        notes.append(f"the code changed while it ran: {start[:8]} to {end[:8]}")
    return "; ".join(notes)


def evaluations_of(config: dict, summary: dict) -> stats.Lines:
    """A run's evaluations, one line each and a second one for --eval-elsewhere: stage, spawn, final, place, rates."""
    stages = [evaluation["stage"] for evaluation in summary["evaluations"]]
    if summary.get("online_env_steps") and "online" in stages[1:]:  # hand-over is what was measured just before
        stages[stages.index("online") - 1] = "online"
    lines = []
    for evaluation, stage in zip(summary["evaluations"], stages):
        place = {"stage": "bc" if config["script"] == "bc.py" else stage, "global_step": evaluation["global_step"]}
        for ending, spawn in (("", config["args"].get("spawn")), ("_ood", "ood")):
            rates = {name: evaluation.get(f"eval/{name}{ending}") for name in EVALUATION}
            if rates["success_once"] is not None:
                lines.append(place | rates | {"spawn": spawn})
    next(line for line in reversed(lines) if line["spawn"] != "ood")["final"] = 1
    return lines


def read_run(row: Row, folder: Path) -> stats.Lines:
    """A finished run as lines of runs.csv, one per evaluation. Raises: UserError naming a file that isn't a run's."""
    config = read_json(folder / "config.json")
    summary = read_json(folder / "summary.json")
    try:
        args = config["args"]
        versions = {"python": config.get("python")} | config["packages"]
        common = {
            "row": row.name, "method": row.method, "ablation": row.ablation, "command": row.command,
            "backbone": args.get("backbone"), "obs_mode": args["obs_mode"], "env_id": args["env_id"], "seed": args["seed"],
            "seconds": summary.get("seconds"), "demo_steps_to_success": summary.get("demo_steps_to_success"),
            "demonstrations": Path(summary["demonstrations"]).name, "settings": settings_of(args, row.script),
            "git_commit": config["git_commit"], "code": code_of(config["git_commit"], row.script),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
            "device": config["gpu"] if args["device"] == "cuda" else "cpu", "notes": notes_on(row, config, summary),
        }  # fmt: skip
        evaluations = evaluations_of(config, summary)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise UserError(f"{folder}: config.json or summary.json is torn or another program's ({error!r})") from error
    return [{name: number((common | line).get(name)) for name in COLUMNS["runs"]} for line in evaluations]


def read_diagnostics(row: Row, seed: int, folder: Path) -> stats.Lines:
    """Lines of diagnostics.csv: at most KEEP values of each, evenly spaced, ends included. Raises: UserError."""
    path = folder / "metrics.csv"
    series: dict[str, list[dict[str, str]]] = {}
    for line in read_csv(path, METRICS) if path.exists() else ():
        if line["name"] in COLUMNS["diagnostics"]:
            series.setdefault(line["name"], []).append(line)
    merged: dict[tuple[int, int], dict[str, str]] = {}
    for name, lines in series.items():
        kept = {round(k * (len(lines) - 1) / (KEEP - 1)) for k in range(KEEP)}
        for line in [lines[i] for i in sorted(kept)]:
            place = {"row": row.name, "seed": str(seed)} | {step: line[step] for step in ("global_step", "update_step")}
            found = merged.setdefault((int(line["update_step"]), int(line["global_step"])), place)
            found[name] = line["value"]
    return [line for _, line in sorted(merged.items())]


def read_results() -> stats.Runs:
    """runs.csv with numbers, by row and seed. Raises: UserError if there is nothing in it."""
    path = rows.RESULTS / "runs.csv"
    lines = stats.typed(read_csv(path, COLUMNS["runs"]), str(path))
    runs = stats.by_run(lines)
    if not runs or not all(any(line["final"] for line in run) for run in runs.values()):
        raise UserError(f"{path} holds no runs, or one without its end: collect them first (benchmark/collect.py)")
    return runs


def mixed(runs: list[stats.Lines]) -> str:
    """What differs between the runs of one row; empty if nothing does."""
    values = {name: sorted({run[0][name] for run in runs}) for name in SAME}
    return "; ".join(f"{name}: {' | '.join(found)}" for name, found in values.items() if len(found) > 1)


def write_csv(path: Path, columns: list[str], runs: stats.Runs) -> None:
    """Ordered by row and seed. Atomic: the file is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for run in sorted(runs) for line in runs[run])
    os.replace(temporary, path)


def main(runs: Path = Path("runs/benchmark"), allow_mixed: bool = False) -> int:
    """Collect the finished runs of all command files from the folder --runs.

    Exit code 1 if some don't belong in one table; --allow-mixed takes them all the same, and the tables say so.
    """
    found = {"runs": {}, "diagnostics": {}}
    for row, seed in dict.fromkeys(run for commands in rows.all_commands().values() for run in commands):
        folder = ROOT / runs / f"{row.name}-{seed}"
        if (folder / "summary.json").exists():
            found["runs"][row.name, seed] = read_run(row, folder)
            found["diagnostics"][row.name, seed] = read_diagnostics(row, seed, folder)
        elif folder.is_dir():
            print(f"{folder.name}: not finished, left out", file=sys.stderr)
    if not found["runs"]:
        raise UserError(f"no finished run in {runs}")
    everything = {}
    for name, columns in COLUMNS.items():
        path = rows.RESULTS / f"{name}.csv"
        everything[name] = stats.by_run(read_csv(path, columns) if path.exists() else []) | found[name]
    problems = []
    for row in dict.fromkeys(row for row, _ in found["runs"]):
        group = {f"{row}-{seed}": lines for (name, seed), lines in everything["runs"].items() if name == row}
        problems += [f"{run}: {lines[0]['notes']}" for run, lines in group.items() if lines[0]["notes"]]
        if differing := mixed(list(group.values())):
            problems.append(f"{row}: its runs differ in {differing}")
    for problem in problems:
        print(f"{'note' if allow_mixed else 'error'}: {problem}", file=sys.stderr)
    if problems and not allow_mixed:
        print("nothing written; --allow-mixed takes these runs, and the tables say so", file=sys.stderr)
        return 1
    for name, columns in COLUMNS.items():
        write_csv(rows.RESULTS / f"{name}.csv", columns, everything[name])
    print(f"{len(found['runs'])} runs found; runs.csv now holds {len(everything['runs'])}")
    return 0


if __name__ == "__main__":
    rows.command_line(main)
