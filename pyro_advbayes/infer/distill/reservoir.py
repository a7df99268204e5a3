"""A bounded uniform sample of a stream of draws: :class:`Reservoir`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.infer.autoguide.rows import Rows
from pyro_advbayes.model.structure import Site


class Reservoir(Rows):
    """
    A uniform sample, without replacement, of all rows added so far (Vitter's algorithm R, 1985): the first rows fill it; later the t-th
    row replaces a random one with probability capacity/t.

    :param capacity: maximal number of rows, >= 1.
    """

    changing = True

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        super().__init__(sites, dtype, device, "the chains")
        self.seen = 0
        self._rows = torch.empty(capacity, self.size, dtype=dtype, device=device)

    def __len__(self) -> int:
        return min(self.seen, len(self._rows))

    def add(self, rows: Tensor) -> None:
        """Adds rows ``[n, P]``."""
        for row in rows:
            self.seen += 1
            place = self.seen - 1 if self.seen <= len(self._rows) else int(torch.randint(self.seen, ()))
            if place < len(self._rows):
                self._rows[place] = row

    def take(self, index: Tensor) -> Tensor:
        return self._rows[index.to(self.device)]

    def state(self) -> dict[str, Any]:
        """What :meth:`load` restores."""
        return {"rows": self._rows[: len(self)], "seen": self.seen}

    def load(self, state: Mapping[str, Any]) -> None:
        """
        Restores a :meth:`state` of a reservoir of the same capacity.

        :raises ValueError: if it is anything else.
        """
        rows, seen = state["rows"], state["seen"]
        if not isinstance(seen, int) or seen < 0 or rows.shape != (min(seen, len(self._rows)), self.size):
            raise ValueError(f"{list(rows.shape)} draws are kept of {seen}, where the capacity is {len(self._rows)}")
        self._rows[: len(rows)], self.seen = rows, seen
