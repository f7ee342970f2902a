"""The configuration reference is what the schema says now."""

from __future__ import annotations

from pathlib import Path

from anyshard.configs.keys import all_keys
from anyshard.configs.reference import describe_file, main, render
from anyshard.configs.sources import OURS, group_choices

REFERENCE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_reference_is_not_stale() -> None:
    command = "python -m anyshard.configs.reference docs/configuration.md"
    assert REFERENCE.read_text(encoding="utf-8") == render(), f"run: {command}"


def test_every_key_has_a_row() -> None:
    text = render()
    for path in all_keys():
        assert text.count(f"| `{path}` |") == 1, path


def test_rows_have_seven_cells() -> None:
    rows = [line for line in render().splitlines() if line.startswith("| `")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}


def test_unit_range_and_reason_have_their_cells() -> None:
    row = next(line for line in render().splitlines() if line.startswith("| `checkpoint.staging_gib`"))
    cells = [cell.strip() for cell in row.replace("\\|", "").split("|")]
    key = all_keys()["checkpoint.staging_gib"]
    assert cells[4:6] == ["> 0", "GiB"]
    assert cells[7] == key.why != ""


def test_what_looks_like_a_tag_is_shown() -> None:
    assert "null: \\<run.dir>/checkpoints" in render()


def test_every_file_says_what_it_is() -> None:
    for group, names in group_choices([OURS]).items():
        for name in names:
            assert describe_file(OURS / group / f"{name}.yaml"), f"{group}/{name}.yaml has no comment at its top"


def test_it_is_written_where_told(tmp_path: Path) -> None:
    main([str(tmp_path / "out.md")])
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == render()
