"""Reads the JSON files of public data sets, with errors that name the problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.contract.errors import DataError

__all__ = ["picture", "read_json", "rows"]


def read_json(path: Path) -> Any:
    """Reads and parses a JSON file. Raises `DataError`."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data file {path} is not valid JSON ({error}); download it again"
        ) from None


def rows(data: object, key: str, path: Path) -> list[Any]:
    """Returns the list under `key` of a JSON object, or `data` itself if `key` is
    empty. Raises `DataError`.
    """
    found = data.get(key) if isinstance(data, dict) else data if not key else None
    if not isinstance(found, list):
        raise DataError(f"{path} has no list {key or 'of rows'!r}; check that it is the right file")
    return found


def picture(folder: Path, name: str) -> Path:
    """Returns the path of an existing image in a folder. Raises `ValueError`."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"image {path} does not exist")
    return path
