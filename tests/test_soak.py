"""The soak of scripts/soak.py, for a moment: it fails on a wrong token or a book out of balance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_short_soak():
    command = [sys.executable, "-m", "scripts.soak", "--requests", "500", "--seed", "7"]
    root = Path(__file__).parents[1]
    env = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, encoding="utf-8", timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'interruptions'" in done.stdout and "'aborts'" in done.stdout
