"""Traces some steps with torch.profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile

from anyshard.trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from anyshard.trainer.trainer import Trainer


class Profiler(Callback):
    """Writes profile/rank00000.json (open it in https://ui.perfetto.dev) and a table of the costliest operators.

    Args:
        start_step: first step that is traced, or the first one after a resume beyond it; let a few pass, the first ones are
            not typical.
        num_steps: steps that are traced.
        all_ranks: trace every rank, not only rank 0.
    """

    def __init__(self, start_step: int = 5, num_steps: int = 3, all_ranks: bool = False) -> None:
        self.start_step, self.num_steps, self.all_ranks = start_step, num_steps, all_ranks
        self._profile: profile | None = None
        self._first: int | None = None  # step that was traced first

    def on_train_start(self, trainer: Trainer) -> None:
        """Start the trace with the first step, if that is the one."""
        self._start_or_end(trainer)

    def on_step_end(self, trainer: Trainer, record: dict[str, Any] | None) -> None:
        """Start and end the trace."""
        self._start_or_end(trainer)

    def _start_or_end(self, trainer: Trainer) -> None:
        if trainer.rank != 0 and not self.all_ranks:
            return
        step = trainer.progress.step + 1  # the step that comes next
        if self._first is None and step >= self.start_step:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()
            self._first = step
        elif self._profile is not None and self._first is not None and step == self._first + self.num_steps:
            self._end(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """End a trace that training was too short for."""
        if self._profile is not None:
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        assert self._profile is not None
        assert self._first is not None
        self._profile.stop()
        folder = trainer.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        path = folder / f"rank{trainer.rank:05d}.json"
        self._profile.export_chrome_trace(str(path))
        key = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        path.with_suffix(".txt").write_text(self._profile.key_averages().table(sort_by=key, row_limit=25))
        trainer.reporter.say(f"profile of steps {self._first} to {trainer.progress.step}: {path}")
        self._profile = None
