"""From a position in the sample order to the micro-batches of this rank; the next ones are made in the background.

The loader keeps no state of its own: `step(position)` gives the same batches whenever and wherever it is called, so a
checkpoint holds the position alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from anyshard.trainer.batch import BatchPlan
from anyshard.trainer.data.order import SampleOrder

Batch = dict[str, torch.Tensor]
_ORDER_BLOCK = 1024  # positions whose order is computed at once
_AHEAD = 32  # samples that the background thread makes at once: waking it for each small batch costs more than the batch


class MapDataset(Protocol):
    """Any dataset with a length and samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def collate_tokens(samples: Sequence[dict[str, NDArray[Any]]]) -> Batch:
    """Stack samples of equal keys and shapes.

    Shape: B samples of [S] each -> [B, S] of the same dtype.
    """
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


class Loader:
    """The micro-batches of one data-parallel rank.

    Args:
        dataset: any map-style dataset.
        collate: list of samples -> dict of tensors.
        order: which sample is at which global position.
        batch: sizes of the global and the micro batch.
        dp_rank: this rank among the data-parallel ones; tp, pp and sp peers give the same.
        device: where the tensors go.
        prefetch: make what comes next on a background thread meanwhile, one global batch or as many as have 32 samples here.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        collate: Callable[[list[Any]], Batch],
        order: SampleOrder,
        batch: BatchPlan,
        dp_rank: int,
        device: torch.device | str,
        prefetch: bool = True,
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._order = order
        self._global_batch_size = batch.global_batch_size
        self._device = torch.device(device)
        # position of sample k of micro-step j inside the global batch: j*(dp*micro) + dp_rank*micro + k
        grid = np.arange(batch.global_batch_size).reshape(batch.accumulation_steps, batch.dp, batch.micro_batch_size)
        self._offsets: NDArray[np.int64] = grid[:, dp_rank]
        self._block: tuple[int, NDArray[np.int64]] = (0, np.empty((0, *self._offsets.shape), dtype=np.int64))
        # a dataset that gathers a whole batch itself does so faster than sample by sample
        self._gather = getattr(dataset, "batch", None) if collate is collate_tokens else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="anyshard-loader") if prefetch else None
        self._ahead = max(_AHEAD // self._offsets.size, 1)
        self._ready: deque[list[Batch]] = deque()
        self._ready_at = 0  # the position of the first of them
        self._pending: tuple[int, Future[list[list[Batch]]]] | None = None

    def step(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at the global sample position `position`.

        Raises:
            Exception: whatever the dataset or collate raised.
        """
        if not self._ready or position != self._ready_at:
            self._refill(position)
        batches = self._ready.popleft()
        self._ready_at = position + self._global_batch_size
        if self._device.type == "cpu":
            return batches
        return [{name: value.to(self._device, non_blocking=True) for name, value in batch.items()} for batch in batches]

    def _refill(self, position: int) -> None:
        """Take over what was made in the background, or make one batch now; then let the next ones be made."""
        pending, self._pending = self._pending, None
        self._ready.clear()
        self._ready.extend(pending[1].result() if pending is not None and pending[0] == position else [self._make(position)])
        if self._pool is not None:
            following = position + len(self._ready) * self._global_batch_size
            self._pending = (following, self._pool.submit(self._make_ahead, following))

    def close(self) -> None:
        """End the background thread; what it has made is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pending = None
        self._ready.clear()

    def _make_ahead(self, position: int) -> list[list[Batch]]:
        """Several global batches; fewer when one fails, so that its error comes out at its own step."""
        made: list[list[Batch]] = []
        try:
            for number in range(self._ahead):
                made.append(self._make(position + number * self._global_batch_size))
        except Exception:
            if not made:
                raise
        return made

    def _make(self, position: int) -> list[Batch]:
        indices = self._indices(position)
        if self._gather is None:
            batches = [self._collate([self._dataset[index] for index in row.tolist()]) for row in indices]
        else:
            columns = {name: torch.from_numpy(column) for name, column in self._gather(indices.ravel()).items()}
            parts = [torch.split(column, indices.shape[1]) for column in columns.values()]
            batches = [dict(zip(columns, part, strict=True)) for part in zip(*parts, strict=True)]
        if self._device.type == "cuda":  # pinned here, so that the copy in step() does not wait for the host
            batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
        return batches

    def _indices(self, position: int) -> NDArray[np.int64]:
        """Dataset indices of this rank's micro-batches, made for many steps at once: 8 cost nearly as much as 1000.

        Shape: returns [accumulation_steps, micro_batch_size].
        """
        start, block = self._block  # read once: a seek may replace it while the background thread is here
        step, rest = divmod(position - start, self._global_batch_size)
        if rest or not 0 <= step < len(block):
            starts = position + self._global_batch_size * np.arange(max(_ORDER_BLOCK // self._offsets.size, 1))
            block = self._order.at((starts[:, None, None] + self._offsets).ravel()).reshape(-1, *self._offsets.shape)
            self._block, step = (position, block), 0
        indices: NDArray[np.int64] = block[step]
        return indices
