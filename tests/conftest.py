"""Set the environment of every test before JAX is imported.

The tests run on the CPU with eight fake devices. `JAX_PLATFORMS=cuda pytest tests/gpu` runs those
that need a GPU; elsewhere they are not collected.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

collect_ignore = ["gpu"] if os.environ["JAX_PLATFORMS"] == "cpu" else []
