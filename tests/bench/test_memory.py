from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from qatbench.bench.memory import keep_freed
if sys.argv[1] == "keep":
    keep_freed()
bytearray(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **env: str) -> int:
    """Pages that the kernel cleared for 20 blocks of 8 MiB, each freed before the next."""
    answer = subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True, env=env)
    return int(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_taken_again() -> None:
    """Every training step would have its memory mapped and cleared anew; or a setting of the user's would be overruled."""
    most = faults("not")
    assert faults("keep") < 0.1 * most
    assert faults("keep", MALLOC_TOP_PAD_="131072") > 0.5 * most
