"""The token cache under several real processes: one does the work, and a killed one leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

BUILD = textwrap.dedent("""
    import sys
    from anyshard.configs import schema
    from anyshard.trainer.data.build import build_data
    keys = dict(source="text", path=sys.argv[1], cache_dir=sys.argv[2], tokenizer="bpe", bpe_vocab_size=400, sequence_length=64)
    splits = build_data(schema.Data(**keys), seed=0, say=lambda line: print("SAID", line))
    print("TRAIN", len(splits.train), splits.train[len(splits.train) - 1]["labels"].sum(), splits.fingerprint)
""")

STUCK = textwrap.dedent("""
    import sys, time
    from anyshard.trainer.data.documents import Document, Documents
    from anyshard.trainer.data.tokenizers import ByteTokenizer
    from anyshard.trainer.data.tokens import tokenize
    from pathlib import Path

    def read():
        yield Document("text " * 2_000_000)
        print("WRITING", flush=True)
        time.sleep(float(sys.argv[2]))

    folder = tokenize(Documents("corpus", read), ByteTokenizer(), root=Path(sys.argv[1]), max_tokens=None, say=print)
    print("DONE", folder, flush=True)
""")


def start(script: str, *args: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(20):
        lines = [f"line {i} of file {number}: " + " ".join(f"w{(i * j + number) % 97}" for j in range(20)) for i in range(100)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def test_one_process_works_and_all_see_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    outputs = [finish(p) for p in [start(BUILD, corpus, tmp_path / "cache") for _ in range(3)]]
    assert "".join(outputs).count("training a BPE") == 1
    assert len({line for out in outputs for line in out.splitlines() if line.startswith("TRAIN")}) == 1
    assert not list((tmp_path / "cache").rglob(".*tmp*"))


def test_training_a_tokenizer_does_not_depend_on_threads(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    threads = ("1", "2")
    processes = [start(BUILD, corpus, tmp_path / count, RAYON_NUM_THREADS=count) for count in threads]
    assert len({finish(process).splitlines()[-1] for process in processes}) == 1
    files = [file.read_bytes() for count in threads for file in (tmp_path / count).rglob("tokenizer.json")]
    assert len(files) == 2
    assert files[0] == files[1]


def test_the_one_that_waits_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    first = start(STUCK, tmp_path, 600)
    assert first.stdout is not None
    assert first.stdout.readline() == "WRITING\n"
    second = start(STUCK, tmp_path, 0)
    time.sleep(0.5)
    assert second.poll() is None  # waits for the lock
    first.send_signal(signal.SIGKILL)
    first.communicate()
    folder = Path(finish(second).splitlines()[-1].removeprefix("DONE "))
    assert (folder / "train.bin").stat().st_size == 2 * 10_000_001
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
