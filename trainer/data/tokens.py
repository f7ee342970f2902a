"""The token file: what a corpus becomes, once per node, and how samples are cut from it.

A folder named by the fingerprint of source and tokenizer holds, for each split, `<split>.bin` (token ids, one after the
other, uint16 or uint32) and `<split>.ends` (int64: where each document ends, after its end-of-text), and `meta.json`.
Nothing in it depends on the sequence length, which only decides where samples are cut.
"""

from __future__ import annotations

import json
import mmap
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from anyshard.trainer.data.cache import build_once, fingerprint
from anyshard.trainer.data.documents import Document, Documents
from anyshard.trainer.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
NO_TARGET = -100  # the ignore_index of torch's cross entropy
_BATCH_CHARS = 4 * 2**20  # text handed to the tokenizer at once: enough to use all cores, little memory
_PROGRESS_S = 5.0


@dataclass(frozen=True)
class TokenMeta:
    """meta.json: how to read the files beside it, and how large they must be."""

    dtype: str
    num_tokens: dict[str, int]
    num_documents: dict[str, int]
    notes: list[str] = field(default_factory=list)
    version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write meta.json, which must come after the files that it describes."""
        (folder / "meta.json").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> TokenMeta:
        """Read meta.json.

        Raises:
            OSError, ValueError, TypeError: it is missing or damaged.
        """
        return TokenMeta(**json.loads((folder / "meta.json").read_text(encoding="utf-8")))


def tokenize(
    documents: Documents, tokenizer: Tokenizer, *, root: Path, max_tokens: int | None, say: Callable[[str], None]
) -> Path:
    """The folder of the tokenised corpus, made now unless it is there; blocks while another process makes it.

    Args:
        root: folder of all token folders.
        max_tokens: stop after so many training tokens.

    Raises:
        EnvError: `root` cannot be written, or the disk is full.
    """
    name = fingerprint(FORMAT_VERSION, documents.fingerprint, tokenizer.fingerprint, max_tokens)[:20]

    def build(folder: Path) -> None:
        _Writer(folder, tokenizer, max_tokens, documents.num_bytes, say).write(documents)

    return build_once(root / name, damage=damage, build=build, say=say, what="data")


def damage(folder: Path) -> str | None:
    """What is wrong with a token folder, judged by its sizes; None when nothing is."""
    try:
        meta = TokenMeta.load(folder)
        for split in SPLITS:
            expected = {
                f"{split}.bin": meta.num_tokens[split] * np.dtype(meta.dtype).itemsize,
                f"{split}.ends": meta.num_documents[split] * 8,
            }
            for name, num_bytes in expected.items():
                found = (folder / name).stat().st_size
                if found != num_bytes:
                    return f"{name} has {found} bytes instead of {num_bytes}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"meta.json: {error}"
    return None


class _Writer:
    """Tokenises documents, in batches, into the files of a folder."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, max_tokens: int | None, num_bytes: int | None, say: Callable[[str], None]
    ) -> None:
        self.folder, self.tokenizer, self.max_tokens, self.num_bytes, self.say = folder, tokenizer, max_tokens, num_bytes, say
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.num_tokens = dict.fromkeys(SPLITS, 0)
        self.ends = {split: array("q") for split in SPLITS}
        self.done_bytes, self.started, self.told = 0, time.monotonic(), time.monotonic()

    def write(self, documents: Documents) -> None:
        with (self.folder / "train.bin").open("wb") as train, (self.folder / "validation.bin").open("wb") as validation:
            files: dict[str, IO[bytes]] = {"train": train, "validation": validation}
            for batch in _batches(documents.read()):
                self._write_batch(batch, files)
                if self.max_tokens is not None and self.num_tokens["train"] >= self.max_tokens:
                    break
        for split in SPLITS:
            (self.folder / f"{split}.ends").write_bytes(self.ends[split].tobytes())
        num_documents = {split: len(self.ends[split]) for split in SPLITS}
        TokenMeta(self.dtype.name, self.num_tokens, num_documents, documents.notes()).save(self.folder)

    def _write_batch(self, batch: list[Document], files: dict[str, IO[bytes]]) -> None:
        eos = np.array([self.tokenizer.eos_id], dtype=self.dtype)
        parts: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}
        for document, ids in zip(batch, self.tokenizer.encode_batch([d.text for d in batch]), strict=True):
            split = "validation" if document.validation else "train"
            ids = np.concatenate([ids.astype(self.dtype), eos])
            if split == "train" and self.max_tokens is not None:
                ids = ids[: self.max_tokens - self.num_tokens[split]]
                if not ids.size:
                    continue
            parts[split].append(ids)
            self.num_tokens[split] += ids.size
            self.ends[split].append(self.num_tokens[split])
        for split in SPLITS:
            if parts[split]:
                files[split].write(np.concatenate(parts[split]).data)
        self._tell(sum(len(document.text.encode("utf-8", errors="replace")) for document in batch))

    def _tell(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        now = time.monotonic()
        if now - self.told < _PROGRESS_S:
            return
        self.told = now
        share = f"/{self.num_bytes / 1e6:.0f} MB ({self.done_bytes / self.num_bytes:.0%})" if self.num_bytes else " MB"
        rate = self.done_bytes / 1e6 / (now - self.started)
        tokens = sum(self.num_tokens.values()) / 1e6
        self.say(f"data: tokenising {self.done_bytes / 1e6:.0f}{share}, {rate:.1f} MB/s, {tokens:.1f}M tokens")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about _BATCH_CHARS characters; empty documents are left out."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        if not document.text:
            continue
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class TokenDataset:
    """Samples cut from a token array: sample i covers tokens[i*S : i*S + S + 1], S = sequence_length.

    Args:
        tokens: all tokens, [T] uint16 or uint32, usually memory-mapped.
        document_ends: sorted offsets just after each document, [D] int64.
        sequence_length: S.
        separate_documents: positions restart at each document, and its last token has no target.
        mapping: the mapped file that `tokens` is a view of, if it is one.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        document_ends: NDArray[np.int64],
        *,
        sequence_length: int,
        separate_documents: bool,
        mapping: mmap.mmap | None = None,
    ) -> None:
        self._tokens = tokens
        self._ends = document_ends
        self._mapping = mapping
        if mapping is not None:
            # samples are read in random order: reading ahead of each page fault is 15 to 50 times slower on a cold file
            mapping.madvise(mmap.MADV_RANDOM)
        self._length = sequence_length
        self._separate = separate_documents
        self.num_tokens = int(self._tokens.size)
        self._num_samples = max(self.num_tokens - 1, 0) // sequence_length
        self.targets_per_sample: int | None = None if separate_documents else sequence_length
        step = self._tokens.itemsize
        # overlapping rows of S + 1 tokens, so that a batch is one gather
        self._rows = as_strided(
            self._tokens, (self._num_samples, sequence_length + 1), (sequence_length * step, step), writeable=False
        )

    @staticmethod
    def open(folder: Path, split: str, *, sequence_length: int, separate_documents: bool) -> TokenDataset:
        """The dataset of one split of a token folder."""
        mapping = _map(folder / f"{split}.bin")
        tokens = _view(mapping, TokenMeta.load(folder).dtype)
        ends = _view(_map(folder / f"{split}.ends"), "int64")
        return TokenDataset(
            tokens, ends, sequence_length=sequence_length, separate_documents=separate_documents, mapping=mapping
        )

    def __len__(self) -> int:
        return self._num_samples

    @property
    def tokens(self) -> NDArray[Any]:
        """All tokens. Shape: [T] uint16 or uint32, read-only."""
        return self._tokens

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """Sample `index`: input_ids, labels (already shifted) and, with separate documents, position_ids.

        Shape: each [S] int64; labels hold -100 where there is no target.
        """
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of a dataset of {self._num_samples}")
        start = index * self._length
        row = self._tokens[start : start + self._length + 1].astype(np.int64)
        sample = {"input_ids": row[:-1], "labels": row[1:].copy()}
        if self._separate:
            sample["position_ids"] = self._split_documents(np.array([start]), sample["labels"][None])[0]
        return sample

    def batch(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """What collating these samples would give, gathered at once.

        Shape: indices [B]; returns [B, S] int64 each.
        """
        self._read_ahead(indices)
        rows = self._rows[indices]
        columns = {"input_ids": rows[:, :-1].astype(np.int64), "labels": rows[:, 1:].astype(np.int64)}
        if self._separate:
            columns["position_ids"] = self._split_documents(np.asarray(indices) * self._length, columns["labels"])
        return columns

    def _read_ahead(self, indices: NDArray[np.int64]) -> None:
        """Start reading the pages of all samples at once; from a cold file this is ten times faster than one by one."""
        if self._mapping is None:
            return
        num_bytes = (self._length + 1) * self._tokens.itemsize
        for start in (indices * (self._length * self._tokens.itemsize)).tolist():
            page = start - start % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, page, start + num_bytes - page)

    def _split_documents(self, starts: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take away targets that belong to the next document; returns positions counted from each document's start.

        Shape: starts [B], the first token of each sample; labels [B, S], changed in place; returns [B, S].
        """
        num_rows, length = labels.shape
        first = np.searchsorted(self._ends, starts, side="right")
        counts = np.searchsorted(self._ends, starts + length, side="right") - first
        total = int(counts.sum())
        before = np.cumsum(counts) - counts
        row = np.repeat(np.arange(num_rows), counts)
        ends = self._ends[np.arange(total) + np.repeat(first - before, counts)]
        # where the next document begins, counted over the whole batch: 1 to `length` tokens into its row
        begins = ends - starts[row] + row * length
        labels.reshape(-1)[begins - 1] = NO_TARGET
        segments = np.union1d(begins, np.arange(num_rows + 1) * length)
        flat: NDArray[np.int64] = np.arange(num_rows * length) - np.repeat(segments[:-1], np.diff(segments))
        return flat.reshape(num_rows, length)


def _map(path: Path) -> mmap.mmap | None:
    """The file, mapped; None when it is empty, which cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None


def _view(mapping: mmap.mmap | None, dtype: str) -> NDArray[Any]:
    return np.empty(0, dtype=dtype) if mapping is None else np.frombuffer(mapping, dtype=dtype)
