from __future__ import annotations

import pytest

from anyshard.configs.errors import ConfigError
from anyshard.configs.overrides import check_overrides, expand_sweep, split_searchpath

CHOICES = {"zero": ["z0", "z1", "z2", "z3"], "model": ["tiny"], "experiment": ["quick"], "extras": ["more"]}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("zero=z3", "zero=z3"),
        ("+experiment=quick", "experiment=quick"),
        ("extras=more", "+extras=more"),
        ("zero=null", "~zero"),
        ("zero.stage=3", "++zero.stage=3"),
        ("+zero.stage=3", "++zero.stage=3"),
        ("deepspeed_extra.a.b=1", "++deepspeed_extra.a.b=1"),
        ("callbacks.profiler={steps: 3}", "++callbacks.profiler={steps: 3}"),
        ("zero={stage: 3}", "++zero={stage: 3}"),
        ("~callbacks.profiler", "~callbacks.profiler"),
        ("data.path=~/a=b", "++data.path='~/a=b'"),
        ("run.dir=a(b)", "++run.dir='a(b)'"),
    ],
)
def test_right_overrides_reach_hydra_in_a_form_it_takes(override: str, line: str) -> None:
    assert check_overrides([override], CHOICES) == ([line], [])


@pytest.mark.parametrize("override", ["local=null", "~local", "debug=null"])
def test_choosing_nothing_where_there_is_nothing_is_no_error(override: str) -> None:
    assert check_overrides([override], CHOICES) == ([], [])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("zero=3", "zero=3: there is no such choice. Did you mean zero=z3? There are: z0, z1, z2, z3."),
        ("local=mine", "local=mine: there is no such choice."),
        ("zer/x=3", "zer/x=3: there is no such group. Did you mean zero?"),
        ("zero.stge=3", "zero.stge=3: there is no such key. Did you mean zero.stage?"),
        ("zero={stge: 3}", "zero.stge=3: there is no such key. Did you mean zero.stage?"),
        ("xyzzy=3", "xyzzy=3: there is no such key. 'anyshard config explain' lists all keys."),
        ("zero.stage.x=1", "zero.stage holds a single value. Set zero.stage itself: integer."),
        ("train=4", "this is a group of keys. Set one of them: train.max_steps, "),
        ("train.max_steps=1,2", "it names several values."),
        ("hydra.run.dir=x", "Use run.dir for the run directory"),
        ("train.max_steps 5", "this is not an override. Write KEY=VALUE"),
        ("optimizer.lr=a(b", "it cannot be read"),
    ],
)
def test_wrong_overrides_say_why_and_what_instead(override: str, said: str) -> None:
    good, problems = check_overrides([override], CHOICES)
    assert good == []
    assert said in "".join(map(str, problems))


def test_all_wrong_overrides_are_told_and_the_right_ones_kept() -> None:
    good, problems = check_overrides(["zero=3", "seed=1", "sed=2"], CHOICES)
    assert good == ["++seed=1"]
    assert [problem.key for problem in problems] == ["zero", "sed"]


def test_a_sweep_is_all_combinations() -> None:
    jobs = expand_sweep(["zero=glob(*,exclude=[z0,z3])", "seed=1,2", "train.max_steps=5"], CHOICES)
    assert jobs == [
        ["zero=z1", "seed=1", "train.max_steps=5"],
        ["zero=z1", "seed=2", "train.max_steps=5"],
        ["zero=z2", "seed=1", "train.max_steps=5"],
        ["zero=z2", "seed=2", "train.max_steps=5"],
    ]


def test_a_sweep_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an override"):
        expand_sweep(["seed 1"], CHOICES)


def test_searchpath_is_taken_out() -> None:
    assert split_searchpath(["seed=1", "hydra.searchpath=[file:///a,pkg://b]"]) == (["seed=1"], ["file:///a", "pkg://b"])


@pytest.mark.parametrize("override", ["hydra.searchpath=/a", "hydra.searchpath=[1]", "hydra.searchpath=[a"])
def test_a_searchpath_that_is_no_list_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.searchpath"):
        split_searchpath([override])
