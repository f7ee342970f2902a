"""The plan of ranks that were started by hand."""

from __future__ import annotations

import json
import os

from anyshard.configs.compose import compose
from anyshard.configs.frozen import freeze, load_frozen
from anyshard.trainer.planning import counted_flops_per_token, planned_flops_per_token, start_planning


def frozen(tmp_path, *overrides):
    run = tmp_path / "run"
    freeze(compose(["debug=smoke", "launch.procs_per_node=1", f"run.dir={run}", *overrides]), [], run)
    return run


def test_a_run_is_planned_once_and_anew_when_its_configuration_is_younger(tmp_path):
    run = frozen(tmp_path)
    planning = start_planning(run)
    flops = planned_flops_per_token(run, planning)
    assert flops == json.loads((run / "plan.json").read_text())["flops_per_token"] > 1e5
    assert start_planning(run) is None
    assert planned_flops_per_token(run, None) == flops
    os.utime(run / "plan.json", (1, 1))
    again = start_planning(run)
    assert again is not None
    assert planned_flops_per_token(run, again) == flops


def test_a_plan_that_fails_is_no_plan_not_even_an_old_one(tmp_path, caplog):
    run = frozen(tmp_path)
    (run / "plan.json").write_text('{"flops_per_token": 7}')
    os.utime(run / "plan.json", (1, 1))
    (run / "config.yaml").write_text("nonsense: true\n")
    assert planned_flops_per_token(run, start_planning(run)) is None
    assert "there is no plan, and so no perf/mfu_pct" in caplog.text


def test_the_library_counts_what_the_planner_does(tmp_path):
    run = frozen(tmp_path)
    assert counted_flops_per_token(load_frozen(run)) == planned_flops_per_token(run, start_planning(run))
