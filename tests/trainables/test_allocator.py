"""pytest tests/trainables/test_allocator.py"""

import subprocess
import sys

import pytest

# in a process of its own, as it stays so; not every system counts the pages that it maps anew
KEPT = """
import sys
import torch
from trainables.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
step = [torch.zeros(2**20) for _ in range(40)]
del step
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_is_freed_is_kept():
    def kept(how):
        done = subprocess.run(
            [sys.executable, "-c", KEPT, how], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    assert kept("keep") >= 150  # of 160 MiB
    assert kept("leave") < 80
