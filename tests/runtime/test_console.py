from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import click
import pytest

from mammut_runtime import console
from mammut_runtime.errors import BundleError, InputError, MammutError, VerificationError


def command_that(raises: BaseException | None = None, returns: object = None) -> click.Command:
    @click.command("tool")
    @click.option("--count", type=click.IntRange(1, 5), default=1)
    def tool(count: int) -> object:
        if raises is not None:
            raise raises
        return returns

    return tool


@pytest.mark.parametrize(
    "problem, code, line",
    [
        (InputError("cat.jpg: not a picture"), 2, "error: cat.jpg: not a picture\n"),
        (BundleError("two\nlines"), 2, "error: two lines\n"),
        (VerificationError("canary differs"), 1, "error: canary differs\n"),
        (MammutError("\x1b[31mred"), 2, "error: \\x1b[31mred\n"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "error: No such file or directory: x.txt\n"),
        (click.BadParameter("wrong"), 2, "error: Invalid value: wrong; see tool --help\n"),
    ],
)
def test_each_error_is_one_line_and_its_exit_code(
    problem: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(command_that(raises=problem), []) == code
    out, err = capsys.readouterr()
    assert out == "" and err == line


def test_success_and_chosen_exit_codes() -> None:
    assert console.run(command_that(), []) == 0
    assert console.run(command_that(returns=2), []) == 2
    assert console.run(command_that(returns="text"), []) == 0
    assert console.run(command_that(), ["--help"]) == 0


def test_usage_errors_are_one_line_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command_that(), ["--nonsense"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "--nonsense" in err and err.endswith("--help\n") and err.count("\n") == 1
    assert console.run(command_that(), ["--count", "9"]) == 2
    assert "1<=x<=5" in capsys.readouterr().err


def test_a_bug_is_one_line_unless_the_traceback_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(console.DEBUG_VARIABLE, raising=False)
    assert console.run(command_that(raises=KeyError("key")), []) == 70
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "KeyError" in err and "MAMMUT_DEBUG=1" in err
    monkeypatch.setenv(console.DEBUG_VARIABLE, "1")
    assert console.run(command_that(raises=KeyError("key")), []) == 70
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command_that(raises=KeyboardInterrupt()), []) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.strip() == ""


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "tool.py"
    path.write_text(
        "import sys, time, click\nfrom mammut_runtime import console\n\n@click.command()\ndef tool():\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\n\nsys.exit(console.run(tool))\n"
    )
    return [sys.executable, str(path)]


def test_a_reader_that_goes_away_is_quiet(tmp_path: Path) -> None:
    body = "for number in range(200_000):\n    click.echo(number)"
    with subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_in_a_process_is_quiet(tmp_path: Path) -> None:
    body = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell's background jobs start without
        "click.echo('ready')\nsys.stdout.flush()\ntime.sleep(60)"
    )
    with subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == b""
        assert process.wait() == 130


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
@pytest.mark.parametrize(("sent", "code", "left"), [("SIGTERM", 143, False), ("SIGKILL", -9, True)])
def test_a_terminated_process_cleans_up(tmp_path: Path, sent: str, code: int, left: bool) -> None:
    """SIGKILL, which nobody can handle, is the control."""
    body = (
        "import tempfile\n"
        f"with tempfile.TemporaryDirectory(prefix='half-made', dir={str(tmp_path)!r}):\n"
        "    click.echo('ready')\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen(script(tmp_path, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(getattr(signal, sent))
        assert process.stderr.read().strip() == b""
        assert process.wait() == code
    assert bool(list(tmp_path.glob("half-made*"))) == left


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        with console.Progress("pictures", 4, stream) as progress:
            progress(2)
            time.sleep(0.11)
            progress.advance(note="cat.jpg")
    assert "\rpictures [###############.....] 3/4" in terminal.getvalue() and "cat.jpg" in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r"), "the bar is removed at the end"
    assert pipe.getvalue() == ""


def test_printing_removes_the_bar_first(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    with console.Progress("pictures", 2, terminal) as progress:
        progress.print("cat.jpg: a cat")
    assert capsys.readouterr().out == "cat.jpg: a cat\n"
    assert terminal.getvalue().count("pictures") == 2  # drawn, removed, drawn again


def test_track_yields_everything() -> None:
    assert list(console.track([1, 2, 3], "numbers")) == [1, 2, 3]
    assert list(console.track(iter("ab"), "letters")) == ["a", "b"]


@pytest.mark.parametrize(
    "done, total, expected",
    [
        (0, 10, "x [....................] 0/10"),
        (5, 10, "x [##########..........] 5/10 1:01 left"),
        (12, 10, "x [####################] 12/10"),
        (7, None, "x 7 1:01"),
        (0, 0, "x 0 1:01"),
    ],
)
def test_bar_line(done: int, total: int | None, expected: str) -> None:
    assert console.bar_line("x", done, total, 61.0) == expected


def test_json_lines_survive_every_locale(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_json({"path": "caf\u00e9\udce9", "score": float("nan"), "list": [float("inf"), 1.5]})
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == {"path": "caf\u00e9\udce9", "score": None, "list": [None, 1.5]}
