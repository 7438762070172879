"""What is told and chosen of a study's jobs, by a Jobs API that is only played.

pytest tests/test_jobs_known.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_our_packages_are_found_where_ray_unpacks_each_into_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    packages = ("study", "trainables", "analysis", "cluster")
    for package in packages:
        shutil.copytree(ROOT / package, tmp_path / f"of-{package}" / package)
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from cluster import jobs; print(json.dumps(jobs.code()))",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(tmp_path / f"of-{name}") for name in packages),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)["py_modules"] == [
        str(tmp_path / f"of-{package}" / package) for package in packages
    ]
