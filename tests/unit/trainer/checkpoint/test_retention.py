"""What stays and what goes; a state machine of saves, failures, damage, crashes and clean-ups."""

import json
import math
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest
from helpers.checkpoints import some_values, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from anyshard.trainer.checkpoint.catalog import Found, checkpoint_name, list_checkpoints
from anyshard.trainer.checkpoint.retention import (
    FOREIGN_LEASE_S,
    LEASE,
    YOUNG_S,
    Retention,
    being_written,
    best_of,
    boot_id,
    collect,
    lease,
    make_temporary,
    plan_removal,
    publish,
    remove,
    retain,
    set_aside,
    sibling,
    writer_is_dead,
)

VALUES = {("w", "param"): some_values()["a.bias", "param"]}


def write(directory: Path, step: int) -> Path:
    return write_checkpoint(directory, VALUES, step=step, world_size=1)


@given(st.dictionaries(st.integers(0, 30), st.booleans(), max_size=10), st.integers(0, 4))
def test_plan_keeps_the_newest_sound_ones(sound_by_step: dict[int, bool], keep: int) -> None:
    found = [Found(Path(str(step)), step, None if sound else "damaged") for step, sound in sound_by_step.items()]
    gone = {int(path.name) for path in plan_removal(found, keep)}
    sound = sorted((step for step, is_sound in sound_by_step.items() if is_sound), reverse=True)
    kept = sound[:keep] if keep else sound
    assert not gone & set(kept)
    assert gone >= set(sound) - set(kept)
    assert not gone or len(kept) == keep
    assert all(step < min(kept) for step in gone)


@given(st.dictionaries(st.integers(0, 30), st.booleans(), max_size=10), st.integers(1, 4), st.integers(1, 7))
def test_multiples_of_keep_every_stay_when_they_are_sound(sound_by_step: dict[int, bool], keep: int, keep_every: int) -> None:
    found = [Found(Path(str(step)), step, None if sound else "damaged") for step, sound in sound_by_step.items()]
    fewer, all_ = ({int(path.name) for path in plan_removal(found, keep, every)} for every in (keep_every, 0))
    assert fewer == {step for step in all_ if step % keep_every or not sound_by_step[step]}


def test_the_best_stays_and_damage_or_no_evaluation_does_not_count(tmp_path: Path) -> None:
    losses = {1: 2.5, 2: 1.5, 3: math.nan, 4: None, 5: 1.75, 6: 1.0, 7: 2.0}
    for step, loss in losses.items():
        meta = {} if loss is None else {"evaluation": {"loss": loss}}
        write_checkpoint(tmp_path, VALUES, step=step, world_size=1, meta=meta)
    (tmp_path / checkpoint_name(6) / "rank-00000.bin").write_bytes(b"")
    found = list_checkpoints(tmp_path)
    assert best_of(found, "loss", highest=False) == tmp_path / checkpoint_name(2)
    assert best_of(found, "loss", highest=True) == tmp_path / checkpoint_name(1)
    assert best_of(found, "accuracy", highest=True) is None
    retain(tmp_path, Retention(1, best_metric="loss"))
    assert [each.step for each in list_checkpoints(tmp_path)] == [7, 2]
    retain(tmp_path, Retention(1, best_metric="loss", best_is_highest=True))
    assert [each.step for each in list_checkpoints(tmp_path)] == [7]


def test_keep_every_and_the_best_stay_together(tmp_path: Path) -> None:
    for step in range(1, 8):
        write_checkpoint(tmp_path, VALUES, step=step, world_size=1, meta={"evaluation": {"loss": abs(step - 2)}})
    retain(tmp_path, Retention(2, keep_every=4, best_metric="loss"))
    assert [each.step for each in list_checkpoints(tmp_path)] == [7, 6, 4, 2]


def test_what_is_being_written(tmp_path: Path) -> None:
    assert being_written(tmp_path / "nothing") == []
    living = make_temporary(tmp_path, checkpoint_name(7))
    leave(tmp_path, checkpoint_name(8), boot="an earlier one")
    write(tmp_path, 6)
    assert being_written(tmp_path) == [living]


def leave(directory: Path, name: str, **changes: object) -> Path:
    """A temporary directory as a crash leaves it."""
    path = directory / f"{name}.tmp-{'0' * 32}"
    path.mkdir(parents=True)
    (path / LEASE).write_text(json.dumps({**json.loads(lease()), **changes}))
    return path


def test_a_living_writer_is_not_disturbed(tmp_path: Path) -> None:
    path = leave(tmp_path, "step-00000001")
    assert not writer_is_dead(path)
    assert collect(tmp_path) == []
    assert path.exists()


def test_dead_writers_are_collected(tmp_path: Path) -> None:
    unused = next(pid for pid in range(2**22 - 1, 0, -1) if not psutil.pid_exists(pid))
    for number, changes in enumerate(({"pid": unused}, {"boot": "before"}, {"started": 1.0})):
        assert writer_is_dead(leave(tmp_path, f"step-{number:08d}", **changes)), changes
    assert len(collect(tmp_path)) == 3
    assert list(tmp_path.iterdir()) == []
    assert collect(tmp_path / "none") == []


def test_a_writer_on_another_host_is_given_a_day(tmp_path: Path) -> None:
    path = leave(tmp_path, "step-00000001", host="elsewhere")
    made = path.stat().st_mtime
    assert not writer_is_dead(path, made + FOREIGN_LEASE_S - 1)
    assert writer_is_dead(path, made + FOREIGN_LEASE_S + 1)


