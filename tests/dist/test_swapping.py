"""Training with state on a drive: the same losses, files that are there while it runs and gone afterwards."""

from __future__ import annotations

import json

import pytest
from helpers.fitting import curve
from helpers.swapping import LARGE_ENOUGH, on_drive

pytestmark = pytest.mark.dist

CELLS = [
    (offload, dp, more)
    for offload in ("nvme", "nvme_param")
    for dp in (1, 2)
    for more in (
        (),
        ("offload.overlap=none",),
        ("offload.overlap=read", "train.activation_checkpointing=true"),
        ("offload.overlap=write", "offload.param=cpu"),
        ("optimizer=lion", "optimizer.lr=1e-3"),
    )
    if not ("optimizer=lion" in more and offload == "nvme_param")
]
CELLS += [("nvme_param", dp, ("offload.optimizer=cpu",)) for dp in (1, 2)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    found = {}

    def of(more):
        options = tuple(option for option in more if option.startswith("optimizer"))
        if options not in found:
            found[options] = curve(tmp_path_factory.mktemp("none"), [*LARGE_ENOUGH, "zero=z1", *options], 1)
        return found[options]

    return of


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("offload", "dp", "more"), CELLS, ids=str)
def test_losses_do_not_depend_on_the_tier(tmp_path, reference, offload, dp, more):
    drive = tmp_path / "drive"
    overrides = on_drive(offload, drive, *more, f"launch.procs_per_node={dp}")
    assert curve(tmp_path / "run", overrides, dp) == pytest.approx(reference(more), rel=1e-5)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "offload"]
    assert told["nvme_bytes"] > 2**20
    assert not list((drive / "anyshard-swap").iterdir())
