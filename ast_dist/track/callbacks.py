"""Functions of the user's own, in one file by its path, called as a run goes on: `--track.callbacks hooks.py`.

    def on_step(row):
        if row["train/loss"] and row["train/loss"] > 10:
            print("loss is high at step", row["global_step"])

    def on_epoch(row):
        print("epoch", row["epoch"], "top-1", row.get("val/acc1"))

    def on_checkpoint(info):
        print("saved", info["path"], "top-1", info["val_acc1"])

Any of the three will do. They are a view, called by rank 0 after the row is on disk, in the thread that trains: what
they take, training waits for.
"""

import functools
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from ast_dist.errors import UserError, described

NAMES = ("on_step", "on_epoch", "on_checkpoint")
_MOST_SHARE = 0.01
# Before that, a file that is read once or a connection that is opened would count as slow.
_JUDGED_AFTER_S = 60.0

Call = Callable[[dict[str, Any]], object]


@functools.cache
def load(path: str) -> dict[str, Call]:
    """The functions of a file, by their name. A process runs it once, however often it is loaded.

    Raises UserError where there is no such file, it fails, or has none of `NAMES` as a function.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"track.callbacks {path}: no such file. Name a .py file, or leave the setting out.")
    spec = importlib.util.spec_from_file_location("ast_dist_callbacks", file.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"track.callbacks {path}: not a .py file. Rename it to {file.stem}.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"track.callbacks {path}: line {error.lineno}: {error.msg}. Mend it.") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"track.callbacks {path}{_line_in(error, file)}: {described(error)}. Mend it.") from error
    found = {name: value for name in NAMES if (value := getattr(module, name, None)) is not None}
    for name, value in found.items():
        if not callable(value):
            raise UserError(f"track.callbacks {path}: {name} is a {type(value).__name__}. Make it a function.")
        if isinstance(value, FunctionType) and not _takes_one(value):
            raise UserError(f"track.callbacks {path}: {name} must take one argument, as in `def {name}(row):`.")
    if not found:
        raise UserError(f"track.callbacks {path}: has none of {', '.join(NAMES)}. Define one of these functions.")
    return found


class Callbacks:
    """Calls the functions of a file, and lets no failure of theirs out.

    path: of the file. warn: called with one line. now: seconds. Raises UserError as `load` does.
    """

    def __init__(self, path: str, warn: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(path)
        self._calls = dict(load(path))
        self._warn = warn
        self._now = now
        self._began = now()
        self._spent_s = 0.0
        self._is_judged = False

    def call(self, name: str, told: Mapping[str, Any]) -> None:
        """Call a function where the file has it, with a copy of `told`. The first error is a warning and its end."""
        function = self._calls.get(name)
        if function is None:
            return
        began = self._now()
        try:
            function(dict(told))
        except (Exception, SystemExit) as error:
            del self._calls[name]
            where = f"{self._path}: {name}{_line_in(error, self._path)}"
            self._warn(f"{where}: {described(error)}. It is not called again. Training goes on.")
        self._spent_s += self._now() - began
        self._judge()

    def _judge(self) -> None:
        elapsed_s = self._now() - self._began
        if not self._is_judged and elapsed_s > _JUDGED_AFTER_S and self._spent_s > _MOST_SHARE * elapsed_s:
            self._is_judged = True
            share = self._spent_s / elapsed_s
            self._warn(
                f"{self._path}: its functions took {self._spent_s:.1f} s of {elapsed_s:.0f} s ({share:.1%}), and "
                "training waits for them. Make them quicker, or hand work to a thread."
            )


def _takes_one(function: FunctionType) -> bool:
    code, given = function.__code__, len(function.__defaults__ or ())
    takes_any = bool(code.co_flags & 0x04)
    return (code.co_argcount >= 1 or takes_any) and code.co_argcount - given <= 1


def _line_in(error: BaseException, file: Path) -> str:
    """ ", line 12": the innermost line of the file that an error came through; nothing where it came through none."""
    path = str(file.absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""
