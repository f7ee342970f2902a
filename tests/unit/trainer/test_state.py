import json
import random

import numpy as np
import torch

from anyshard.trainer.state import Progress, RngMark, derived_seed, load_rng_state, rng_state, seed_everything


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_generators_continue_where_they_were_saved():
    seed_everything(1, "test")
    draw()
    state = json.loads(json.dumps(rng_state()))  # as a checkpoint stores it
    expected = [draw() for _ in range(3)]
    seed_everything(2)
    load_rng_state(state)
    assert [draw() for _ in range(3)] == expected


def test_seeds_depend_on_every_part():
    seeds = {derived_seed(1, "train", 0), derived_seed(1, "train", 1), derived_seed(2, "train", 0), derived_seed(1, "model", 0)}
    assert len(seeds) == 4
    assert derived_seed(1, "train", 0) == derived_seed(1, "train", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_progress_is_plain_json():
    assert Progress(step=3, samples=96, tokens=49152, evaluation={"loss": 2.5}).to_meta() == {
        "step": 3,
        "samples": 96,
        "tokens": 49152,
        "evaluation": {"loss": 2.5},
    }


def test_going_back_to_a_mark_repeats_the_same_numbers():
    mark = RngMark()
    first = draw()
    assert draw() != first
    mark.go_back()
    assert draw() == first
