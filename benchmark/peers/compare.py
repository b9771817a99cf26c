"""How long an update takes beside the programs that one would use in its place: the same sizes, one thread each.

  git clone https://github.com/tinkoff-ai/CORL PEERS/CORL
  git clone https://github.com/cccedric/conrft PEERS/conrft
  git clone https://github.com/ColinQiyangLi/qc PEERS/qc
  git clone https://github.com/haosulab/ManiSkill PEERS/ManiSkill
  python -m venv PEERS/jax && PEERS/jax/bin/pip install jax flax optax distrax ml_collections chex einops imageio tqdm requests matplotlib
  python benchmark/peers/compare.py --folder PEERS

Each program is a process of its own. They take turns, a few updates each, so that what else the machine does meets all
of them. Each pair is started five times: where its memory comes to lie makes a process faster or slower by a tenth. A
ratio is the median over all rounds. What isn't there is left out, with a line. Writes results/peers.csv.
"""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from benchmark.rows import RESULTS, command_line, read_csv  # noqa: E402
from plumbing.run import provenance  # noqa: E402

COLUMNS = ("work", "peer", "commit", "ours_ms", "theirs_ms", "ratio", "low", "high", "rounds", "git_commit")


STARTS = 5  # of each pair of processes


@dataclass
class Pair:
    work: str
    ours: str  # words for ours.py
    peer: str  # name, and folder
    commit: str  # that was measured
    script: str
    theirs: str  # words for the script, after the repository
    jax: bool


CORL = "6afec90484bbf47dee05fdf525e26a3ebe028e9b"
CONRFT = "3bacb6f73538ff02524e276690bf320fa6b6d323"
QC = "48283b4f662bd1c127ec9fa80647b49759f10653"
MANISKILL = "07e5469dd119be04cf0dea43dce13a9e500a373d"
PAIRS = (
    Pair("Cal-QL, chunks of 4 x 4", "calql 4 4", "CORL", CORL, "corl.py", "16", False),
    Pair("ConRFT offline, actions of 7", "calql 7 1", "conrft", CONRFT, "conrft_jax.py", "calql", True),
    Pair("ConRFT online, actions of 7", "td 7 1", "conrft", CONRFT, "conrft_jax.py", "td", True),
    Pair("ConRFT online, --compile on", "td 7 1 compiled", "conrft", CONRFT, "conrft_jax.py", "td", True),
    Pair("TD and Q loss, chunks of 4 x 4; QC-FQL", "td 4 4", "qc", QC, "qc.py", "acfql 4 4", True),
    Pair("TD and Q loss, chunks of 4 x 4; ACRLPD", "td 4 4", "qc", QC, "qc.py", "acrlpd 4 4", True),
    Pair("the same, --compile on", "td 4 4 compiled", "qc", QC, "qc.py", "acrlpd 4 4", True),
    Pair("TD and Q loss, chunks of 4 x 4; SAC", "td 4 4", "ManiSkill", MANISKILL, "maniskill.py", "16", False),
)


class Program:
    """A process that updates when it is told to."""

    def __init__(self, words: list[str]):
        """Raises: RuntimeError with the end of what it printed."""
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        one["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(words, env=os.environ | one, **pipes)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(self.process.communicate()[1].strip()[-300:])

    def seconds(self, updates: int) -> float:
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(pair: Pair, folder: Path, rounds: int, updates: int) -> dict:
    """A line of the results. Raises: RuntimeError."""
    python = str(folder / "jax/bin/python") if pair.jax else sys.executable
    found = []
    for start in range(STARTS):
        ours = Program([sys.executable, str(HERE / "ours.py"), *pair.ours.split()])
        theirs = Program([python, str(HERE / pair.script), str(folder / pair.peer), *pair.theirs.split()])
        about = f"{pair.work}, {pair.peer}, {start + 1} of {STARTS}"
        for _ in tqdm(range(rounds), about, mininterval=2):
            found.append([ours.seconds(updates), theirs.seconds(updates)])
        for program in (ours, theirs):
            program.process.kill()
    own, other = 1000 * np.array(found).T / updates
    low, ratio, high = np.quantile(own / other, (0.25, 0.5, 0.75))
    numbers = {"ours_ms": np.median(own), "theirs_ms": np.median(other), "ratio": ratio, "low": low, "high": high}
    line = {name: f"{value:.3g}" for name, value in numbers.items()}
    about = {"work": pair.work, "peer": pair.peer, "commit": head(folder / pair.peer), "rounds": len(found)}
    return about | line | {"git_commit": provenance()["git_commit"]}


def head(repository: Path) -> str:
    """The commit that is there; of a copy without git, what its file COMMIT says."""
    if (repository / "COMMIT").exists():
        return (repository / "COMMIT").read_text().strip()
    found = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def main(folder: Path, rounds: int = 8, updates: int = 3, only: str = "") -> int:
    """Compare with what is in --folder, in so many rounds of so many updates by each pair of processes.

    --only PEER: with that one; the others' lines of results/peers.csv stay.
    """
    lines = []
    if only:
        lines = [line for line in read_csv(RESULTS / "peers.csv", COLUMNS) if line["peer"] != only]
    for pair in PAIRS:
        if only not in ("", pair.peer):
            continue
        if not (folder / pair.peer).is_dir():
            print(f"{pair.work}: left out, {folder / pair.peer} isn't there (see the head of compare.py)")
            continue
        if head(folder / pair.peer) != pair.commit:
            print(f"{pair.peer} is at another commit than {pair.commit[:12]}")
        try:
            lines.append(measure(pair, folder, rounds, updates))
        except (RuntimeError, OSError) as error:
            print(f"{pair.work}: left out, {pair.peer} doesn't run: {error}")
    with (RESULTS / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print(", ".join(f"{name} {value}" for name, value in line.items()))
    return int(not lines)


if __name__ == "__main__":
    command_line(main)
