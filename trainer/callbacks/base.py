"""What a callback is, and the list of those of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyshard.configs.errors import AnyshardError, ConfigError, Problem, TrainError
from anyshard.configs.registry import lookup

if TYPE_CHECKING:
    from anyshard.trainer.trainer import Trainer


class Callback:
    """Override what you need. Every method is called on every rank, so collectives are safe."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step, after a restore."""

    def on_step_end(self, trainer: Trainer, record: dict[str, Any] | None) -> None:
        """After each optimizer step; `record` holds the metrics of a logged one."""

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an evaluation, before it is reported; add to `record` what should be reported with it."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step and its save, not on an early stop."""

    def state_dict(self) -> dict[str, Any]:
        """JSON that goes into each checkpoint (rank 0's is kept)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of an earlier `state_dict`."""


class Callbacks:
    """The callbacks of a run, by name, called in the order of the configuration."""

    def __init__(self, members: dict[str, Callback]) -> None:
        self.members = members

    @classmethod
    def build(cls, options: dict[str, Any]) -> Callbacks:
        """Build each named callback from its options; null turns one off.

        Raises:
            ConfigError: an unknown callback, or options that it does not take.
        """
        members = {}
        for name, kwargs in options.items():
            if kwargs is None:
                continue
            factory = lookup("callback", name, key=f"callbacks.{name}")
            try:
                members[name] = factory(**kwargs)
            except TypeError as error:
                raise ConfigError(Problem(f"callbacks.{name}", kwargs, f"{error}.", "See docs/callbacks.md.")) from error
        return cls(members)

    def call(self, hook: str, *args: Any) -> None:
        """Call one hook of every callback.

        Raises:
            TrainError: a callback failed; the message names it.
        """
        for name, member in self.members.items():
            try:
                getattr(member, hook)(*args)
            except AnyshardError:
                raise
            except Exception as error:
                raise TrainError(
                    f"callbacks.{name} failed in {hook}: {error!r}. Fix it, or turn it off with callbacks.{name}=null."
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """States of all callbacks that have one."""
        return {name: state for name, member in self.members.items() if (state := member.state_dict())}

    def load_state_dict(self, states: dict[str, Any]) -> list[str]:
        """Give each callback its state; returns the names of states that no callback took."""
        for name, member in self.members.items():
            if name in states:
                member.load_state_dict(states[name])
        return [name for name in states if name not in self.members]
