"""From the configuration to datasets: find the documents, tokenise them once per node, open the token file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anyshard.configs import registry, schema
from anyshard.configs.errors import DataError, Problem
from anyshard.trainer.data.cache import cache_root, fingerprint
from anyshard.trainer.data.documents import Documents
from anyshard.trainer.data.tokenizers import Tokenizer, build_tokenizer
from anyshard.trainer.data.tokens import TokenDataset, TokenMeta, tokenize


@dataclass(frozen=True)
class Splits:
    """The datasets of a run, and the tokenizer that made them.

    Args:
        validation: None when nothing is held out.
        fingerprint: changes when any sample would; a position of the sample order means the same while it is equal.
    """

    train: TokenDataset
    validation: TokenDataset | None
    tokenizer: Tokenizer
    fingerprint: str


def build_data(data: schema.Data, *, seed: int, say: Callable[[str], None]) -> Splits:
    """The datasets that `data` describes.

    Every rank calls it; the first on a node to take the lock does the work, and the others block until it is done.

    Args:
        seed: of source synthetic.
        say: prints one line for people.

    Raises:
        ConfigError: no such source.
        DataError: the data or the tokenizer cannot be used.
        EnvError: the cache cannot be written, or a library is missing.
    """
    documents: Documents = registry.lookup("data", data.source, key="data.source")(data, seed)

    def training_texts() -> Iterator[str]:
        return (document.text for document in documents.read() if not document.validation)

    tokenizer = build_tokenizer(data, source_fingerprint=documents.fingerprint, texts=training_texts, say=say)
    folder = tokenize(documents, tokenizer, root=cache_root(data) / "tokens", max_tokens=data.max_tokens, say=say)
    train = _open(folder, "train", data)
    if not len(train):
        raise DataError(_too_short(data, "training", train.num_tokens))
    validation = _validation(folder, data, say)
    held = f"{validation.num_tokens:,} validation tokens" if validation is not None else "no validation"
    say(
        f"data: {data.name}, tokenizer {data.tokenizer} ({tokenizer.vocab_size:,} ids): {train.num_tokens:,} training tokens "
        f"in {len(train):,} samples of {data.sequence_length}, {held}; {folder}"
    )
    for note in TokenMeta.load(folder).notes:
        say(f"data: {note}")
    return Splits(train, validation, tokenizer, fingerprint(folder.name, data.sequence_length, data.pack.value))


def _open(folder: Path, split: str, data: schema.Data) -> TokenDataset:
    separate = data.pack is schema.Pack.documents
    return TokenDataset.open(folder, split, sequence_length=data.sequence_length, separate_documents=separate)


def _validation(folder: Path, data: schema.Data, say: Callable[[str], None]) -> TokenDataset | None:
    """The validation split; None, with a word why, when what was held out does not make one sample."""
    dataset = _open(folder, "validation", data)
    if len(dataset):
        return dataset
    if data.validation_path is not None:
        raise DataError(_too_short(data, "validation", dataset.num_tokens))
    if data.validation_fraction > 0:
        say(
            f"data: no validation: data.validation_fraction={data.validation_fraction} holds out {dataset.num_tokens} tokens, "
            f"and one sample needs {data.sequence_length + 1}. Raise it, or set data.validation_path."
        )
    return None


def _too_short(data: schema.Data, split: str, num_tokens: int) -> Problem:
    reason = f"the {split} text has {num_tokens} tokens, and one sample needs sequence_length + 1 = {data.sequence_length + 1}."
    fix = f"Set it to {num_tokens - 1} or less, or use more text." if num_tokens > 2 else "Use more text."
    return Problem("data.sequence_length", data.sequence_length, reason, fix)
