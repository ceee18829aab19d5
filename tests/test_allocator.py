"""ast_dist/allocator.py: freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from ast_dist.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1_000_000) for _ in range(30)]  # as a step's activations: 4 MB each, all freed together
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_freed_at_one_step_is_not_mapped_again_at_the_next():
    def page_faults(keep):
        program = PROGRAM.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert page_faults(keep=True) * 2 < page_faults(keep=False)