@pytest.mark.parametrize("content", [None, "", "[]", '{"host": 1}', '{"host": "h", "boot": "b", "pid": "x", "started": 0}'])
def test_a_directory_without_a_readable_lease_is_given_a_minute(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / f"step-00000001.tmp-{'0' * 32}"
    path.mkdir()
    if content is not None:
        (path / LEASE).write_text(content)
    made = path.stat().st_mtime
    assert not writer_is_dead(path, made + YOUNG_S - 1)
    assert writer_is_dead(path, made + YOUNG_S + 1)


def test_lease_says_who(tmp_path: Path) -> None:
    content = json.loads((make_temporary(tmp_path / "new", "step-00000001") / LEASE).read_text())
    assert content["host"] == socket.gethostname()
    assert content["pid"] == os.getpid()
    assert content["boot"] == boot_id()


def test_only_our_own_names_are_touched(tmp_path: Path) -> None:
    for name in ("step-00000001.tmp-xyz", "mine.tmp-" + "0" * 32, "step-1.trash-" + "0" * 32, "notes"):
        (tmp_path / name).mkdir()
    assert collect(tmp_path) == []


def test_an_unfinished_replacement_is_put_back(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    replaced = sibling(path, "replaced")
    path.rename(replaced)
    assert collect(tmp_path) == [replaced.name]
    assert list_checkpoints(tmp_path)[0].problem is None
    shutil.copytree(path, replaced)
    collect(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_publish_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    old = write(tmp_path, 1)
    (old / "old").touch()
    new = write(tmp_path / "other", 1)
    publish(new, old)
    assert [each.name for each in tmp_path.iterdir() if each.name != "other"] == [old.name]
    assert not (old / "old").exists()


def test_publish_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = write(tmp_path, 1), write(tmp_path / "other", 1)
    (old / "old").touch()

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("anyshard.trainer.checkpoint.retention.sync_directory", fail)
    with pytest.raises(OSError, match="Input/output"):
        publish(new, old)
    assert (old / "old").exists()
    assert new.exists()
    assert [each.name for each in tmp_path.iterdir() if each.name != "other"] == [old.name]


def test_a_removal_that_fails_is_only_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def fail(path: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("anyshard.trainer.checkpoint.retention.remove", fail)
    assert retain(tmp_path, Retention(1)) == []
    assert "could not be removed" in caplog.text


class Directory(RuleBasedStateMachine):
    """Once there was a sound checkpoint there always is one, and never more of them than asked for after a save."""

    @initialize(keep=st.integers(0, 3))
    def start(self, keep: int) -> None:
        self.directory = Path(os.environ["RETENTION_TEST_DIR"]) / os.urandom(8).hex()
        self.directory.mkdir()
        self.keep, self.step, self.good = keep, 0, set[int]()

    def sound(self) -> set[int]:
        return {found.step for found in list_checkpoints(self.directory) if found.problem is None}

    @rule(crash=st.sampled_from(["no", "before commit", "after rename", "in removal"]))
    def save(self, crash: str) -> None:
        self.step += 1
        temporary = make_temporary(self.directory, checkpoint_name(self.step))
        written = write(self.directory / "elsewhere", self.step)
        if crash == "before commit":
            (temporary / LEASE).write_text(json.dumps({**json.loads(lease()), "boot": "before"}))
            shutil.rmtree(self.directory / "elsewhere")
            return
        shutil.rmtree(temporary)
        written.rename(temporary)
        (self.directory / "elsewhere").rmdir()
        publish(temporary, self.directory / checkpoint_name(self.step))
        self.good.add(self.step)
        if crash == "after rename":
            return
        for path in plan_removal(list_checkpoints(self.directory), self.keep):
            self.good.discard(int(path.name[5:]))
            if crash == "in removal":
                path.rename(sibling(path, "trash"))
                return
            remove(path)
        assert not self.keep or len(self.sound()) <= self.keep

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        if len(self.good) > 1:
            step = data.draw(st.sampled_from(sorted(self.good)))
            os.truncate(self.directory / checkpoint_name(step) / "COMMIT", 20)
            self.good.discard(step)

    @rule()
    def save_the_newest_again(self) -> None:
        if self.good:
            path = self.directory / checkpoint_name(max(self.good))
            path.rename(sibling(path, "replaced"))  # the crash between the two renames
            self.clean()

    @rule()
    def clean(self) -> None:
        collect(self.directory)
        assert all(found.path.name.startswith("step-") for found in list_checkpoints(self.directory))
        assert not [path for path in self.directory.iterdir() if "." in path.name]

    @invariant()
    def nothing_good_is_lost(self) -> None:
        if hasattr(self, "good"):
            assert self.good <= self.sound()
            assert not self.good or self.sound()


def test_state_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETENTION_TEST_DIR", str(tmp_path))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Directory, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    names = set_aside(tmp_path, 10)
    assert sorted(name.partition(".abandoned-")[0] for name in names) == [checkpoint_name(20), checkpoint_name(30)]
    assert [each.step for each in list_checkpoints(tmp_path)] == [10]
    collect(tmp_path)
    assert all((tmp_path / name / "COMMIT").exists() for name in names), "nothing is deleted"
    assert set_aside(tmp_path, 10) == set_aside(tmp_path / "nothing", -1) == []
