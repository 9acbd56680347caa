"""The process of the command: whatever it is doing, an interruption ends it with status 130."""

import random
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "nanovllm_jax"]
# More than any test lets it generate.
GENERATE = [*COMMAND, "--ignore-eos", "--max-tokens", "4000", "Once upon a time"]


@pytest.fixture(autouse=True)
def interruptions_are_not_ignored():
    """Let processes have them although this one may run in the background of a script."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def start(command, **options):
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    return subprocess.Popen(command, **(pipes | options))


def start_with(main, entry="process.entry()", **options):
    """Start the process with this body as the command line; it is ready when it says so."""
    lines = [
        "import hashlib, os, signal, sys, time",
        "from concurrent.futures import ThreadPoolExecutor",
        "from nanovllm_jax import __main__ as process, cli",
        "def main(before_tool):",
        *(f"    {line}" for line in main.splitlines()),
        "cli.main = main",
        entry,
    ]
    process = start([sys.executable, "-c", "\n".join(lines)], **options)
    assert process.stdout.readline() == b"ready\n", process.stderr.read()
    return process


def interrupted(process, timeout=20):
    """Interrupt a process; returns its status, and what it still printed."""
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out.decode(), err.decode()


READY = "print('ready', flush=True)\n"
ENDED = (130, "", "\nnanovllm-jax: interrupted\n")


@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(60)",
        "sys.stdin.read()",
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # C code, which no handler interrupts
        "with ThreadPoolExecutor() as pool: pool.submit(time.sleep, 60)",
        "while True:\n    try: time.sleep(60)\n    except BaseException: pass",
    ],
)
def test_whatever_it_does_it_ends(work):
    assert interrupted(start_with(READY + work)) == ENDED


def test_it_ends_although_nobody_reads_its_messages():
    fill = "os.set_blocking(2, False)\ntry:\n    while True: os.write(2, b'x' * 4096)\n"
    fill += "except BlockingIOError: os.set_blocking(2, True)\n"
    process = start_with(fill + READY + "time.sleep(60)")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.communicate()


def test_a_tool_tidies_up():
    work = f"try:\n    {READY}    time.sleep(60)\nfinally: print('tidied', flush=True)"
    process = start_with("before_tool()\n" + work)
    assert interrupted(process) == (130, "tidied\n", ENDED[2])


STUBBORN = f"""before_tool()
while True:
    try:
        {READY}        time.sleep(60)
    except KeyboardInterrupt: print('no', flush=True)"""


def test_a_tool_that_does_not_end_is_ended():
    process = start_with(STUBBORN, "process.PATIENCE_S = 0.3; process.entry()")
    assert interrupted(process) == (130, "no\nready\n", ENDED[2])


def test_a_tool_is_ended_at_once_by_a_second_interruption():
    process = start_with(STUBBORN, "process.PATIENCE_S = 60; process.entry()")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"no\n"
    assert interrupted(process)[0] == 130


def test_a_background_job_goes_on_ignoring_interruptions():
    process = start_with(
        READY + "sys.stdin.readline(); return 3",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGINT)
    process.communicate(b"go on\n", timeout=20)
    assert process.returncode == 3


@pytest.mark.parametrize("at", [0.3, 1.5, 4.0])
def test_the_command_ends_early_and_late(at):
    check_moment(at)


@pytest.mark.slow
def test_the_command_ends_at_any_moment_of_its_life():
    for _ in range(2):  # the second finds its programs compiled
        began = time.perf_counter()
        process = start(GENERATE)
        assert process.stdout.read(200)  # it generates, for seconds
        life = time.perf_counter() - began + 1
        interrupted(process)
    rng = random.Random(0)
    for i in range(16):
        check_moment(0.2 + (life - 0.2) * (i + rng.random()) / 16)


def check_moment(at):
    process = start(GENERATE)
    time.sleep(at)
    assert process.poll() is None
    status, _, said = interrupted(process)
    assert status == 130, f"at {at} s: {said}"
    assert "Traceback" not in said
