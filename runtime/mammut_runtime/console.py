"""What every command of this software does alike: errors on one line, exit codes, notes and progress.

A command's entry point is one line, `return console.run(cli)`, and its callbacks simply raise. Nothing here asks the
user anything: a command that runs in a script must never wait for an answer.

    exit code   meaning
    0           done
    1           VerificationError: numbers differ from what was promised
    2           the input, an option, a file or the surroundings cannot be used
    70          a bug of ours (MAMMUT_DEBUG=1 shows where)
    130         Ctrl-C
    141         the reader of our output went away (`mammut-run ... | head`)

Results go to stdout; notes, errors and progress bars go to stderr, so that `--json` output can be piped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

import click

from mammut_runtime.errors import MammutError

T = TypeVar("T")

EXIT_USAGE = 2
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
EXIT_BROKEN_PIPE = 141

_HELP_WANTED: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click >= 8.2 raises for a group without a subcommand; older ones print the help themselves."""

DEBUG_VARIABLE = "MAMMUT_DEBUG"
"""Set to 1, a failing command also prints its traceback."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a click command as a whole process would, and return the exit code instead of exiting.

    arguments: without the program's name; None takes them from the command line.
    A callback may return an int: it becomes the exit code (any other value, None included, means 0).
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    _clean_up_when_terminated()
    try:
        # Not command.main: it hides a broken pipe behind the exit code 1, which means something else here.
        with command.make_context(_program_name(command, arguments), given) as context:
            result = command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:  # --help, --version
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except _Terminated:
        return EXIT_TERMINATED
    except BrokenPipeError:
        return _leave_broken_pipe()
    except click.UsageError as problem:
        if problem.ctx is not None and isinstance(problem, _HELP_WANTED):
            click.echo(problem.ctx.get_help(), err=True)
            return EXIT_USAGE
        return _report(problem)
    except Exception as problem:
        return _report(problem)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


class _Terminated(BaseException):
    """SIGTERM came."""


def _clean_up_when_terminated() -> None:
    """Let SIGTERM unwind the program, as ctrl-C does, so that half-made folders are removed."""

    def stop(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


def _program_name(command: click.Command, arguments: Sequence[str] | None) -> str | None:
    """What usage texts call this program: the script it was started by, if it was."""
    script = Path(sys.argv[0]).name if arguments is None else ""
    return script if script and not script.endswith(".py") else command.name


def error_line(problem: BaseException) -> str:
    """The one line that stands for an error, without `error: ` in front."""
    if isinstance(problem, click.UsageError):
        help_command = f"; see {problem.ctx.command_path} --help" if problem.ctx else ""
        return printable(problem.format_message()).rstrip(".") + help_command
    if isinstance(problem, click.ClickException):
        return printable(problem.format_message())
    if isinstance(problem, MammutError):
        return printable(str(problem))
    if isinstance(problem, OSError) and problem.strerror:
        name = f": {problem.filename}" if problem.filename is not None else ""
        return printable(f"{problem.strerror}{name}")
    if isinstance(problem, MemoryError):
        return "out of memory; try fewer pictures or texts at once, or a smaller model"
    kind = type(problem).__name__
    return printable(f"unexpected {kind}: {problem}; this is a bug, {DEBUG_VARIABLE}=1 shows where it happened")


def exit_code(problem: BaseException) -> int:
    """The exit code that an error stands for (see the table above)."""
    if isinstance(problem, MammutError):
        return problem.exit_code
    if isinstance(problem, click.ClickException | OSError | MemoryError):
        return EXIT_USAGE
    return EXIT_BUG


def printable(text: str) -> str:
    """The text on one line, with line ends as spaces and other control characters escaped.

    File names and messages may hold anything: a terminal must not obey it, and stdout must be able to encode it.
    """
    joined = " ".join(text.split("\n"))
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in joined)


def note(message: str) -> None:
    """One line on stderr: a warning or where something was written. Not a result."""
    click.echo(printable(message), err=True)


def json_line(value: dict[str, Any]) -> str:
    """One line of JSON: ASCII, so that it survives every locale; NaN and infinities become null."""
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False)


def echo_json(value: dict[str, Any]) -> None:
    """One JSON line on stdout."""
    click.echo(json_line(value))


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many are done, on a terminal; silent elsewhere.

    total: how many there are; None takes `len(items)` where there is one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.advance()


class Progress:
    """A progress bar on stderr, drawn only when stderr is a terminal.

    with Progress("pictures", total=200) as progress:
        progress.advance()                  # one more is done
        progress(50)                        # or as a callback: so many are done
        progress.print("cat.jpg: a cat")    # a result on stdout that does not collide with the bar
    """

    REDRAW_S = 0.1
    """Shortest time between two drawings: a fast loop must not spend its time on the terminal."""

    def __init__(self, label: str, total: int | None = None, stream: TextIO | None = None) -> None:
        self._label = label
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._done = 0
        self._note = ""
        self._started = time.monotonic()
        self._drawn = -self.REDRAW_S
        self._width = 0

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """So many are done (of so many, where that is only known now); note: shown behind the bar."""
        self._done = done
        self._total = self._total if total is None else total
        self._note = note
        if time.monotonic() - self._drawn >= self.REDRAW_S:
            self._draw()

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self(self._done + count, note=note)

    def print(self, line: str) -> None:
        """Write one line to stdout, above the bar."""
        self.clear()
        click.echo(line)
        self._draw()

    @property
    def done(self) -> int:
        """How many are done so far."""
        return self._done

    def clear(self) -> None:
        """Remove the bar until the next update, so that something else can be written."""
        if self._shown and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0

    def _draw(self) -> None:
        if not self._shown:
            return
        line = bar_line(self._label, self._done, self._total, time.monotonic() - self._started, self._note)
        line = line[: shutil.get_terminal_size().columns - 1]
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)
        self._drawn = time.monotonic()


def bar_line(label: str, done: int, total: int | None, elapsed_s: float, note: str = "") -> str:
    """A progress bar as text, e.g. `captions [########............] 40/100 0:12 left`."""
    behind = f" {printable(note)}" if note else ""
    if not total:
        return f"{label} {done} {_clock(elapsed_s)}{behind}"
    filled = min(20, 20 * done // total)
    bar = "#" * filled + "." * (20 - filled)
    left = f" {_clock(elapsed_s * (total - done) / done)} left" if 0 < done < total else ""
    return f"{label} [{bar}] {done}/{total}{left}{behind}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _report(problem: Exception) -> int:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(problem)
    click.echo(f"error: {error_line(problem)}", err=True)
    return exit_code(problem)


def _leave_broken_pipe() -> int:
    """Make the interpreter's own flush at exit succeed: otherwise it would complain about the closed pipe again."""
    with contextlib.suppress(OSError):  # no stdout at all: nothing to flush either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return EXIT_BROKEN_PIPE


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
