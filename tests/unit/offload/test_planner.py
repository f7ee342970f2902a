"""Placements: their times, which one is taken, and why the others are not."""

from __future__ import annotations

import pytest

from anyshard.offload.measured import Rates
from anyshard.offload.planner import GIB, Candidate, Work, choose, step_parts

RATES = Rates(read_bytes_per_s=2e9, write_bytes_per_s=1e9, adam_elements_per_s=1e8, device_copy_bytes_per_s=1e10)
WORK = Work(compute_s=1.0, elements=10**8, part_bytes=2 * 10**8, micro_steps=4, num_states=2)


@pytest.mark.parametrize(
    ("overlap", "seconds"),
    [("none", 1.0 + 0.6 + 1.2), ("read", 1.0 + 1.2), ("write", 1.2 + 0.6), ("both", 1.8)],
)
def test_a_drive_does_one_thing_at_a_time(overlap, seconds):
    """12 bytes of each of 1e8 elements: 0.6 s to read, 1.2 s to write, 1 s to step."""
    assert step_parts(WORK, RATES, optimizer="nvme", param="none", overlap=overlap)["optimizer"] == pytest.approx(seconds)


def test_what_each_tier_adds():
    def parts(optimizer, param):
        return step_parts(WORK, RATES, optimizer=optimizer, param=param, overlap="both")

    assert parts("none", "none") == {"compute": 1.0}
    assert parts("cpu", "none") == pytest.approx({"compute": 1.0, "optimizer": 1.0, "gradients and weights": 0.04})
    assert parts("cpu", "cpu")["parameters"] == 0  # 0.16 s, beside 1 s of computing
    assert parts("nvme", "nvme")["parameters"] == pytest.approx(8 * 0.1 + 0.2)
    shared = Work(1.0, 10**8, 2 * 10**8, 4, 2, ranks_per_drive=2)
    assert step_parts(shared, RATES, optimizer="nvme", param="none", overlap="both")["optimizer"] == pytest.approx(3.6)


def _candidate(name, needs, seconds, refusal=""):
    return Candidate(name, "cpu", "none", needs, {"compute": seconds}, refusal)


def test_the_fastest_that_fits_and_why_the_others_lost():
    candidates = [
        _candidate("none", {"device": 9.0 * GIB}, 1.0),
        _candidate("cpu", {"device": 2.0 * GIB, "host": 4.0 * GIB}, 2.0),
        _candidate("cpu_param", {"device": 1.0 * GIB, "host": 5.0 * GIB}, 2.0),
        _candidate("nvme", {"device": 2.0 * GIB, "drive": 1.0}, 3.0),
        _candidate("nvme_param", {}, 0.0, refusal="no drive"),
    ]
    choice = choose(candidates, {"device": 3.0 * GIB, "host": 6.0 * GIB})
    assert choice.best is candidates[1]
    assert choice.lost == {
        "none": "9.00 GiB on the device, where there are 3.00",
        "cpu_param": "no faster than offload=cpu, which moves less",
        "nvme": "50 % slower",
        "nvme_param": "no drive",
    }
    assert "chosen" in choice.lines()[1]
    assert "not taken: 50 % slower" in choice.lines()[3]


def test_nothing_fits():
    choice = choose([_candidate("none", {"device": 2.0}, 1.0)], {"device": 1.0})
    assert choice.best is None
    assert list(choice.lost) == ["none"]
