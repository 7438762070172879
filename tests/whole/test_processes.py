"""What each kind of process of a study has imported.  pytest tests/whole/test_processes.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_STUDY

HEAVY = [
    "torchvision",
    "timm",
    "torch",
    "monai",
    "einops",
    "nibabel",
    "tifffile",
    "scipy",
    "optuna",
    "plotly",
    "pandas",
    "pyarrow",
    "ray",
    "ray.train",
    "ray.tune",
]

# Python imports it at every start from PYTHONPATH: what this process has imported, all its life
WITNESS = """\
import json, os, sys, threading

def watch(ended=threading.Event()):
    seen, title = set(), ""
    while True:
        with open("/proc/self/cmdline") as file:
            now = file.read().replace("\\0", " ").strip()
        if seen != (seen := seen | heavy.intersection(sys.modules)) or now != title:
            title = now
            told = os.path.join(folder, f"{os.getpid()}.json")
            with open(told + ".new", "w") as file:
                json.dump({"title": title, "modules": sorted(seen)}, file)
            os.replace(told + ".new", told)
        ended.wait(0.1)

folder, heavy = os.environ["WITNESS"], set(os.environ["WITNESS_OF"].split())
threading.Thread(target=watch, daemon=True).start()
"""

# What a process of our own needs of them; what it has beyond that is a fault. Ray itself imports
# pyarrow in every worker, and parts of Tune with Train
NEEDED = {
    "driver": {"ray", "ray.train", "ray.tune", "pandas", "pyarrow", "optuna"},
    "Desk": {"ray", "pyarrow"},
    "TrainController": {"ray", "ray.train", "pandas", "pyarrow"},
    "relay": {"ray", "ray.train", "ray.tune", "pandas", "pyarrow"},
    "RayTrainWorker": {"ray", "ray.train", "ray.tune", "pandas", "pyarrow", "torch", "scipy"},
}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_every_process_of_a_study_has_imported_only_what_it_needs(tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    two_at_once = TINY_STUDY.replace("trials: 4", "trials: 2").replace(
        "concurrent: 1", "concurrent: 2"
    )
    study.write_text(two_at_once)
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    told = tmp_path / "told"
    told.mkdir()
    variables = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "WITNESS": str(told),
        "WITNESS_OF": " ".join(HEAVY),
    }
    done = subprocess.run(
        [sys.executable, "-m", "study", "run", str(study), "--no-report"],
        check=True,
        env={**os.environ, "MASKSTUDY_CACHE": warm_cache(study), **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    says_what_it_waits_for(done.stdout)
    found: dict[str, set[str]] = {}
    for path in told.glob("*.json"):
        process = json.loads(path.read_text())
        found.setdefault(kind(process["title"]), set()).update(process["modules"])
    assert found.keys() >= NEEDED.keys()
    beyond = {name: found[name] - needed for name, needed in NEEDED.items()}
    assert not any(beyond.values()), beyond
    assert "torch" in found["RayTrainWorker"], "the witness sees nothing"


def says_what_it_waits_for(log: str) -> None:
    """While Ray and the workers come up; and a worker that imports waits for no room."""
    until_it_trains = log.partition(": pretrain 25%")[0]
    told = ["starting Ray on this machine", "Ray is starting its workers", "importing torch"]
    places = [until_it_trains.find(text) for text in told]
    assert -1 not in places and places == sorted(places), until_it_trains
    if (os.cpu_count() or 1) < 4:  # a worker group takes two cores to start
        assert "; starting 1 x 1 workers; the others follow" in until_it_trains
        assert "room for more; starting 1 x 1 workers" in log
    assert "waiting for room" not in log


def kind(title: str) -> str:
    if "-m study run" in title:
        return "driver"
    name = title.removeprefix("ray::").partition(".")[0]
    return "relay" if name == "ImplicitFunc" else name


def warm_cache(study: Path) -> str:
    """A cache that holds the study's data: decoding them needs scipy, and comes once."""
    cache = study.parent / "cache"
    code = "import sys; from pathlib import Path; from study.commands.data import dataset_of;"
    code += "from study.loading import load_spec; dataset_of(load_spec(Path(sys.argv[1])))"
    subprocess.run(
        [sys.executable, "-c", code, str(study)],
        check=True,
        env={**os.environ, "MASKSTUDY_CACHE": str(cache)},
    )
    return str(cache)


# What had been imported when a command said its first word
FIRST_WORD = """\
import os, sys
from study.__main__ import main

def write(text, so_far=sys.stdout.write):
    so_far(" ".join(sorted({heavy}.intersection(sys.modules))) + "\\n")
    sys.stdout.flush()
    os._exit(0)

sys.stdout.write = write
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("init", {"pandas", "pyarrow", "optuna"}),
        ("run", {"pandas", "pyarrow", "optuna"}),
        ("check", {"pandas", "pyarrow", "optuna"}),
        ("status", {"pandas", "pyarrow", "optuna"}),
        ("schema", {"pandas", "pyarrow", "optuna"}),
        ("--help", set()),
    ],
)
def test_a_command_has_imported_next_to_nothing_when_it_says_its_first_word(
    command: str, needed: set[str], tiny_study: Path
) -> None:
    given = {
        "init": [str(tiny_study.parent), "-o", "other.yaml"],
        "run": [str(tiny_study)],
        "check": [str(tiny_study)],
    }.get(command, [])
    done = subprocess.run(
        [sys.executable, "-c", FIRST_WORD.replace("{heavy}", str(set(HEAVY))), command, *given],
        check=True,
        capture_output=True,
        text=True,
        cwd=tiny_study.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert set(done.stdout.split()) - needed == set()
