"""What a study ran with is written down without naming the machine or importing the libraries."""

import getpass
import hashlib
import json
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from study.environment import environment


def git(directory: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(directory), *who, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_versions_are_the_installed_ones(tmp_path):
    found = environment(tmp_path)
    assert found["python"] == platform.python_version()
    for package in ("torch", "ray", "optuna", "timm"):
        assert found["packages"][package] == metadata.version(package)
    assert "maskstudy" in found["packages"]


def test_hardware_is_described_without_naming_the_machine(tmp_path):
    found = environment(tmp_path)
    hardware = found["hardware"]
    assert hardware["cores"] >= 1 and hardware["memory_bytes"] > 2**28 and hardware["cpu"]
    assert hardware["gpus"] == []
    assert hardware["amx"] is torch.cpu._is_amx_tile_supported()
    values = set(json.dumps(found).split('"'))
    assert not values & {socket.gethostname(), getpass.getuser(), str(tmp_path)}


def test_git_tells_the_commit_and_whether_the_files_differ_from_it(tmp_path):
    assert environment(tmp_path)["git"] is None
    git(tmp_path, "init", "--quiet")
    assert environment(tmp_path)["git"] is None  # nothing committed yet
    (tmp_path / "a.py").write_text("one = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment(tmp_path)["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "a.py").write_text("one = 2\n")
    assert environment(tmp_path)["git"] == {"commit": commit, "dirty": True}


def test_a_lock_file_is_known_by_its_hash(tmp_path):
    assert environment(tmp_path)["lock_file"] is None
    (tmp_path / "uv.lock").write_bytes(b"version = 1\n")
    expected = {"name": "uv.lock", "sha256": hashlib.sha256(b"version = 1\n").hexdigest()}
    assert environment(tmp_path)["lock_file"] == expected


def test_neither_this_nor_the_ledger_imports_the_heavy_libraries():
    code = (
        "import sys, study.environment, study.ledger;"
        "study.environment.environment();"
        "print({'torch', 'ray', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
