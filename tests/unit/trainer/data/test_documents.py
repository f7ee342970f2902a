from __future__ import annotations

import os
from pathlib import Path

import pytest

from anyshard.configs.errors import DataError
from anyshard.trainer.data import documents
from anyshard.trainer.data.documents import TextReader, check_readable, files_fingerprint, held_out, held_out_files


def read(path: Path, field: str = "text", **span: int) -> list[tuple[int, str]]:
    return list(TextReader("data.path", field).read_file(path, **span))


def test_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo ä\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == [(0, "one\ntwo ä\n")]


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    content = "".join(f"line {i} äöü\n" for i in range(60))
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    pieces = [text for _, text in read(tmp_path / "a.txt")]
    assert "".join(pieces) == content
    assert len(pieces) > 5
    assert all(piece.endswith("\n") and len(piece.encode()) < 120 for piece in pieces)


def test_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    assert read(tmp_path / "a.txt", start=4) == [(0, "two\nthree\n")]
    assert read(tmp_path / "a.txt", stop=4) == [(0, "one\n")]


def test_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "tw\\u00f6"}\n')
    assert read(tmp_path / "a.jsonl") == [(1, "one"), (3, "twö")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"data\.path=.*a\.jsonl, line 2: not JSON .*one JSON object"),
        (
            '{"body": "x", "title": "y", "n": 3}',
            r"data\.field=text: .*a\.jsonl, line 2: this field is missing\. Set data\.field to one of body, title\.",
        ),
        ('{"n": 3}', r"line 2: this field is missing\. Give each line a field"),
        ('{"text": 3}', r"line 2: this field is not a string"),
        ("[1]", r'line 2: list, not an object\. .*\{"text": "\.\.\."\}'),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_what_is_not_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff \xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xe9"}\n{"text": "fine"}\n')
    reader = TextReader("data.path", "text")
    for _ in range(2):  # reading again does not count again
        assert [text for _, text in reader.read_file(tmp_path / "a.txt")] == ["caf\ufffd \ufffd \ufffd"]
        assert reader.notes() == [f"2 byte sequences are not UTF-8 and were replaced by U+FFFD, in {tmp_path / 'a.txt'}"]
    list(reader.read_file(tmp_path / "b.jsonl"))
    assert reader.notes()[0].startswith("3 byte sequences")
    assert "in 2 files" in reader.notes()[0]


def test_nothing_replaced_nothing_noted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    reader = TextReader("data.path", "text")
    list(reader.read_file(tmp_path / "a.txt"))
    assert reader.notes() == []


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x7fELF\0\0")
    with pytest.raises(DataError, match=r"binary file.*UTF-8 text"):
        read(tmp_path / "a.txt")


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*gone\.txt: cannot be read \(No such file"):
        read(tmp_path / "gone.txt")


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, folder, secret = tmp_path / "link.txt", tmp_path / "folder.txt", tmp_path / "secret.txt"
    link.symlink_to("nowhere")
    folder.mkdir()
    secret.write_text("x")
    with pytest.raises(DataError, match=r"data\.path=.*link\.txt: cannot be read \(a dangling link\)"):
        check_readable("data.path", [link])
    with pytest.raises(DataError, match="not a regular file"):
        check_readable("data.path", [folder])
    if os.geteuid() == 0:  # root may read anything
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        secret.chmod(0)
    with pytest.raises(DataError, match="permission denied"):
        check_readable("data.path", [secret])


def test_held_out_is_a_stable_share() -> None:
    names = [f"document {i}" for i in range(20_000)]
    kept = {name for name in names if held_out(name, 0.05)}
    assert 0.045 < len(kept) / len(names) < 0.055
    assert kept < {name for name in names if held_out(name, 0.1)}
    assert not any(held_out(name, 0.0) for name in names)


def test_held_out_files_are_at_least_one_and_not_all() -> None:
    for count in range(2, 30):
        names = [f"{i}.txt" for i in range(count)]
        assert 1 <= len(held_out_files(names, 0.05)) < count
        assert 1 <= len(held_out_files(names, 0.5)) < count
    many = [f"{i}.txt" for i in range(2000)]
    assert held_out_files(many, 0.05) == {name for name in many if held_out(name, 0.05)}
    assert held_out_files(["only.txt"], 0.05) == held_out_files(many, 0.0) == set()


def test_fingerprint_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.txt"
    file.parent.mkdir()
    file.write_text("one")
    before = files_fingerprint(file.parent, [file])
    file.parent.rename(tmp_path / "b")
    moved = tmp_path / "b" / "x.txt"
    assert files_fingerprint(moved.parent, [moved]) == before
    os.utime(moved, ns=(0, 0))
    assert files_fingerprint(moved.parent, [moved]) != before
