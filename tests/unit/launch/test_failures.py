import json
from pathlib import Path

from anyshard.launch import failures
from anyshard.launch.failures import Failure


def failure(rank=0, time=1.0, message="boom", **more):
    return Failure(**{"time": time, "kind": "RuntimeError", "message": message, "exit_code": 1, "rank": rank, **more})


def test_the_first_cause_is_no_consequence(tmp_path):
    for rank, when, message in ((0, 1.0, "Connection closed by peer"), (1, 3.0, "later"), (2, 2.0, "the cause")):
        record = {"rank": rank, "time": when, "kind": "ValueError", "exit_code": 1, "message": message, "for_people": False}
        (tmp_path / f"rank{rank:05d}.json").write_text(json.dumps({**record, "host": f"n{rank + 1}"}))
    records = failures.read_records(tmp_path)
    cause = failures.first_cause(records)
    assert (cause.rank, cause.host) == (2, "n3")
    assert cause.told(Path("/r/logs")) == "rank 2 failed on n3 (its log: /r/logs/rank00002.log):\nthe cause"
    assert failures.first_cause(records[:1]) is None


def test_a_rank_that_died_without_a_word_is_found_with_its_host():
    spoken = [failure(rank=rank, message="Connection reset by peer") for rank in (0, 1, 3)]
    start = {"world_size": 4, "hosts": ["n1", "n2"]}
    assert failures.silent_rank(spoken, start) == (2, "n2")
    assert failures.silent_rank(spoken, {"world_size": 4}) == (2, None)
    assert failures.silent_rank([], start) is None
    assert failures.silent_rank([*spoken, failure(rank=2)], start) is None


def test_what_a_restart_may_cure():
    assert failure().is_curable
    assert failure(kind="SIGKILL").is_curable
    assert not failure(exit_code=2).is_curable
    assert not failure(exit_code=3).is_curable
    assert not failure(kind="TrainError", for_people=True).is_curable


def test_the_list_of_a_run(tmp_path):
    assert failures.read(tmp_path) == []
    events = [{"event": "commit", "step": 5}, {"event": "commit", "step": 10}]
    written = [failures.append(tmp_path, failure(host="n1"), []), failures.append(tmp_path, failure(), events)]
    assert [each.step for each in written] == [-1, 10]
    with (tmp_path / failures.FILE).open("a") as file:
        file.write('{"time": 1')  # a crash cut it off
    assert failures.read(tmp_path) == written
