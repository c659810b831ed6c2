"""What the tools share about measuring, tools/measuring.py."""

import ast
import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from tools import measuring
from videogru.errors import DataError


def test_ratios_are_taken_within_a_round() -> None:
    rows = [
        measuring.Row("one", rates=[100.0, 10.0, 50.0]),
        measuring.Row("two", rates=[150.0, 30.0, 50.0], shares=[0.1, 0.3, 0.2]),
    ]
    group = measuring.Group("Speed", rows)
    assert group.ratios(rows[1]) == [1.5, 3.0, 1.0]
    assert group.markdown()[-2] == "| two | 50 (30–150) | 1.50 (1.00–3.00) | 20% (10%–30%) |"
    assert group.figures()["rows"][1]["ratios"] == [1.5, 3.0, 1.0]


def test_contenders_alternate() -> None:
    order: list[str] = []

    def turn(row: measuring.Row) -> None:
        order.append(row.name)
        row.rates.append(float(len(order)))

    group = measuring.alternate("Order", [(measuring.Row("a"), turn), (measuring.Row("b"), turn)], rounds=3)
    assert order == ["a", "b"] * 3
    assert [row.rates for row in group.rows] == [[1, 3, 5], [2, 4, 6]]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["python", "tools/x.py", "--data-dir", "/home/me/cifar"], "python tools/x.py --data-dir DIR"),
        (["--data-dir=/home/me/cifar", "--seeds", "0,1"], "--data-dir=DIR --seeds 0,1"),
        (
            ["--data-dir", "../cifar", "--work", "/a/b/runs/cpu", "--out=/a/docs"],
            "--data-dir DIR --work cpu --out=docs",
        ),
        (["--out", "docs/article", "--minutes", "0"], "--out docs/article --minutes 0"),
        (["--data-dir", "a b", "--data-dir-of", "x"], "--data-dir DIR --data-dir-of x"),
        (["--data-dir", "/a=b", "my gru=/a/runs/gru", "/c=d/e"], "--data-dir DIR 'my gru=gru' e"),
    ],
)
def test_a_published_command_does_not_tell_where_things_lie(words: list[str], shown: str) -> None:
    assert measuring.published(words) == shown


@pytest.mark.parametrize("word", ["--data", "--data-di=x", "--ou"])
def test_flags_are_not_abbreviated(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = measuring.Parser(prog="x.py")
    parser.add_argument("--data-dir")
    parser.add_argument("--out")
    assert parser.parse_args(["--data-dir=a", "--out", "b"]).data_dir == "a"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([word, "y"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"x.py: unrecognized arguments: {word} y\n"


def test_no_tool_takes_abbreviations(repository: Path) -> None:
    found = 0
    for path in (repository / "tools").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                found += 1
                assert "allow_abbrev=False" in map(ast.unparse, node.keywords), path.name
    assert found == 2  # the others take measuring.Parser


def test_facts_of_the_machine(repository: Path) -> None:
    facts = measuring.machine(["python", "tools/x.py", "--data-dir", "/secret"])
    assert facts["command"] == "python tools/x.py --data-dir DIR"
    assert (facts["cores"], facts["cores present"]) == (len(os.sched_getaffinity(0)), os.cpu_count())
    assert (facts["threads"], facts["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert (facts["gpu"] is None) != torch.cuda.is_available()
    assert abs((datetime.now(UTC).date() - datetime.fromisoformat(str(facts["date"])).date()).days) <= 1
    git = ["git", "-C", str(repository)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert facts["commit"] is None
    else:
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
        assert facts["commit"] == head.stdout[:12] + "-dirty" * changed
    sentence, lines = measuring.machine_sentence(facts), measuring.machine_lines(facts)
    for name, value in facts.items():
        assert ("no GPU" if value is None and name == "gpu" else str(value)) in sentence
        assert len([line for line in lines if line.startswith(f"- {name}: ")]) == 1
    assert "- command: `python tools/x.py --data-dir DIR`" in lines


def test_the_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    facts = measuring.machine(["x"])
    assert (facts["cores"], facts["cores present"]) == (3, 64)
    assert "3 of 64 cores" in measuring.machine_sentence(facts)


def test_ends_of_a_tool(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        raise error

    assert measuring.exit_code("x.py", lambda: None, kept="all") == 0
    assert measuring.exit_code("x.py", lambda: 7, kept="all") == 7
    assert capsys.readouterr().err == ""
    assert measuring.exit_code("x.py", lambda: fails(DataError("gone", where="a", hint="look")), kept="all") == 2
    assert capsys.readouterr().err == "x.py: a: gone. look\n"
    assert measuring.exit_code("x.py", lambda: fails(KeyboardInterrupt()), kept="all") == 130
    assert capsys.readouterr().err == "x.py: stopped; all\n"
    with pytest.raises(KeyError):
        measuring.exit_code("x.py", lambda: fails(KeyError()), kept="all")


def test_the_error_of_a_traceback() -> None:
    assert measuring.last_error("Trace\n  x\nKeyError: 7\nand so on\n") == "KeyError: 7"
    assert measuring.last_error("a\nb\n") == "b"
    assert measuring.last_error("") == "ended without a word"


class Broken:
    """A figure that fails in the middle of being saved."""

    def savefig(self, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    measuring.write_json(tmp_path / "new/a.json", {"x": [1.5, None]})
    assert json.loads((tmp_path / "new/a.json").read_text()) == {"x": [1.5, None]}
    with pytest.raises(ValueError, match="NaN|float"):
        measuring.write_json(tmp_path / "new/a.json", {"x": float("nan")})
    (tmp_path / "new/b.png").write_bytes(b"before")
    with pytest.raises(DataError, match=r"b\.png: cannot be written: No space"):
        measuring.write_picture(tmp_path / "new/b.png", Broken())
    assert (tmp_path / "new/b.png").read_bytes() == b"before"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        measuring.write_picture(tmp_path / "file/c.png", Broken())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "b.png", "file", "new"]
    assert json.loads((tmp_path / "new/a.json").read_text()) == {"x": [1.5, None]}


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "absent").read_text()

    assert measuring.exit_code("tool.py", work, kept="all") == 2
    assert capsys.readouterr().err == f"tool.py: {tmp_path / 'absent'}: No such file or directory\n"
