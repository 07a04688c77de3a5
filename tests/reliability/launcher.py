"""Starts commands from a small process, and measures them: one request a line on stdin, one answer a line on stdout.

A child's peak memory never reads lower than what its parent held when it was started, so pytest, with torch in it,
cannot measure its own children. Standard library only.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time

DROP_FROM_BOUNDING_SET = 24  # PR_CAPBSET_DROP
OVERRIDES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
LIBC = ctypes.CDLL(None)


def powerless():
    """Root loses the right to read what nobody may; anybody else has none to lose."""
    for capability in OVERRIDES:
        LIBC.prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)


def run(request):
    """Run one command; its answer is the exit code, seconds, CPU seconds and bytes, and whether it was stopped."""
    stopped = threading.Event()
    with open(request["stdout"], "wb") as out, open(request["stderr"], "wb") as err:  # noqa: PTH123
        start = time.perf_counter()
        child = subprocess.Popen(
            request["command"], cwd=request["cwd"], env=request["env"], stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, start_new_session=True,
            preexec_fn=powerless if request["powerless"] else None,  # noqa: PLW1509  (no other thread is running)
        )  # fmt: skip

        def stop():
            stopped.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(request["limit"], stop)
        timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "code": child.returncode,
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "bytes": usage.ru_maxrss * 1024,
        "stopped": stopped.is_set(),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
