"""Shows what a language model writes, after evaluations or at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anyshard.trainer.callbacks.base import Callback
from anyshard.trainer.state import derived_seed

if TYPE_CHECKING:
    from anyshard.trainer.trainer import Trainer


class SampleText(Callback):
    """Continues a prompt.

    Args:
        prompt: what the text starts with.
        num_tokens: tokens to add.
        temperature: of the sampling; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens.
        at_evaluations: also after each evaluation, not only at the end.
    """

    def __init__(
        self,
        prompt: str = "def ",
        num_tokens: int = 96,
        temperature: float = 0.7,
        top_k: int = 40,
        at_evaluations: bool = False,
    ) -> None:
        self.prompt, self.num_tokens = prompt, num_tokens
        self.temperature, self.top_k, self.at_evaluations = temperature, top_k, at_evaluations

    def on_evaluation(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write a sample where asked for."""
        if self.at_evaluations:
            self._show(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Write a sample."""
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        if trainer.task.tokenizer is None:
            return
        text = self.generate(trainer)
        trainer.reporter.event("sample", step=trainer.progress.step, text=text)
        trainer.reporter.say(f"sample at step {trainer.progress.step}:\n{text}")

    def generate(self, trainer: Trainer) -> str:
        """The prompt and its continuation; the same on every rank.

        Collective: every rank calls it, since a forward pass takes all of them.
        """
        tokenizer = trainer.task.tokenizer
        generator = torch.Generator().manual_seed(derived_seed(trainer.config.seed, "sample"))
        ids = torch.from_numpy(tokenizer.encode_batch([self.prompt])[0].astype("int64"))
        for _ in range(self.num_tokens):
            logits_V = trainer.engine.next_logits(ids[-trainer.config.data.sequence_length :].to(trainer.device))
            ids = torch.cat([ids, self._pick(logits_V[: tokenizer.vocab_size], generator)])
        return str(tokenizer.decode(ids.numpy()))

    def _pick(self, logits_V: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.temperature == 0:
            return logits_V.argmax()[None]
        best = logits_V.topk(min(self.top_k, len(logits_V)))
        choice = torch.multinomial(torch.softmax(best.values / self.temperature, dim=0), 1, generator=generator)
        return best.indices[choice]
