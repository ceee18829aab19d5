"""The parts of a start are counted from the moment at which the process began, imports included."""

import json
import subprocess
import sys
import time

from tests.launching import ROOT, environment

PROGRAM = """
import time
time.sleep(0.3)
from ast_dist import startup
startup.note("imported_s")
time.sleep(0.1)
startup.note("joined_s")
import json; print(json.dumps(startup.parts()))
"""


def test_parts_are_seconds_since_the_kernel_started_the_process():
    before = time.time()
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(), capture_output=True, check=True)
    parts = json.loads(done.stdout)
    # The kernel states the start to a hundredth of a second.
    assert before - 0.05 <= parts["began_at"] <= time.time()
    assert parts["imported_s"] + 0.02 >= 0.3 and parts["imported_s"] + 0.08 <= parts["joined_s"]
    assert parts["began_at"] + parts["joined_s"] <= time.time() + 0.05
