"""A warm process that runs commands in forks of itself, so that torch is imported once and not for every run.

    python -m tests.reliability.warm

It reads one JSON request per line and answers each with one. A fork runs the entry point of the real command, and may
be watched by strace: as a whole, or one thread of it, by the order in which threads are started (the main one is 0);
strace counts calls per thread, so that only this reaches every call of every thread. Under strace the threads of a
pool take tasks in turn, so that every run makes the same calls in the same threads. Without strace it may be
interrupted before its n-th line.
"""

import concurrent.futures as cf
import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

LIMIT = 60.0
ROOT = Path(__file__).resolve().parents[2]
LINES = ("storage/outputs.py", "storage/partials.py", "storage/scratch.py", "storage/writer.py", "storage/syscalls.py",
         "engine/execute.py", "engine/running.py", "engine/sinks.py", "cli/main.py")  # fmt: skip
"""Where an interrupt may be placed: the writing side."""
_PR_SET_PTRACER, _ANY = 0x59616D61, -1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def wait_for_tracer(pipe):
    """Say which thread this is, and go on once somebody traces it; no call that a tracer would count comes after."""
    os.write(pipe, f"{threading.get_native_id()}\n".encode())
    status = os.open("/proc/thread-self/status", os.O_RDONLY | os.O_CLOEXEC)  # stays open: see above
    while b"TracerPid:\t0\n" in os.pread(status, 4096, 0):
        time.sleep(0.0005)
    time.sleep(0.003)  # it was seized; now it is stopped once, and from then on watched


def number_threads(wanted, pipe):
    """Have thread number `wanted` wait for its tracer; returns a list that every thread will note its number in."""
    start, run, started, seen = threading.Thread.start, threading.Thread.run, [0], []
    ready = threading.Event()

    def numbered_start(thread):
        started[0] += 1
        thread.reliability_number = started[0]
        start(thread)
        if thread.reliability_number == wanted:
            ready.wait()  # else another thread of the pool would meanwhile take its task

    def numbered_run(thread):
        seen.append((threading.get_native_id(), thread.reliability_number))
        if thread.reliability_number == wanted:
            wait_for_tracer(pipe)
            ready.set()
        run(thread)

    threading.Thread.start, threading.Thread.run = numbered_start, numbered_run
    return seen


class Turns(cf.Executor):
    """A pool whose task number n is its worker n's, modulo their number: not whoever is idle first.

    Which of a real pool's threads takes a task, and how many threads there are at all, is a matter of microseconds.
    """

    def __init__(self, max_workers, thread_name_prefix=""):
        self._workers = [cf.ThreadPoolExecutor(1, thread_name_prefix) for _ in range(max_workers)]
        self._turns = itertools.cycle(self._workers)

    def submit(self, task, /, *arguments, **named):
        return next(self._turns).submit(task, *arguments, **named)

    def shutdown(self, wait=True, *, cancel_futures=False):
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=cancel_futures)
        for worker in self._workers:
            worker.shutdown(wait=wait)


def take_turns():
    """Have every pool of the package be one of turns."""
    for name, module in tuple(sys.modules.items()):
        if name.startswith("loratools.") and vars(module).get("ThreadPoolExecutor") is cf.ThreadPoolExecutor:
            module.ThreadPoolExecutor = Turns


def interrupt_before_line(wanted, number, log, files=None):
    """Raise a signal before the main thread's `wanted`-th line of the writing side; without one, tell them all.

    With `files`, the lines of these are meant, whichever thread runs them.
    """
    seen, kept = [], threading.Lock()

    def on_line(frame, event, argument):
        if event == "line":
            with kept:
                seen.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                reached = len(seen) == wanted
            if reached:
                sys.settrace(None)
                Path(log).write_text(seen[-1], encoding="ascii")
                signal.raise_signal(number)
        return on_line

    def on_call(frame, event, argument):
        return on_line if frame.f_code.co_filename.endswith(tuple(files or LINES)) else None

    if files:
        threading.settrace(on_call)
    sys.settrace(on_call)
    return seen


def entry_point(arguments):
    """The real command in this process; its exit code."""
    from loratools.__main__ import main

    sys.argv = ["loratools", *arguments]
    try:
        main()
    except SystemExit as leaving:
        return leaving.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(request, barrier, pipe):
    """What a fork does; does not return."""
    code = 1
    try:
        os.chdir(request["place"])
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY), 0, 0, 0)
        os.read(barrier, 1)
        if user := request.get("user"):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        lines, threads = [], []
        if request.get("strace"):
            take_turns()
            threads = number_threads(request["thread"], pipe)
            if not request["thread"]:
                wait_for_tracer(pipe)
        if "line" in request:
            lines = interrupt_before_line(request["line"], request["signal"], request["log"], request.get("files"))
        code = entry_point(request["arguments"])
        sys.settrace(None)
        sys.stdout.flush()
        sys.stderr.flush()
        if request.get("survey"):  # the last thing: what comes after the log was opened is no call of the command
            Path(request["log"]).write_text(json.dumps({"threads": threads, "lines": lines}), encoding="ascii")
    finally:
        os._exit(code)


def wait(pid):
    """The exit code, or minus the signal; None for a run that hangs, which is killed."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def fork(request, barrier):
    """Start a run; its process, and the tracer's."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(request, barrier, write)
    os.close(write)
    tracer = None
    with os.fdopen(read) as pipe:
        if request.get("strace") and (thread := pipe.readline().strip()):
            command = ["strace", "-qq", *request["strace"], "-p", thread]
            tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return pid, tracer


def answer(requests):
    """Run all of them at once; a list of exit codes."""
    read, write = os.pipe()
    runs = []
    if len(requests) == 1:  # nobody to wait for
        os.close(write)
    for request in requests:
        runs.append(fork(request, read))
    if len(requests) > 1:
        os.write(write, b"." * len(requests))
        os.close(write)
    codes = []
    for pid, tracer in runs:
        codes.append(wait(pid))
        if tracer is not None:
            tracer.wait()
    os.close(read)
    return codes


def warm_up(commands, place):
    """Run commands here, so that everything is imported; then forget what they set."""
    import torch

    from loratools.engine import resuming

    resuming.BATCH_SECONDS = 0  # so that small runs record every unit
    torch.set_num_threads(1)
    os.chdir(place)
    devnull = os.open(os.devnull, os.O_WRONLY)
    kept = os.dup(1)
    os.dup2(devnull, 1)
    for command in commands:
        if code := entry_point(command):
            raise SystemExit(f"warming up with {command} failed: {code}")
    sys.stdout.flush()
    os.dup2(kept, 1)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def main():
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:
            warm_up(request["warm"], request["place"])
            codes = []
        else:
            codes = answer(request["runs"])
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
