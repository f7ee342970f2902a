"""Text to token ids and back: bytes, a BPE trained on the corpus, or any Hugging Face tokenizer by path.

Each has one end-of-text id, which the token file puts after every document. The heavy libraries are imported by the
tokenizers that need them alone.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anyshard.configs import schema
from anyshard.configs.errors import DataError, Problem
from anyshard.configs.schema import BUILT_IN_TOKENIZERS
from anyshard.configs.writing import writing
from anyshard.trainer.data.cache import build_once, cache_root, fingerprint
from anyshard.trainer.data.files import is_missing_path

END_OF_TEXT = "<|endoftext|>"
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # where a bare tokenizer.json does not say
_BPE_VERSION = 1
_BPE_MAX_BYTES = 256 * 2**20  # merges learnt from more text hardly differ, and training holds word counts in memory


class Tokenizer(Protocol):
    """What the data layer and the text-sample callback need of a tokenizer."""

    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Token ids of each text, without special tokens added."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these token ids; end-of-text is left out."""

    def save(self, folder: Path) -> None:
        """Write it into an existing folder, as `transformers.AutoTokenizer` reads it."""


class ByteTokenizer:
    """One token per UTF-8 byte, and 256 for end-of-text."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes-1"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
        """Token ids of each text; a lone surrogate becomes '?'."""
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these token ids; bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write it as a byte-level BPE without merges, which makes the same ids."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE(vocab=_byte_characters(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        _save_backend(backend, self.eos_id, folder)


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, backend: Any, eos_id: int) -> None:
        backend.encode_special_tokens = True  # "<|endoftext|>" written in a document is text, not the end of it
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = fingerprint("tokenizers", backend.to_str(), eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens added; uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these token ids, without special tokens."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and beside it which token ends a text."""
        _save_backend(self._backend, self.eos_id, folder)


class PretrainedTokenizer:
    """A tokenizer that `transformers.AutoTokenizer` loaded."""

    def __init__(self, tokenizer: Any, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_id = eos_id
        vocab = tokenizer.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else sorted(vocab.items())
        self.fingerprint = fingerprint("transformers", type(tokenizer).__name__, state, eos_id)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens added."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents are longer than the model's positions, and are cut later
        )
        return [np.array(ids, dtype=np.uint32) for ids in encoded["input_ids"]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these token ids, without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write it as it was loaded."""
        self._tokenizer.save_pretrained(str(folder))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder that is whole or not there, in the place of an older one.

    Raises:
        EnvError: it cannot be written.
    """
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            whole = Path(temporary) / folder.name
            whole.mkdir()
            tokenizer.save(whole)
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            whole.rename(folder)


def _byte_characters() -> dict[str, int]:
    """The printable character by which byte-level tokenizers write each byte -> the byte.

    Source: GPT-2's encoder.py, `bytes_to_unicode`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + number): byte for number, byte in enumerate(others)}}


def _save_backend(backend: Any, eos_id: int, folder: Path) -> None:
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": backend.id_to_token(eos_id),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def build_tokenizer(
    data: schema.Data, *, source_fingerprint: str, texts: Callable[[], Iterable[str]], say: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer that data.tokenizer names.

    Args:
        source_fingerprint: identifies the corpus, for the cache of a trained tokenizer.
        texts: the training documents; called only when a tokenizer has to be trained.

    Raises:
        DataError: no such tokenizer, or it has no end-of-text token, or the corpus is too small to train one.
        EnvError: the cache cannot be written.
    """
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer != "bpe":
        return load_tokenizer(data.tokenizer)
    size = data.bpe_vocab_size
    target = cache_root(data) / "tokenizers" / f"bpe-{fingerprint(_BPE_VERSION, source_fingerprint, size)[:16]}"

    def build(folder: Path) -> None:
        say(f"tokenizer: training a BPE of {size} tokens on the corpus")
        _train_bpe(texts(), size).save(str(folder / "tokenizer.json"))

    build_once(target, damage=_bpe_damage, build=build, say=say, what="tokenizer")
    return load_tokenizer(str(target / "tokenizer.json"))


def vocab_size(data: schema.Data) -> int:
    """Token ids that the data can hold, without reading the corpus.

    Raises:
        DataError: data.tokenizer names no tokenizer.
    """
    if data.tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    return data.bpe_vocab_size if data.tokenizer == "bpe" else load_tokenizer(data.tokenizer).vocab_size


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by path: a tokenizer.json, a folder with one, or a Hugging Face hub id.

    Raises:
        DataError: there is none, or it has no end-of-text token.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _from_json(path)
    if is_missing_path(name):
        raise _no_tokenizer(name, "there is no such file or folder.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:  # a bad name surfaces as OSError, ValueError or a hub or tokenizers error
        where = "this folder" if path.exists() else "the Hugging Face hub"
        cause = str(error).strip().splitlines()
        raise _no_tokenizer(name, f"{where} gave no tokenizer ({cause[0] if cause else type(error).__name__}).") from error
    if tokenizer.eos_token_id is None:
        raise _no_eos(name)
    return PretrainedTokenizer(tokenizer, tokenizer.eos_token_id)


def _from_json(path: Path) -> JsonTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise _no_tokenizer(str(path), f"this file is not a tokenizer.json ({error}).") from error
    ids = [backend.token_to_id(name) for name in _eos_names(path)]
    eos_id = next((i for i in ids if i is not None), None)
    if eos_id is None:
        raise _no_eos(str(path))
    return JsonTokenizer(backend, eos_id)


def _eos_names(path: Path) -> list[str]:
    """Candidates for the end-of-text token, the one that the file next to it names first."""
    try:
        told = json.loads(path.with_name("tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        told = None
    told = told.get("content") if isinstance(told, dict) else told
    return [told, *_EOS_NAMES] if told else list(_EOS_NAMES)


def _train_bpe(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE of exactly `size` tokens; the same texts give the same tokenizer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_at_most(texts, _BPE_MAX_BYTES), trainer)
    trained = backend.get_vocab_size()
    if trained < size:
        reason = f"the corpus has only enough text for {trained} tokens."
        raise DataError(Problem("data.bpe_vocab_size", size, reason, f"Set it to {trained} or less, or use more text."))
    return backend


def _at_most(texts: Iterable[str], num_bytes: int) -> Iterable[str]:
    for text in texts:
        if num_bytes <= 0:
            return
        yield text
        num_bytes -= len(text)


def _bpe_damage(folder: Path) -> str | None:
    try:
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _no_tokenizer(name: str, reason: str) -> DataError:
    near = difflib.get_close_matches(name, BUILT_IN_TOKENIZERS, n=1)
    fix = f"Did you mean {near[0]}? " if near else ""
    fix += "Set bytes, bpe, or the path of a tokenizer.json or of a Hugging Face tokenizer's folder, or its hub id."
    return DataError(Problem("data.tokenizer", name, reason, fix))


def _no_eos(name: str) -> DataError:
    reason = "it has no end-of-text token, which separates documents."
    return DataError(Problem("data.tokenizer", name, reason, "Set eos_token in the tokenizer_config.json next to it."))
