"""Checkpoints of state on a drive: any tier, stage and dp goes on from any other, bit for bit."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks
from helpers.swapping import LARGE_ENOUGH, on_drive

pytestmark = pytest.mark.dist

STEPS = ["train.max_steps=6", "train.log_every_steps=1", "train.eval_samples=0", "checkpoint.every_steps=0"]
TIERS = {
    "none-z2": ("none", ["zero=z2"]),
    "none-z3": ("none", ["zero=z3"]),
    "cpu-z2": ("cpu", ["zero=z2"]),
    "cpu_param-z3": ("cpu_param", ["zero=z3"]),
    "nvme": ("nvme", []),
    "nvme-none": ("nvme", ["offload.overlap=none"]),
    "nvme_param": ("nvme_param", []),
    "param-alone": ("nvme_param", ["offload.optimizer=cpu"]),
}


def _life(overrides, run_dir):
    """On a rank: train, and give the digests of the whole state after the restore and at the end."""
    from helpers.checkpoint_engines import logical_state, model_digest

    from anyshard import compose, fit
    from anyshard.trainer import fit as module
    from anyshard.trainer.stop import Signals

    seen, whole = {}, module.Trainer

    class Watched(whole):
        def run(self):
            seen["before"] = (logical_state(self.engine.ds), model_digest(self.engine.ds))
            outcome = super().run()
            seen["after"] = (logical_state(self.engine.ds), model_digest(self.engine.ds))
            return outcome

    module.Trainer = Watched
    try:
        outcome = fit(compose(["debug=smoke", *overrides, f"run.dir={run_dir}"]), signals=Signals())
    finally:
        module.Trainer = whole
    return seen | {"checkpoint": str(outcome.checkpoint), "loss": outcome.loss}


def _train(tmp_path, name, dp, *more):
    offload, options = TIERS[name]
    overrides = [*on_drive(offload, tmp_path / "drive"), *STEPS, *options, f"launch.procs_per_node={dp}", *more]
    if offload == "none" or offload.startswith("cpu"):
        overrides = [*LARGE_ENOUGH, *STEPS, f"offload={offload}", *options, f"launch.procs_per_node={dp}", *more]
    folder = tmp_path / f"{name}-{dp}-{len(list(tmp_path.iterdir()))}"
    return run_ranks(_life, dp, overrides=overrides, run_dir=str(folder))[0]


PAIRS = [((one, dp), (other, 3 - dp)) for one in TIERS for other in TIERS if one < other for dp in (1, 2)]
PAIRS = [pair for pair in PAIRS if any("nvme" in name or "param-alone" in name for name, _ in pair)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_every_tier_goes_on_from_every_other(tmp_path, first, second):
    """Two steps under one tier, two more under another that goes on from there, and back."""
    begun = _train(tmp_path, *first, "stop.at_step=2")
    moved = _train(tmp_path, *second, "stop.at_step=4", f"resume={begun['checkpoint']}")
    assert moved["before"] == begun["after"]
    back = _train(tmp_path, *first, "stop.at_step=5", f"resume={moved['checkpoint']}")
    assert back["before"] == moved["after"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["nvme", "nvme-none", "nvme_param", "param-alone"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    whole = _train(tmp_path, name, 2)
    begun = _train(tmp_path, name, 2, "stop.at_step=3")
    resumed = _train(tmp_path, name, 2, f"resume={begun['checkpoint']}")
    assert resumed["after"] == whole["after"]
    assert resumed["loss"] == whole["loss"]
