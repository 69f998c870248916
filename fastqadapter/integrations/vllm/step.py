"""What the layers of a model look at while a step runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastqadapter.integrations.vllm.rows import QRows


class Step:
    """One for each model. Between steps it is empty."""

    def __init__(self, adapters: int, dtype: torch.dtype, device: torch.device) -> None:
        self.adapters = adapters
        self.tokens = 0  # N, padding included
        self.rows: QRows | None = None
        self.dtype, self.device = dtype, device  # of masks
        self._columns: dict[tuple[int, ...], Tensor] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @contextlib.contextmanager
    def running(self, tokens: int, rows: QRows | None) -> Iterator[None]:
        self.tokens, self.rows = tokens, rows
        try:
            yield
        finally:
            self.tokens, self.rows = 0, None
            self._masks.clear()

    def mask(self, columns: tuple[int, ...]) -> Tensor | None:
        """(R, columns): 1 where a column is of the adapter of the row; None where all are."""
        if self.adapters == 1:
            return None
        if columns not in self._masks:
            self._masks[columns] = self._new_mask(columns)
        return self._masks[columns]

    def _new_mask(self, columns: tuple[int, ...]) -> Tensor:
        assert self.rows is not None
        if columns not in self._columns:
            self._columns[columns] = torch.tensor(columns, device=self.device)
        return (self.rows.adapters[:, None] == self._columns[columns]).to(self.dtype)
