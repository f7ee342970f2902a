"""The loop, and only the loop: batch -> engine -> metrics -> callbacks -> save -> agreed to stop?"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyshard.configs import schema
from anyshard.configs.errors import TrainError
from anyshard.trainer.batch import BatchPlan
from anyshard.trainer.callbacks.base import Callbacks
from anyshard.trainer.data.agreement import require_same_data
from anyshard.trainer.engine import Engine, mean_over_ranks, sum_over_data
from anyshard.trainer.evaluate import evaluate
from anyshard.trainer.metrics import Reporter, peak_memory_gib
from anyshard.trainer.saves import Saves
from anyshard.trainer.state import Progress, RngMark
from anyshard.trainer.stop import StopControl
from anyshard.trainer.task import Batch, Task
from anyshard.trainer.watchdog import Watchdog


@dataclass
class Outcome:
    """How a run of the loop ended.

    Attributes:
        step: optimizer steps done in the life of the run.
        stopped: the reason of an early stop, None when the last step was reached.
        loss: training loss of the last logged step.
        evaluation: numbers of the last evaluation.
        checkpoint: the last checkpoint that was committed.
    """

    step: int
    stopped: str | None = None
    loss: float | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None


@dataclass
class Window:
    """Sums since the last logged step."""

    started_s: float = field(default_factory=time.perf_counter)
    steps: int = 0
    skipped_before: int = 0  # steps that DeepSpeed had dropped by then
    data_wait_s: float = 0.0
    other_s: float = 0.0  # evaluation and saves: not part of a step


class _StopNow(Exception):
    """The ranks have agreed to stop in the middle of a step or of an evaluation."""


class Trainer:
    """One rank's training loop.

    Args:
        peak_flops: floating-point operations per second of all devices together, for MFU.
    """

    def __init__(
        self,
        config: schema.Config,
        task: Task,
        engine: Engine,
        *,
        loader: Any,
        batch: BatchPlan,
        progress: Progress,
        schedule: Any,
        stops: StopControl,
        reporter: Reporter,
        callbacks: Callbacks,
        saves: Saves,
        device: torch.device,
        rank: int,
        run_dir: Path,
        peak_flops: float | None,
    ) -> None:
        self.config, self.task, self.engine = config, task, engine
        self.loader, self.batch, self.progress, self.schedule = loader, batch, progress, schedule
        self.stops, self.reporter, self.callbacks, self.saves = stops, reporter, callbacks, saves
        self.device, self.rank, self.run_dir, self._peak_flops = device, rank, run_dir, peak_flops
        self.outcome = Outcome(step=progress.step, checkpoint=saves.last_good)
        self._window = Window()
        self._watchdog = Watchdog(config.train.detect_hang_s, self._tell_hang)
        self._tokens_per_step = batch.global_batch_size * task.tokens_per_sample
        # a step that is left in the middle must leave no trace; in a pipeline the ranks are never at the same micro-step
        self._has_stages = engine.groups.mesh.pp > 1
        self._may_leave_a_step = not (
            batch.accumulation_steps == 1 or self._has_stages or _changes_in_forward(engine.ds.module)
        )

    def run(self) -> Outcome:
        """Train until `train.max_steps` or until the ranks agree to stop. Collective: every rank calls it."""
        train = self.config.train
        self.engine.ds.train()
        self.callbacks.call("on_train_start", self)
        if self.progress.step >= train.max_steps:
            self.reporter.say(
                f"step {self.progress.step} of {train.max_steps}: nothing is left to train; raise train.max_steps to go on"
            )
        self.reporter.start_bar(self.progress.step)
        self._window = Window(skipped_before=self.engine.skipped_steps)
        with self._watchdog:
            self._loop()
            self._finish()
            self.stops.drain()
        return self.outcome

    def _loop(self) -> None:
        self._evaluate_if_due(again=False)  # where the run was stopped before it could
        while self.progress.step < self.config.train.max_steps and not self.outcome.stopped:
            record = self._step()
            if self.outcome.stopped:
                break
            self.saves.after_step(will_save=self.config.checkpoint.every_steps > 0)
            self.callbacks.call("on_step_end", self, record)
            decision = self.stops.decide(self.progress.step)
            if decision.stop:
                self.outcome.stopped = decision.stop
                break
            self._between_steps(save_wished=decision.save)

    def _tell_hang(self, silent_s: float) -> None:
        step = self.progress.step + 1
        self.reporter.event("hang", step=step, silent_s=round(silent_s))
        self.reporter.say(
            f"WARNING: no micro-step has ended for {silent_s:.0f} s in step {step}. "
            f"The logs in {self.run_dir}/logs say where each rank stands; docs/debugging.md, 'A run hangs', has more."
        )

    def _step(self) -> dict[str, Any] | None:
        """One optimizer step; returns its record when it is a logged one.

        Where the ranks agree to stop in the middle of it, `outcome.stopped` is set and the state is that before the step.
        """
        window, step = self._window, self.progress.step
        logged = self._is_logged(step + 1)
        mark = RngMark() if self._may_leave_a_step else None
        started = time.perf_counter()
        micro_batches = self.loader.step(self.progress.samples)
        window.data_wait_s += time.perf_counter() - started
        self._check_data(micro_batches, step)
        lr = self.engine.set_lr(self.schedule(step))
        scales = self._scales(micro_batches)
        done = itertools.count(1)

        def beat() -> None:
            self._watchdog.beat()
            if mark is not None and next(done) < len(micro_batches) and self.stops.poll():
                raise _StopNow

        try:
            losses, norm = self.engine.train_step(self.task.loss, micro_batches, scales, logged=logged, beat=beat)
        except _StopNow:
            assert mark is not None
            self._leave_step(mark)
            return None
        self.progress.step += 1
        self.progress.evaluation = {}
        self.progress.samples += self.batch.global_batch_size
        self.progress.tokens += self._tokens_per_step
        window.steps += 1
        self.reporter.tick(self.progress.step)
        return self._log(losses, lr, norm) if logged else None

    def _check_data(self, micro_batches: list[Batch], step: int) -> None:
        """Now and then see that the ranks that share a model have the same samples."""
        every, mesh = self.config.train.check_data_every_steps, self.engine.groups.mesh
        if every and step % every == 0 and mesh.world_size > mesh.dp:
            require_same_data(micro_batches, mesh, step + 1)

    def _leave_step(self, mark: RngMark) -> None:
        """Stop before the step is done: its gradients are dropped, its samples come again."""
        mark.go_back()
        if self.progress.step:
            self.engine.set_lr(self.schedule(self.progress.step - 1))
        self.outcome.stopped = self.stops.reason

    def _is_logged(self, step: int) -> bool:
        train = self.config.train
        return step % train.log_every_steps == 0 or step in (1, train.max_steps)

    def _scales(self, micro_batches: list[Batch]) -> Sequence[Any] | Tensor:
        """Factors that turn the mean of micro-batch means into the mean over all targets of the global batch."""
        if self.task.num_targets is None:
            return [None] * len(micro_batches)
        counts = torch.stack([self.task.num_targets(micro_batch) for micro_batch in micro_batches]).to(torch.float32)
        total = sum_over_data(counts.sum(), self.engine.groups)
        return counts * (self.batch.accumulation_steps * self.engine.groups.num_shards) / total.clamp(min=1)

    def _log(self, losses: list[Tensor], lr: float, norm: Tensor | float | None) -> dict[str, Any]:
        window, progress, config = self._window, self.progress, self.config
        loss = float(mean_over_ranks(torch.stack(losses).float().mean()))
        if norm is None:
            norm = self.engine.grad_norm()
        now = time.perf_counter()
        elapsed_s = max(now - window.started_s, 1e-9)
        stall_s, stall_in_steps_s = self.saves.take_stall_s()
        step_s = max(elapsed_s - window.other_s - stall_in_steps_s, 1e-9) / window.steps
        tokens_per_s = self._tokens_per_step / step_s
        record: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": None if norm is None else float(norm),
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_s": step_s,
            "perf/data_wait_pct": 100 * window.data_wait_s / (step_s * window.steps),
            "perf/eta_s": step_s * (config.train.max_steps - progress.step),
            "ckpt/stall_ms": 1000 * (stall_s + stall_in_steps_s),
            "mem/peak_gib": peak_memory_gib(self.device),
        }
        if self._peak_flops and self.task.flops_per_token:
            record["perf/mfu_pct"] = 100 * tokens_per_s * self.task.flops_per_token / self._peak_flops
        if self.engine.loss_scale is not None:
            record["train/loss_scale"] = self.engine.loss_scale
        if self.engine.loss_scale is not None or self.engine.skipped_steps:
            record["train/skipped_steps"] = self.engine.skipped_steps
        if self.saves.num_failed:
            record["ckpt/failed"] = self.saves.num_failed
        self.stops.needed_s = 2 * step_s + self.saves.last_save_s
        self.outcome.loss = loss
        self.reporter.step(record)
        if config.train.detect_nan:
            self._require_finite(loss)
        self._window = Window(skipped_before=self.engine.skipped_steps)
        return record

    def _require_finite(self, loss: float) -> None:
        """Refuse to go on from a loss that is not finite, or where DeepSpeed silently drops every step.

        Source: deepspeed 0.19.8 runtime/zero/stage_1_and_2.py and stage3.py drop a step whose gradients are not finite in
        every precision; only under fp16 does a smaller loss scale ever end that.

        Raises:
            TrainError: it is one of the two.
        """
        step, window = self.progress.step, self._window
        if not math.isfinite(loss):
            what = f"the loss is {loss} at step {step}."
        elif self.engine.loss_scale is None and self.engine.skipped_steps - window.skipped_before == window.steps:
            what = f"at step {step} the gradients are not finite, as at every step since the last log line: nothing is learnt."
        else:
            return
        self.saves.drain()
        self.saves.forget_memory()  # it would hand what is not finite to the next start
        self.reporter.event("nan", step=step, loss=str(loss))
        raise TrainError(
            f"{what} {self._last_good()} Lower optimizer.lr, raise schedule.warmup_steps, or look at the data; "
            "docs/debugging.md has more. train.detect_nan=false goes on regardless."
        )

    def _last_good(self) -> str:
        path = self.saves.last_good
        return f"The last good checkpoint is {path}." if path else "There is no checkpoint yet."

    def _between_steps(self, *, save_wished: bool) -> None:
        """Evaluate and save where it is time; neither counts as step time."""
        every, step = self.config.checkpoint.every_steps, self.progress.step
        if step == self.config.train.max_steps:
            return
        started = time.perf_counter()
        self._evaluate_if_due()
        if self.outcome.stopped:
            return
        if save_wished or (every and step % every == 0):
            with self._watchdog.paused():
                self.saves.begin(self.progress, self.callbacks.state_dict())
        in_memory = self.config.checkpoint.ram_every_steps
        if in_memory and step % in_memory == 0:
            with self._watchdog.paused():
                self.saves.begin_in_memory(self.progress, self.callbacks.state_dict())
        self._window.other_s += time.perf_counter() - started

    def _evaluate_if_due(self, *, again: bool = True) -> None:
        """Evaluate after every so many steps.

        Args:
            again: also where the checkpoint that the run goes on from was saved after that evaluation.
        """
        every, step = self.config.train.eval_every_steps, self.progress.step
        if (
            every
            and step
            and step % every == 0
            and step < self.config.train.max_steps
            and (again or not self.progress.evaluation)
        ):
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate on the validation data, if there is any. Collective: every rank calls it.

        Where the ranks agree to stop meanwhile it ends there, with no numbers, and `outcome.stopped` is set.
        """
        samples = self.config.train.eval_samples
        if self.task.validation_data is None or samples == 0:
            return
        self.stops.new_pace()
        try:
            numbers = evaluate(
                self.engine,
                self.task,
                samples=samples,
                micro_batch_size=self.batch.micro_batch_size,
                device=self.device,
                on_batch=self._evaluated_batch,
            )
        except _StopNow:
            self.engine.ds.train()
            self.outcome.stopped = self.stops.reason
            return
        finally:
            self.stops.new_pace()
        self.outcome.evaluation = self.progress.evaluation = numbers
        record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            **{f"eval/{name}": value for name, value in numbers.items()},
        }
        self.callbacks.call("on_evaluation", self, record)
        self.reporter.evaluation(record)

    def _evaluated_batch(self) -> None:
        self._watchdog.beat()
        if not self._has_stages and self.stops.poll():
            raise _StopNow

    def save(self, *, memory_first: bool = False) -> None:
        """Make the present state durable, unless it is. Collective: every rank calls it; it blocks until it is committed.

        Args:
            memory_first: before that to shared memory, where the run keeps checkpoints there: time may be short.

        Raises:
            CheckpointError: it could not be written, on any rank.
        """
        with self._watchdog.paused():
            self.saves.finish(self.progress, self.callbacks.state_dict(), memory_first=memory_first)

    def _finish(self) -> None:
        step = self.progress.step
        self.outcome.step = step
        try:
            self._end(step)
            self.saves.drain()
        finally:
            self.outcome.checkpoint = self.saves.last_good

    def _end(self, step: int) -> None:
        if not self.outcome.stopped:
            self.evaluate()
        if self.outcome.stopped:
            self.reporter.say(f"stopping after step {step}: {self.outcome.stopped}")
            if step:
                self.save(memory_first=True)
            self.stops.done()
            self.reporter.event("stop", step=step, reason=self.outcome.stopped)  # last: it tells that the state is saved
            return
        if self.config.checkpoint.at_end:
            self.save()
        self.callbacks.call("on_train_end", self)
        self.reporter.event("done", step=step, **self.outcome.evaluation)


def _changes_in_forward(module: nn.Module) -> bool:
    """Whether a forward pass may change what a checkpoint holds: running statistics and other buffers that are stored."""
    return any(name not in part._non_persistent_buffers_set for part in module.modules() for name in part._buffers)
