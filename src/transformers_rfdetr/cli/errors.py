"""How a command ends after an error or a signal."""

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
    """Handle SIGTERM, which schedulers and containers send, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command print the message of an error that its user can correct, and end with code 2, no traceback."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        from ..registration import register

        for stream in (sys.stdout, sys.stderr):  # names of files may have characters that the terminal cannot show
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        register()  # for commands, importing the package does not register; see `transformers_rfdetr`
        try:
            command(*args, **kwargs)
        except (OSError, ValueError, ImportError, FloatingPointError) as error:
            lines = [escape_unprintable(line) for line in str(error).splitlines()]
            typer.echo(f"{command.__name__.replace('_', '-')}: " + "\n".join(lines), err=True)
            raise typer.Exit(2) from error

    return run
