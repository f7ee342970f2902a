"""What can go wrong with a save or a restore, on real ranks: the same error everywhere, nothing lost, nobody hangs."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.checkpoint_engines import Layout, engine_of, logical_state, manager, scrambled_llama, tiny_llama, train
from helpers.hardware import needs_fp16
from helpers.ranks import RanksError, run_ranks

pytestmark = pytest.mark.dist

Z2 = Layout(2, 2)
Z3 = Layout(2, 3)


def error_of(action: Any) -> str | None:
    """The message of the CheckpointError that it raises."""
    from anyshard.configs.errors import CheckpointError

    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def save_steps(layout: Layout, directory: str, steps: list[int], keep: int = 0) -> dict[str, Any]:
    with engine_of(layout) as engine:
        made, states = manager(Path(directory), keep=keep), {}
        for step in steps:
            train(engine, step, 1)
            made.save(engine, step=step, meta={"step": step}, rank_meta={})
            states[step] = logical_state(engine)
        return states


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- full and failing disks


def save_with_fault(layout: Layout, directory: str, call: str, number: int, code: int, rank: int) -> dict[str, Any]:
    """Save step 1, then step 2 while the given call of `os` fails on one rank, then step 3."""
    import torch.distributed as dist

    with engine_of(layout) as engine:
        made = manager(Path(directory))
        train(engine, 0, 1)
        made.save(engine, step=1, meta={}, rank_meta={})
        train(engine, 1, 1)
        real, calls = getattr(os, call), 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with mock.patch.object(os, call, failing if dist.get_rank() == rank else real):
            error = error_of(lambda: made.save(engine, step=2, meta={}, rank_meta={}))
        dist.barrier()
        left = names_in(Path(directory))
        events = [kind for kind, _ in made.events]
        train(engine, 2, 1)
        made.save(engine, step=3, meta={}, rank_meta={})
        return {"error": error, "left": left, "found": str(made.find("auto")), "events": events}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("call", "number", "code", "rank"),
    [
        ("posix_fallocate", 1, errno.ENOSPC, 1),  # the space for the data
        ("posix_fallocate", 2, errno.ENOSPC, 0),  # for the manifest
        ("posix_fallocate", 3, errno.ENOSPC, 0),  # for COMMIT
        ("pwrite", 1, errno.EIO, 1),
        ("pwrite", 2, errno.EIO, 0),  # the manifest
        ("fsync", 1, errno.EIO, 1),  # data
        ("fsync", 2, errno.EIO, 0),  # manifest
        ("fsync", 3, errno.EIO, 0),  # COMMIT
        ("fsync", 4, errno.EIO, 0),  # the directory
        ("fsync", 5, errno.EIO, 0),  # its parent, after the rename
        ("mkdir", 2, errno.EACCES, 0),  # the temporary directory; the first call finds the parent there
    ],
)
def test_a_failed_write_is_an_error_everywhere_and_leaves_nothing(
    tmp_path: Path, call: str, number: int, code: int, rank: int
) -> None:
    ranks = run_ranks(
        save_with_fault, 2, layout=Z2, directory=str(tmp_path), call=call, number=number, code=code, rank=rank, timeout_s=60
    )
    assert len({each["error"] for each in ranks}) == 1
    assert "step 2 was not saved" in ranks[0]["error"]
    assert os.strerror(code) in ranks[0]["error"]
    assert f"rank {rank}" in ranks[0]["error"]
    assert ranks[0]["left"] == ["latest", "step-00000001"]
    steps = [kind for kind in ranks[0]["events"] if kind not in ("snapshot", "persisted")]
    assert steps == ["save_begin", "commit", "save_begin", "save_failed"]
    assert ranks[0]["found"].endswith("step-00000003")


def save_on_small_disk(directory: str) -> dict[str, Any]:
    with engine_of(Z2) as engine:
        made = manager(Path(directory), keep=0)
        train(engine, 0, 1)
        errors = [error_of(lambda step=step: made.save(engine, step=step, meta={}, rank_meta={})) for step in range(1, 6)]
        return {"errors": errors, "left": names_in(Path(directory)), "found": str(made.find("auto"))}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_stops_the_save_and_nothing_else(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("tmpfs cannot be mounted here")
    try:
        ranks = run_ranks(save_on_small_disk, 2, directory=str(tmp_path), timeout_s=60)
        failed = [error is not None for error in ranks[0]["errors"]]
        assert failed == sorted(failed)
        assert any(failed)
        assert not all(failed)
        good = failed.index(True)
        assert "No space left on device" in ranks[0]["errors"][good]
        assert ranks[0]["left"] == ["latest", *(f"step-{step:08d}" for step in range(1, good + 1))]
        assert ranks[1]["found"].endswith(f"step-{good:08d}")
    finally:
        os.system(f"umount {tmp_path}")


def save_something_that_is_not_json(directory: str) -> dict[str, Any]:
    with engine_of(Z2) as engine:
        made = manager(Path(directory))
        meta = {"callback": object()}
        return {
            "error": error_of(lambda: made.save(engine, step=1, meta=meta, rank_meta={})),
            "left": names_in(Path(directory)),
        }


def test_meta_that_is_not_json_is_refused_everywhere(tmp_path: Path) -> None:
    ranks = run_ranks(save_something_that_is_not_json, 2, directory=str(tmp_path), timeout_s=60)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert "not JSON serializable" in ranks[0]["error"]
    assert ranks[0]["left"] == []


# ---- killed ranks


def save_and_die(directory: str, call: str, number: int, rank: int) -> None:
    import torch.distributed as dist

    with engine_of(Z3) as engine:
        made = manager(Path(directory))
        train(engine, 0, 1)
        made.save(engine, step=1, meta={}, rank_meta={})
        train(engine, 1, 1)
        real, calls = getattr(os, call), 0

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        with mock.patch.object(os, call, deadly if dist.get_rank() == rank else real):
            error = error_of(lambda: made.save(engine, step=2, meta={}, rank_meta={}))
        assert error is not None
        assert "A rank died" in error
        raise ValueError("the survivor saw it")


def find_and_restore(directory: str, layout: Layout, resume: str = "auto") -> dict[str, Any]:
    with engine_of(layout, scrambled_llama()) as engine:
        made = manager(Path(directory))
        path = made.find(resume)
        restored = made.restore(engine, path) if path else None
        return {
            "path": str(path),
            "meta": restored and restored.meta,
            "state": logical_state(engine),
            "events": made.events,
            "left": names_in(Path(directory)),
        }


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("call", "number", "rank", "survives"),
    [
        ("mkdir", 2, 0, 1),
        ("posix_fallocate", 1, 1, 1),
        ("pwrite", 2, 1, 1),
        ("pwrite", 1, 0, 1),
        ("fsync", 2, 1, 1),
        ("fsync", 3, 0, 1),  # COMMIT
        ("fsync", 4, 0, 1),  # the directory, before the rename
        ("fsync", 5, 0, 2),  # after the rename: the checkpoint exists
    ],
)
def test_kill_9_leaves_the_last_good_checkpoint(tmp_path: Path, call: str, number: int, rank: int, survives: int) -> None:
    with pytest.raises(RanksError) as caught:
        run_ranks(save_and_die, 2, directory=str(tmp_path), call=call, number=number, rank=rank, fresh=True, timeout_s=60)
    assert "the survivor saw it" in str(caught.value)
    (after,) = run_ranks(find_and_restore, 1, directory=str(tmp_path), layout=Layout(1, 1), timeout_s=60)
    assert after["path"].endswith(f"step-{survives:08d}")
    assert not any("tmp" in name for name in after["left"]), "the dead writer's directory is collected"


# ---- damaged checkpoints


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_auto_falls_back_past_damage_and_must_refuses(tmp_path: Path) -> None:
    states = run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path), steps=[1, 2, 3])[0]
    flip(tmp_path / "step-00000003" / "rank-00001.bin", 5)
    os.truncate(tmp_path / "step-00000002" / "rank-00000.bin", 4096)
    ranks = run_ranks(find_and_restore, 2, directory=str(tmp_path), layout=Z3)
    assert all(rank["path"].endswith("step-00000001") for rank in ranks)
    assert ranks[0]["state"] == states[1]
    (newest, older) = [details for kind, details in ranks[0]["events"] if kind == "checkpoint_damaged"]
    assert "rank-00001.bin, bytes 0.." in newest["damages"][0]
    assert "checksum mismatch" in newest["damages"][0]
    assert "it has 4096 bytes" in older["damages"][0]
    assert ranks[1]["events"] == []
    for resume in ("must", str(tmp_path / "step-00000003")):
        errors = run_ranks(refused, 2, directory=str(tmp_path), resume=resume)
        assert errors[0] == errors[1]
        assert "rank-00001.bin, bytes 0.." in errors[0]
    flip(tmp_path / "step-00000001" / "COMMIT", 30)
    errors = run_ranks(refused, 2, directory=str(tmp_path), resume="auto")
    assert "None of the 3 checkpoints" in errors[0]


def refused(directory: str, resume: str) -> str | None:
    return error_of(lambda: manager(Path(directory)).find(resume))


def test_without_a_checkpoint(tmp_path: Path) -> None:
    assert "there is no checkpoint in" in run_ranks(refused, 2, directory=str(tmp_path), resume="must")[0]
    assert "there is no checkpoint here" in run_ranks(refused, 2, directory=str(tmp_path), resume=str(tmp_path / "x"))[1]
    assert run_ranks(refused, 2, directory=str(tmp_path / "new"), resume="auto") == [None, None]
    assert run_ranks(refused, 2, directory=str(tmp_path), resume="never") == [None, None]


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path / "checkpoints"), steps=[1, 2])
    found = run_ranks(find_and_restore, 2, directory=str(tmp_path), layout=Z2, resume=str(tmp_path))
    assert found[1]["path"].endswith("checkpoints/step-00000002")
    assert found[1]["meta"] == {"step": 2}


def restore_damaged_later(directory: str) -> str | None:
    """The damage comes after `find` has verified: the stream is checked too."""
    import torch.distributed as dist

    with engine_of(Z2) as engine:
        made = manager(Path(directory))
        path = made.find("auto")
        dist.barrier()
        if dist.get_rank() == 0:
            flip(path / "rank-00000.bin", 4097)
        dist.barrier()
        return error_of(lambda: made.restore(engine, path))


def test_what_is_read_is_checked_as_it_is_read(tmp_path: Path) -> None:
    run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path), steps=[1])
    errors = run_ranks(restore_damaged_later, 2, directory=str(tmp_path))
    assert errors[0] == errors[1]
    assert "rank-00000.bin, bytes 0.." in errors[0]
    assert "checksum mismatch" in errors[0]


# ---- checkpoints of something else


def restore_into_other(directory: str, change: str) -> dict[str, Any]:
    import torch
    from torch import nn

    model, options, layout = tiny_llama(), {}, Z2
    if change == "shape":
        model = tiny_llama(hidden=40)
    elif change == "missing":
        model.extra = nn.Linear(3, 3)
    elif change == "extra":
        del model.seen
    elif change == "optimizer":
        layout = Layout(2, 2, optimizer="lion")
    with engine_of(layout, model, **options) as engine:
        if change == "groups":
            engine.optimizer.param_groups[0]["name"] = "heads"
        before = logical_state(engine)
        made = manager(Path(directory))
        error = error_of(lambda: made.restore(engine, made.find("must")))
        assert torch.isfinite(torch.tensor(train(engine, 0, 1))).all()
        return {"error": error, "untouched": before["lm_head.weight [param]"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("shape", "its model.embed_tokens.weight has shape (61, 32), this model's has (61, 40)"),
        ("missing", "it has no extra.weight [param]"),
        ("extra", "it holds seen, which this model does not have"),
        ("optimizer", "holds the state of AdamW, this run has Lion"),
        ("groups", "has the param groups decay, no_decay, this run has heads, no_decay"),
    ],
)
def test_another_model_or_optimizer_is_refused(tmp_path: Path, change: str, said: str) -> None:
    run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path), steps=[1])
    ranks = run_ranks(restore_into_other, 2, directory=str(tmp_path), change=change)
    assert said in ranks[0]["error"]
    assert ranks[0]["error"] == ranks[1]["error"]


def save_16_bit_stage_0(directory: str) -> str | None:
    with engine_of(Layout(1, 0, dtype="bf16")) as engine:
        return error_of(lambda: manager(Path(directory)).save(engine, step=1, meta={}, rank_meta={}))


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    (error,) = run_ranks(save_16_bit_stage_0, 1, directory=str(tmp_path))
    assert "ZeRO 0 is supported in fp32 only" in error


# ---- the same step again, retention, state before the first step


def test_a_step_is_saved_again_and_old_ones_go(tmp_path: Path) -> None:
    states = run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path), steps=[1, 2, 3, 4], keep=2)[0]
    assert names_in(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    again = run_ranks(save_steps, 1, layout=Layout(1, 1), directory=str(tmp_path), steps=[4], keep=2)[0]
    assert again[4] != states[4]
    assert names_in(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert run_ranks(find_and_restore, 2, directory=str(tmp_path), layout=Z3)[0]["state"] == again[4]


def save_untrained(directory: str) -> dict[str, str]:
    with engine_of(Z3) as engine:
        manager(Path(directory)).save(engine, step=0, meta={}, rank_meta={})
        return logical_state(engine)


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    before = run_ranks(save_untrained, 2, directory=str(tmp_path))[0]
    after = run_ranks(find_and_restore, 1, directory=str(tmp_path), layout=Layout(1, 0))[0]
    assert after["state"] == before


def loss_scaling(directory: str, layout: Layout, resume: bool) -> dict[str, Any]:
    with engine_of(layout) as engine:
        made = manager(Path(directory))
        notes = made.restore(engine, made.find("must")).notes if resume else []
        if not resume:
            train(engine, 0, 3)
            made.save(engine, step=3, meta={}, rank_meta={})
        scaler = engine.optimizer.loss_scaler
        learnt = {key: getattr(scaler, key, None) for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}
        return {"scaler": learnt, "state": logical_state(engine), "notes": notes}


@needs_fp16
def test_fp16_loss_scaling_goes_on(tmp_path: Path) -> None:
    before = run_ranks(loss_scaling, 2, directory=str(tmp_path), layout=Layout(2, 2, dtype="fp16"), resume=False)[0]
    assert before["scaler"]["cur_iter"] == 3
    assert before["scaler"]["cur_scale"] != 2**6, "the scale was learnt"
    after = run_ranks(loss_scaling, 2, directory=str(tmp_path), layout=Layout(2, 3, dtype="fp16"), resume=True)[0]
    assert after == before
    other = run_ranks(loss_scaling, 2, directory=str(tmp_path), layout=Layout(2, 1, dtype="bf16"), resume=True)[0]
    assert any("does not scale losses" in note for note in other["notes"])
    shutil.rmtree(tmp_path)
    run_ranks(loss_scaling, 2, directory=str(tmp_path), layout=Layout(2, 1, dtype="bf16"), resume=False)
    fresh = run_ranks(loss_scaling, 2, directory=str(tmp_path), layout=Layout(2, 3, dtype="fp16"), resume=True)[0]
    assert any("no loss scale" in note for note in fresh["notes"])


# ---- after a restore


def restore_wrongly(directory: str, what: str) -> str | None:
    """Rank 1 does not do what it should: the others must not train on."""
    import torch.distributed as dist

    from anyshard.trainer.checkpoint import optimizers

    def forgets(*args: Any) -> None:
        """Leaves the groups as they are."""

    def miscounts(*args: Any) -> dict[str, Any]:
        return {**real(*args), "step": torch.tensor(7.0)}

    import torch

    real = optimizers._restored_scalars
    name, wrong = ("set_hyper_parameters", forgets) if what == "lr" else ("_restored_scalars", miscounts)
    with engine_of(Z2) as engine:
        made = manager(Path(directory))
        engine.optimizer.param_groups[0]["lr"] = 0.5
        with mock.patch.object(optimizers, name, wrong if dist.get_rank() == 1 else getattr(optimizers, name)):
            return error_of(lambda: made.restore(engine, made.find("must")))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("lr", "rank 1: after the restore lr of group decay is 0.5, COMMIT says 0.01"),
        ("step", "rank 1: after the restore the optimizer is at step 7, COMMIT says {1.0}"),
    ],
)
def test_a_restore_that_did_not_work_is_found(tmp_path: Path, what: str, said: str) -> None:
    run_ranks(save_steps, 2, layout=Z2, directory=str(tmp_path), steps=[1])
    assert run_ranks(restore_wrongly, 2, directory=str(tmp_path), what=what) == [said, said]
