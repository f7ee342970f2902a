"""The order in which samples are visited: a pure function of (number of samples, seed, position).

Nothing is materialised and nothing is remembered, so resuming at any position costs the same as starting at 0. The
loader asks for the positions of its rank; a checkpoint holds the position of the next global batch and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from anyshard.configs.errors import DataError

# Four rounds make a pseudo-random permutation of a large domain (Luby and Rackoff, 1988). With eight, pairs of samples
# are equally frequent (chi-square) in domains as small as 3 as well.
_NUM_ROUNDS = 8


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash every element to 64 well-mixed bits.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class SampleOrder:
    """An endless sequence of sample indices; every run of `num_samples` positions (an epoch) is a permutation.

    Args:
        num_samples: samples in the dataset.
        seed: another seed gives another order.
        shuffle: False visits 0, 1, 2, ... in every epoch.

    Raises:
        DataError: there are no samples.
    """

    num_samples: int
    seed: int
    shuffle: bool = True
    _side: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("the dataset has no samples: give one whose len() is at least 1.")
        object.__setattr__(self, "_side", isqrt(self.num_samples - 1) + 1)

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Dataset indices of the global sample positions start, ..., start + count - 1."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Dataset indices of these global sample positions.

        Shape: positions [N] int64, all >= 0; returns [N] int64.
        """
        epochs, within = np.divmod(positions, self.num_samples)
        if not self.shuffle:
            return within
        seed = np.array([self.seed % 2**64], dtype=np.uint64)
        keys = mix64(mix64(seed) ^ epochs.astype(np.uint64))
        index = self._permute(within.astype(np.uint64), keys)
        # The permutation is of side**2 >= num_samples values. Following it until it comes back below num_samples
        # makes it one of num_samples values (cycle walking: Black and Rogaway, CT-RSA 2002); few elements need it.
        outside = np.flatnonzero(index >= self.num_samples)
        while outside.size:
            index[outside] = self._permute(index[outside], keys[outside])
            outside = outside[index[outside] >= self.num_samples]
        return index.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A keyed permutation of range(side**2), element by element: a Feistel network on the two base-`side` digits."""
        side = np.uint64(self._side)
        left, right = np.divmod(values, side)
        for step in range(_NUM_ROUNDS):
            noise = mix64(keys + right + np.uint64(step << 56))
            left, right = right, (left + noise % side) % side
        return left * side + right
