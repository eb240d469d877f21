"""Keys and values of one sequence on the GPU. All layers are in one block, so that a
single two-dimensional copy moves rows of every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from runtime.contract.spec import DecoderSpec
from runtime.engines.tensorrt.cuda import Device, Memory, aligned

__all__ = ["Caches", "Rows"]

_HALF = 2  # bytes of a float16


class Rows:
    """Memory for the keys and values [2*layers, KV, rows, D] float16 of up to `most`
    rows; the layout uses only as much of it as `rows` rows need.

    Tensors begin at aligned addresses. If no padding is needed between them, all heads
    of all layers are evenly spaced.
    """

    def __init__(self, device: Device, spec: DecoderSpec, most: int, what: str) -> None:
        self._spec, self.names, self.most = spec, spec.cache_names, most
        self.memory: Memory = device.allocate(
            len(self.names) * self._stride(most), f"{what} of {most} rows"
        )
        self.rows = most

    def _stride(self, rows: int) -> int:
        return aligned(self._spec.kv_heads * self.pitch(rows))

    def pitch(self, rows: int) -> int:
        """Returns the bytes from one head to the next in tensors of that many rows."""
        return rows * self.row

    @property
    def row(self) -> int:
        """Bytes of one row of one head."""
        return self._spec.head_dim * _HALF

    def fit(self, rows: int) -> None:
        """Lays out the tensors for that many rows each."""
        assert 0 < rows <= self.most, f"{rows} rows do not fit {self.most}"
        self.rows = rows

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Yields each cache's name and the address of its tensor."""
        for index, name in enumerate(self.names):
            yield name, self.memory.address + index * self._stride(self.rows)

    @property
    def packed(self) -> bool:
        """True if there is no padding between the tensors."""
        return self._stride(self.rows) == self._spec.kv_heads * self.pitch(self.rows)


class Caches(Rows):
    """The key/value caches. They are zeroed when created: rows that are not attended to
    are masked, but masking does not remove a NaN in them.
    """

    def __init__(
        self, device: Device, spec: DecoderSpec, rows: int, what: str = "the key/value caches"
    ) -> None:
        super().__init__(device, spec, rows, what)
        self._device, self._spoilt = device, rows
        device.zero(self.memory)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of each cache, [B, KV, C, D]."""
        return (1, self._spec.kv_heads, self.rows, self._spec.head_dim)

    def mark_nonfinite(self, start: int) -> None:
        """Marks rows from `start` on as possibly non-finite, after a call whose logits
        were non-finite.
        """
        self._spoilt = min(self._spoilt, start)

    def clear_nonfinite(self, start: int) -> None:
        """Queues zeroing the rows from `start` on, which a call is about to write, if
        the marked rows begin there or later.

        Marked rows before `start` stay, so that a call that attends to them reports
        them.
        """
        if start <= self._spoilt < self.rows:
            width = (self.rows - start) * self.row
            for _, address in self.addresses():
                self._device.zero_rows(
                    (address + start * self.row, self.pitch(self.rows)), width, self._spec.kv_heads
                )
            self._spoilt = self.rows

    def take(self, source: Rows, at: int, start: int, count: int) -> None:
        """Queues a copy of `count` rows of another block, from its row `at`, to the
        rows from `start` on.
        """
        heads, pairs = (
            self._spec.kv_heads * len(self.names),
            [(self.memory.address, source.memory.address)],
        )
        if not (self.packed and source.packed):
            heads = self._spec.kv_heads
            pairs = [
                (to, origin)
                for (_, to), (_, origin) in zip(self.addresses(), source.addresses(), strict=True)
            ]
        for to, origin in pairs:
            target = (to + start * self.row, self.pitch(self.rows))
            self._device.rows(
                target, (origin + at * self.row, source.pitch(source.rows)), count * self.row, heads
            )
