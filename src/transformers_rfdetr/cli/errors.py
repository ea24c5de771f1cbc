"""What a command says when its input is wrong."""

import functools
from collections.abc import Callable

import typer


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with exit code 2 and the message of an error that its user can mend, without a traceback."""

    @functools.wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except (OSError, ValueError, ImportError, FloatingPointError) as error:
            typer.echo(f"{command.__name__.replace('_', '-')}: {error}", err=True)
            raise typer.Exit(2) from error

    return run
