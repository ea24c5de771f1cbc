"""What a command says when its input is wrong."""

import functools
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from ..atomic_files import escape_unprintable


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM, which schedulers and containers send, ends a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with exit code 2 and the message of an error that its user can mend, without a traceback."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        from ..registration import register

        for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal cannot show
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        register()  # which importing the package leaves to the commands; see `transformers_rfdetr`
        try:
            command(*args, **kwargs)
        except (OSError, ValueError, ImportError, FloatingPointError) as error:
            lines = [escape_unprintable(line) for line in str(error).splitlines()]
            typer.echo(f"{command.__name__.replace('_', '-')}: " + "\n".join(lines), err=True)
            raise typer.Exit(2) from error

    return run
