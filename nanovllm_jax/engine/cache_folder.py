"""Folders of compiled programs: whom they must belong to, and how damaged ones are healed.

Such a folder is a convenience: whatever is wrong with it, the engine runs, and says so once. But
what lies in it is run as code, so it is used only if nobody else could have written it.
"""

import os
import stat
import tempfile
import zlib
from pathlib import Path

from jax._src.compilation_cache import decompress_executable  # not public, nor is the format

PROBE_BYTES = 4 << 20  # Bytes written to find out whether a folder takes any.
ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of an entry that was compressed with zstandard


def default_folder() -> Path:
    """The folder for this user's programs; RuntimeError if the user has no home directory."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else Path.home() / ".cache") / "nanovllm_jax" / "xla"


def private_folder(path: Path, *, check_parents: bool = True) -> Path:
    """Find or make a folder that only this user can write to; returns it without symbolic links.

    It must be the user's, and writable by nobody else. No folder above it may let others put
    another in its place: each belongs to the user or to root, and if others may write to it, it is
    sticky, as /tmp is.

    Args:
        check_parents: False if the user has chosen the folders above.

    Raises:
        PermissionError: it is not so; the message names the folder and the remedy.
        OSError: the folder cannot be made.
    """
    path = path.resolve()
    parents = path.parents if check_parents else ()
    for parent in (parent for parent in parents if parent.exists()):
        found = parent.stat()
        if found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{parent} belongs to another user (uid {found.st_uid})")
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise PermissionError(f"others can write to {parent}: chmod o-w {parent}")
    for folder in reversed((path, *path.parents)):
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user (uid {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"others can write to {path}, and so choose what code runs: remove it, or if nobody "
            f"else has used it, chmod 700 {path}"
        )
    return path


def check_writable(folder: Path) -> None:
    """Raise OSError if no file of some size can be written, as on a disk that is full."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()


def remove_damaged(folder: Path) -> int:
    """Remove the entries of JAX's cache that cannot be read; returns how many.

    A process that is killed while it writes leaves such an entry, and so does a full disk. JAX
    compiles the program anew at each start, but never replaces the entry. Only those written since
    the last call are looked into.

    Raises:
        OSError: the folder cannot be read or written.
    """
    begun, checked = folder / ".checking", folder / ".checked"
    begun.write_bytes(b"")  # so that both times come from the clock of the file system
    last = checked.stat().st_mtime_ns if checked.exists() else 0
    removed = 0
    for entry in folder.glob("*-cache"):
        if entry.stat().st_mtime_ns >= last and not _is_whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)
            removed += 1
    begun.replace(checked)
    return removed


def _is_whole(entry: bytes) -> bool:
    """Whether an entry of JAX's cache can be decompressed."""
    is_zstd = entry.startswith(ZSTD)
    try:
        decompress_executable(entry) if is_zstd else zlib.decompress(entry)
    except zlib.error:
        return is_zstd  # this JAX has no zstandard: the entry is another environment's
    except Exception:
        return False
    return True
