"""What a small study costs beside its training: processes, CPU seconds, and how soon it begins.

    python -m tests.footprint [--checkout FOLDER] [--repeats 3]

A study of four trials that train for a second, run cold (the data decoded) with one slot and with
two; then the first lines of `check` and `status`. With --checkout, the code of another checkout by
the Python of its .venv. Nothing else should run meanwhile: every process that begins is counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from tests.conftest import TINY_STUDY

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
FIRST_RUNG = "pretrain 25%"  # what a run prints after its first steps

Process = tuple[int, str]  # id, and when it began: ids are used again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="footprint-") as scratch:
        folder = Path(scratch)
        os.environ.update(MASKSTUDY_CACHE=str(folder / "cache"), RAY_USAGE_STATS_ENABLED="0")
        os.environ.pop("RAY_ADDRESS", None)
        for slots in (1, 2):
            study = folder / f"slots-{slots}.yaml"
            study.write_text(
                TINY_STUDY.replace("study: tiny", f"study: slots-{slots}").replace(
                    "concurrent: 1", f"concurrent: {slots}"
                )
            )
            of_a_study(asked.checkout, study, asked.repeats)
        for command in (["check", str(study)], ["status"], ["status", study.stem]):
            seconds = [first_line(asked.checkout, folder, command) for _ in range(asked.repeats)]
            print(f"{' '.join(command[:1])}: first line after {shown(seconds)} s")


def of_a_study(checkout: Path, study: Path, repeats: int) -> None:
    """Run it so often from nothing, and print what it took."""
    words, rungs, walls, cpus, counts = [], [], [], [], []
    for _ in range(repeats):
        subprocess.run(["rm", "-rf", str(study.parent / "studies" / study.stem)], check=True)
        before = set(running())
        spent: dict[Process, tuple[str, float]] = {}
        began = time.monotonic()
        log = study.with_suffix(".log")
        with log.open("wb") as printed:
            driver = start(checkout, study.parent, ["run", str(study)], printed.fileno())
        first_word = first_rung = 0.0
        while driver.poll() is None:
            for process, (title, seconds) in running().items():
                if process not in before and title:
                    spent[process] = (title, seconds)
            said = log.read_text()
            now = time.monotonic() - began
            first_word = first_word or (now if said else 0.0)
            first_rung = first_rung or (now if FIRST_RUNG in said else 0.0)
            time.sleep(0.05)
        assert driver.returncode == 0, log.read_text()
        words.append(first_word)
        rungs.append(first_rung)
        walls.append(time.monotonic() - began)
        cpus.append(sum(seconds for _, seconds in spent.values()))
        counts.append(len(spent))
    print(
        f"{study.stem}: first word after {shown(words)} s, first rung of pretraining after "
        f"{shown(rungs)} s, whole run {shown(walls)} s, {shown(cpus)} CPU s, "
        f"{max(counts)} processes"
    )
    by_kind: Counter[str] = Counter()
    for title, seconds in spent.values():
        by_kind[kind(title)] += seconds
    for name, seconds in by_kind.most_common(12):
        print(f"    {seconds:6.2f} CPU s  {name}")


def first_line(checkout: Path, folder: Path, command: list[str]) -> float:
    """Seconds until a command has said something."""
    began = time.monotonic()
    process = start(checkout, folder, command, subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    seconds = time.monotonic() - began
    process.communicate()
    return seconds


def start(checkout: Path, folder: Path, command: list[str], stdout: int) -> subprocess.Popen[bytes]:
    program = [str(checkout / ".venv" / "bin" / "python"), "-u", "-m", "study", *command]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(program, cwd=folder, env=environment, stdout=stdout)


def running() -> dict[Process, tuple[str, float]]:
    """Command line and CPU seconds of every process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                title = (folder / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue  # it has ended
            seconds = (int(fields[11]) + int(fields[12])) / TICKS
            found[int(folder.name), fields[19]] = (title, seconds)
    return found


def kind(title: str) -> str:
    """A process by what it is for."""
    if "study run" in title:
        return "driver"
    if title.startswith("ray::"):
        return title.partition(".")[0]
    words = [Path(word).name for word in title.split() if not word.startswith("-")]
    return " ".join(words[:2])


def shown(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
