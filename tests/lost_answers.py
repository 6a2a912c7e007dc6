"""A connection that is lost while a server answers."""

from __future__ import annotations

from bench.counting import Counter


class Cut(Counter):
    """Passes everything on until `n_left` more pieces of answers came; None: for ever."""

    n_left: int | None = None

    def allowed(self, data: bytes) -> bytes:
        if self.n_left is not None:
            if self.n_left == 0:
                raise ConnectionError
            self.n_left -= 1
        return data
