"""A step that hangs ends the process; a step that does not, and the time between steps, do not."""

import subprocess
import sys
import threading
import time

from megdet_d2.engine.watchdog import Watchdog
from tests.helpers.processes import environment

HANGS = """
import time
from megdet_d2.engine.watchdog import Watchdog

def wait_for_a_worker():
    time.sleep(60)

with Watchdog(1.0).watch():
    wait_for_a_worker()
"""


def test_a_step_that_hangs_ends_with_all_stacks():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HANGS],
        env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert "longer than 1 s" in done.stderr and "in wait_for_a_worker" in done.stderr


def test_only_steps_are_limited_and_by_one_thread():
    before, watchdog = threading.active_count(), Watchdog(0.5)
    for _ in range(3):
        with watchdog.watch():
            pass
        assert threading.active_count() == before + 1
    time.sleep(1.0)  # an evaluation
    watchdog.stop()
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
