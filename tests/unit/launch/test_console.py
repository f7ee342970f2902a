import io

from rich.table import Table

from anyshard.launch import console


def test_nothing_is_cut_off_where_there_is_no_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    table = Table("name")
    table.add_row("model." + "layers." * 60)
    console.make_console().print(table)
    assert "model." + "layers." * 60 in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) < 500


def test_a_terminal_has_its_own_width(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "70")
    assert console.make_console().width == 70
