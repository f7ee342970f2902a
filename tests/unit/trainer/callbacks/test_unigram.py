import math

import numpy as np
import pytest

from anyshard.trainer.callbacks.unigram import unigram_loss


def test_uniform_counts_give_the_log_of_the_vocabulary():
    assert unigram_loss(np.full(8, 100), np.full(8, 5)) == pytest.approx(math.log(8))


def test_it_is_the_entropy_where_both_splits_agree():
    counts = np.array([3_000_000, 1_000_000])
    assert unigram_loss(counts, counts) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-5)


def test_an_unseen_token_is_finite():
    assert math.isfinite(unigram_loss(np.array([10, 0]), np.array([0, 1])))
