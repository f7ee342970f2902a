from anyshard.trainer.evaluate import spread


def test_indices_are_spread_evenly():
    assert spread(4, 100) == [0, 25, 50, 75]
    assert spread(3, 10) == [0, 3, 6]


def test_a_short_split_is_taken_whole():
    assert spread(1000, 5) == [0, 1, 2, 3, 4]


def test_nothing_of_nothing():
    assert spread(0, 5) == spread(5, 0) == []
