"""Keeps compiled programs on disk, and finds them again without tracing them.

JAX's own cache knows a program by its lowered text: to find it, a start must trace and lower every
program first, which takes longer than loading them. Here a program is known by what it is made
from: the packages' sources, shapes and options, the versions, the flags and the device. So any edit
of a source file, a docstring included, makes all programs anew.
"""

import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels
from nanovllm_jax.engine.cache_folder import private_folder

log = logging.getLogger("nanovllm_jax")

SOURCES = (Path(__file__).parents[1], Path(pallas_kernels.__file__).parent)
KINDS = (".py", ".cu", ".cuh")  # of the files there that are sources

# For each thread, `found_by_jax`: did JAX's own cache serve the last compilation?
_thread = threading.local()


def _listen(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _thread.found_by_jax = True


jax.monitoring.register_event_listener(_listen)


def sources_in(folder: Path) -> list[Path]:
    """The source files below a folder, in the same order each time."""
    return sorted(path for path in folder.rglob("*") if path.suffix in KINDS)


class ProgramCache:
    """Stores the programs of one engine configuration as files of a folder."""

    def __init__(
        self,
        folder: Path,
        devices: list[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
        key_parts: Any,
    ):
        """Programs for `devices`.

        Args:
            folder: it is made if it is not there. Programs are code, so if anyone but this user
                could have written them, nothing is loaded or stored; a warning says so.
            key_parts: what else tells programs apart; its repr must be the same in every run.
        """
        self.devices = devices
        self.told: set[str] = set()  # problems that have been warned of
        try:
            self.folder = private_folder(folder, check_parents=False)
        except OSError as error:
            self.folder = None
            log.warning("programs are lowered again at each start, not kept: %s", error)
        client = devices[0].client
        parts = [
            *(path.read_bytes() for root in SOURCES for path in sources_in(root)),
            *(jax.__version__, jaxlib.version.__version__, client.platform_version),
            *(device.device_kind for device in devices),
            *(f"{name}={os.environ.get(name)}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
            repr(sorted((name, str(value)) for name, value in jax.config.values.items())),
            repr(key_parts),
        ]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part if isinstance(part, bytes) else part.encode())
            digest.update(b"\0")
        self.key = digest.hexdigest()[:32]

    def load(self, name: str, args: tuple, outputs: Any) -> jax.stages.Compiled | None:
        """The program stored under `name`, or None.

        Args:
            args: a pytree with the structure of the program's positional arguments.
            outputs: a pytree with the structure of its results.
        """
        if self.folder is None:
            return None
        path = self._path(self.folder, name)
        in_tree, out_tree = jax.tree.structure((args, {})), jax.tree.structure(outputs)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_uid != os.geteuid():
                    raise PermissionError("it belongs to another user")
                stored = file.read()
            return deserialize_and_load(stored, in_tree, out_tree, execution_devices=self.devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with the file, compiling still works
            self._tell_once("%s cannot be loaded and is made anew: %r", path, error)
            return None

    def compile(
        self, name: str, lowered: jax.stages.Lowered, options: dict[str, bool | str]
    ) -> jax.stages.Compiled:
        """Compile a program and keep it under `name`.

        What JAX's own cache had (after a change of sources that changed no program) is not kept:
        on a CPU, a program that has been loaded once and is stored again does not run.
        """
        _thread.found_by_jax = False
        program = lowered.compile(options)
        if not _thread.found_by_jax:
            self.store(name, program)
        return program

    def store(self, name: str, program: jax.stages.Compiled) -> None:
        """Keep a program if that can be done; readers see the old file or the new, no part."""
        if self.folder is None:
            return
        path = self._path(self.folder, name)
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                whole = Path(folder) / path.name
                whole.write_bytes(serialize(program)[0])
                os.replace(whole, path)
        except Exception as error:  # for example a full disk; the program itself is fine
            self._tell_once("%s cannot be written: %r", path, error)

    def _tell_once(self, text: str, path: Path, error: Exception) -> None:
        """Warn of the first program that a problem befalls; it is likely to befall all."""
        if text not in self.told:
            self.told.add(text)
            log.warning(text, path, error)

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{self.key}-{name}"
