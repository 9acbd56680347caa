"""Reads the small files of a model's directory, and says of an unreadable one what to do."""

import json
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"


def is_there(path: Path) -> bool:
    """Whether a file has that name, even as a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def check_readable(path: Path) -> None:
    """Raise an error with a remedy unless the file is there and is what its name says.

    Raises:
        FileNotFoundError: there is no such file, or its symbolic link leads nowhere.
        ValueError: it is the pointer that Git-LFS leaves in place of a large file.
        OSError: it cannot be opened.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {path.readlink()}, which is not there: an unfinished download; "
            f"download the model again"
        )
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its "
                f"repository, or download it again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: it holds no JSON, no object, or a key twice with different values.
        OSError: as `check_readable`.
    """
    check_readable(path)
    data = path.read_bytes()
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {value!r:.80}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object's dict; Python's own would silently keep the last of two values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} twice, as {found[key]!r:.80} and {value!r:.80}")
        found[key] = value
    return found
