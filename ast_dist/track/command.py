"""The command that started this process, as a person would type it again."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ast_dist.outcome_file import COMMAND_VARIABLE


def typed_command() -> str | None:
    """The whole command line, quoted for a shell: torchrun's, or a supervisor's, where one started this process.

    Variables set before it and the folder it was typed in are not known. None where there is no command that would do
    the same again: in a notebook, in an interactive Python, after `python -c`.
    """
    if said := os.environ.get(COMMAND_VARIABLE):
        return said
    if "TORCHELASTIC_RUN_ID" in os.environ and (agents := _torchrun(_words_of(os.getppid()))):
        return shlex.join(agents)
    words = sys.orig_argv
    if len(words) >= 2 and Path(words[1]).name == "ast-dist":
        words = ["ast-dist", *words[2:]]
    return shlex.join(words) if _says_what(words[1:]) else None


def _says_what(words: Sequence[str]) -> bool:
    """Whether an interpreter's arguments name a script or a module that is no notebook's."""
    if any("ipykernel" in word for word in words):
        return False
    for position, word in enumerate(words):
        if word == "-c":
            return False
        if word == "-m" or (not word.startswith("-") and words[position - 1 : position] not in (["-W"], ["-X"])):
            return True
    return False


def _torchrun(words: Sequence[str]) -> list[str]:
    """An agent's command line with torchrun's short name; empty where it is none of torchrun's."""
    for position, word in enumerate(words):
        if word == "torch.distributed.run" or Path(word).name == "torchrun":
            return ["torchrun", *words[position + 1 :]]
    return []


def _words_of(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in raw.split(b"\0")[:-1]]
