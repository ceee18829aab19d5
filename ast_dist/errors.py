"""The one exception a person can mend, and how a command ends on it."""

import io
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that the person who typed the command can mend.

    The message is one line: what is wrong, where, both numbers where there are two, and what to do next.
    Commands turn it into exit code 2; nothing on disk has been changed when it is raised.
    """


class RankError(UserError):
    """A UserError that one rank may meet alone, in the middle of a run: whoever meets it prints it."""


def require(holds: bool, message: str) -> None:
    """Raise a UserError with `message` unless `holds`."""
    if not holds:
        raise UserError(message)


def require_share(name: str, value: float) -> None:
    """Raise a UserError unless a setting lies in 0 … 1."""
    require(0.0 <= value <= 1.0, f"{name} is {value:g}, but a share lies in 0 … 1.")


def described(error: BaseException) -> str:
    """An error's type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code: 2 with one line on stderr for a UserError, 130 for Ctrl-C.

    Under torchrun only local rank 0 prints, since every rank finds the same fault in the same input (but a RankError).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets a question mark, not a traceback
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # `… | head` has read enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
