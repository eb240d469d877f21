"""Image embeddings kept for the next question on the same image: in memory, and on
disk for the next process.

An entry is known by the image's hash, the bundle's and the pool size. Files are
written whole or not at all, carry their own hash, and are numbers only; a damaged one
is thrown away. Both stores drop what was used longest ago when they outgrow their
bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import cache_folder
from runtime.contract.image import MAX_PIXELS

__all__ = ["DISK_BYTES", "EmbeddedImage", "ImageEmbeddingCache"]

MEMORY_BYTES, DISK_BYTES = 64 << 20, 256 << 20
_RECIPE = 1  # part of every name: raise it when a image's pixels, or what is stored, change
_DIGEST = 32
_HEADER = 16  # width and height of the image, 8 bytes each


@dataclass(frozen=True)
class EmbeddedImage:
    """Image embeddings [T, H] float32, and the (width, height) in pixels of the image
    they are of.
    """

    embeds: NDArray[np.float32]
    size: tuple[int, int]


class ImageEmbeddingCache:
    """See the module docstring. `identity` names the bundle; `disk` is the folder's
    size limit in bytes, 0 for no disk cache.
    """

    def __init__(
        self, identity: str, hidden: int, memory: int = MEMORY_BYTES, disk: int = 0
    ) -> None:
        self._identity, self._hidden, self._memory, self._disk = identity, hidden, memory, disk
        self._entries: OrderedDict[str, EmbeddedImage] = OrderedDict()
        self._folder = cache_folder() / "images"

    def _name(self, image: str, p: int) -> str:
        return hashlib.sha256(f"{_RECIPE}:{self._identity}:{image}:{p}".encode()).hexdigest()

    def get(self, image: str, p: int) -> EmbeddedImage | None:
        """The embeddings of a image (by its hash) at pool size p, if they are there."""
        name = self._name(image, p)
        found = self._entries.get(name) or self._read(name, p)
        if found:
            self._remember(name, found)
        return found

    def put(self, image: str, p: int, embedded: EmbeddedImage) -> None:
        """Stores embeddings. A failed write to disk is ignored, since it only costs
        time later.
        """
        name = self._name(image, p)
        self._remember(name, embedded)
        if self._disk:
            with contextlib.suppress(OSError):
                self._write(name, embedded)

    def clear(self) -> None:
        """Empties the cache in memory; files on disk stay."""
        self._entries.clear()

    def _remember(self, name: str, embedded: EmbeddedImage) -> None:
        self._entries[name] = embedded
        self._entries.move_to_end(name)
        while (
            len(self._entries) > 1
            and sum(entry.embeds.nbytes for entry in self._entries.values()) > self._memory
        ):
            self._entries.popitem(last=False)

    def _read(self, name: str, p: int) -> EmbeddedImage | None:
        path, expected = self._folder / name, _DIGEST + _HEADER + 4 * p * p * self._hidden
        if not self._disk:
            return None
        try:
            with path.open("rb") as file:
                data = file.read(expected + 1)
            if len(data) != expected or hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except OSError:
            return None
        width, height = (int(side) for side in np.frombuffer(data, "<u8", 2, _DIGEST))
        embeds = np.frombuffer(data, "<f4", -1, _DIGEST + _HEADER).reshape(p * p, self._hidden)
        if not 0 < width * height <= MAX_PIXELS or not np.isfinite(embeds).all():
            return None
        return EmbeddedImage(embeds, (width, height))

    def _write(self, name: str, embedded: EmbeddedImage) -> None:
        body = (
            np.array(embedded.size, "<u8").tobytes()
            + np.ascontiguousarray(embedded.embeds, "<f4").tobytes()
        )
        if _DIGEST + len(body) > self._disk:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
            try:
                file.write(hashlib.sha256(body).digest() + body)
                file.close()
                os.replace(file.name, self._folder / name)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        self._trim()

    def _trim(self) -> None:
        """Removes the least recently used files; another process may be doing the same."""
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                info = path.stat()
                files.append((info.st_mtime_ns, info.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._disk:
                break
            path.unlink(missing_ok=True)
            total -= size
