"""`ast-dist COMMAND …`: every command of the package under one name.

Each command is a module with `main(argv) -> int`, imported only when it is the one asked for: `ast-dist status` does
not wait for torch. `python -m ast_dist COMMAND …` is the same.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from ast_dist import __version__
from ast_dist.errors import UserError, run_command

# Command → (module with `main(argv)`, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("ast_dist.train", "train, or go on where the run stopped"),
    "supervise": ("ast_dist.supervise", "start a training's agent, and start it again when it dies"),
    "status": ("ast_dist.status", "say how a run stands"),
    "report": ("ast_dist.report", "write one HTML file on a run, or on several side by side"),
    "make-shards": ("data_prep.make_shards", "turn images into shards with an index"),
    "check-shards": ("data_prep.check_shards", "verify a set of shards, sample by sample"),
    "compare": ("ast_dist.compare", "train with several policies at equal cost, over seeds"),
    "export": ("ast_dist.export", "write a run's weights to one file, with labels and preprocessing"),
    "evaluate": ("ast_dist.evaluate", "measure a run's weights on a split"),
    "diagram": ("ast_dist.diagram", "draw the system and the gate's process, with a run's numbers"),
    "kaggle": ("ast_dist.kaggle", "train on Kaggle, session after session"),
    "doctor": ("ast_dist.doctor", "check what this machine can run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user can mend it, 1 anything else.

    argv: the command and its arguments; the process's own when None.
    """
    return run_command(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    if not argv:
        print(_help(), file=sys.stderr)
        return 2
    command, arguments = argv[0], argv[1:]
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"ast-dist {__version__}")
        return 0
    if command not in COMMANDS:
        # make_shards is the module's name, and train.py its file's: both are near misses worth naming.
        near = difflib.get_close_matches(command.replace("_", "-"), COMMANDS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"ast-dist {command}: no such command. {hint}There are: {', '.join(COMMANDS)}.")
    module = importlib.import_module(COMMANDS[command][0])
    return int(module.main(arguments) or 0)


def _help() -> str:
    rows = "\n".join(f"  {name:13} {purpose}" for name, (_, purpose) in COMMANDS.items())
    return (
        f"ast-dist {__version__}: train image classifiers on the samples that still teach the model something\n\n"
        f"usage: ast-dist COMMAND …\n\n{rows}\n\n"
        "Each command has its own --help. On several processes: torchrun --nproc_per_node=N -m ast_dist train …"
    )


if __name__ == "__main__":
    sys.exit(main())
