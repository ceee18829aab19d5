"""Train on Kaggle, in one cell of a notebook, session after session.

    from ast_dist import kaggle
    kaggle.run("imagenet-kaggle")

finds the data set and the newest checkpoint in what is attached, trains on the GPUs that are there until the session's
time is up, and shows the dashboard in the cell. Run the same cell again in the next session: it goes on in mid-epoch.
The same without a notebook: `python -m ast_dist.kaggle [PRESET] [--hours H] …`.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from ast_dist.command_line import parse, settings_to_argv
from ast_dist.data.index import Index, read_manifest
from ast_dist.data.remote import open_index
from ast_dist.errors import UserError, require, run_command
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.kaggle_inputs import SPLITS, DataSet, Found, ImagenetIndex, choose, index_as_data, look, no_data
from ast_dist.kaggle_machine import (
    GPU_SETTING,
    Places,
    checkpoint_bytes,
    kaggle_secret,
    probe_gpus,
    session_began,
    usable_gpus,
)
from ast_dist.kaggle_state import Saved, carry_over, make_room, newest, too_full
from ast_dist.kaggle_training import Training, command, wait_for_end
from ast_dist.kaggle_view import NotebookView, PlainView, Watch, closing_words, notebook_display, tell
from ast_dist.run_dir import CONFIG_NAME, fingerprint, is_aside
from ast_dist.track.progress import duration, lease_is_held

ROOT_VARIABLE = "AST_DIST_KAGGLE_ROOT"
DEFAULT_PRESET = "imagenet-kaggle"
DEFAULT_HOURS = 8.5
WORKING_GB = 20.0
_SECRET = "WANDB_API_KEY"
_UNKNOWN = "?"
_LOG_SUFFIX = ".log"
# A training whose kernel was restarted saves first.
_PREDECESSOR_PATIENCE_S = 180.0

Resume = Literal["auto", "must", "never"]


class KaggleError(UserError):
    """A mistake that can be mended, which a notebook shows as one line."""

    def _render_traceback_(self) -> list[str]:
        return [f"error: {self}"]


class TrainingFailedError(RuntimeError):
    """The training gave up; the message says where it is told why."""

    def _render_traceback_(self) -> list[str]:
        return [f"failed: {self}"]


def run(
    preset: str = DEFAULT_PRESET,
    *,
    root: str | Path | None = None,
    run_name: str | None = None,
    data_dir: str | Path | None = None,
    hours: float | None = None,
    resume: Resume = "auto",
    working_gb: float = WORKING_GB,
    words: Sequence[str] = (),
    **settings: Any,
) -> None:
    """Train, or go on with the training, until it is finished or the session's time is up.

    preset: named settings (ast_dist/presets). settings: others, as a preset has them: `loop={"epochs": 18}`, `seed=1`;
    words: or as the command line has them. root: /kaggle, or AST_DIST_KAGGLE_ROOT. run_name: the run's folder below
    /kaggle/working/runs; the preset's name unless given. data_dir: folder of the data set, where it is not to be
    chosen here. hours: after which the session saves and ends, counted from the start of the notebook's kernel;
    8.5 unless given here or by the settings, 0 for no limit. resume: as `--resume` of ast_dist.train. working_gb: what
    /kaggle/working may hold, GB.

    Returns when all is saved; stopping the cell saves, too. Raises KaggleError, a UserError, for what can be mended:
    nothing in /kaggle/working has been replaced then. Raises TrainingFailedError where restarts gained nothing.
    """
    _check_types(preset=preset, run_name=run_name, hours=hours, working_gb=working_gb, words=words)
    places = Places(Path(root or os.environ.get(ROOT_VARIABLE, "/kaggle")).absolute())
    try:
        argv = [*settings_to_argv(settings), *words]
        _Session(places, preset, run_name, argv, hours, resume, data_dir, working_gb).run()
    except UserError as error:
        raise KaggleError(str(error)) from None


def _check_types(**options: Any) -> None:
    """Raise KaggleError for an option of `run` that is something else than it must be."""
    wanted: dict[str, tuple[tuple[type, ...], str]] = {
        "preset": ((str,), "the name of a preset"),
        "run_name": ((str, type(None)), "the name of a folder"),
        "hours": ((int, float, type(None)), "a number"),
        "working_gb": ((int, float), "a number"),
        "words": ((list, tuple), "a list, as ['--loop.epochs', '3']"),
    }
    for name, (types, what) in wanted.items():
        value = options[name]
        if not isinstance(value, types) or isinstance(value, bool):
            raise KaggleError(f"{name} is {value!r}, but must be {what}.")


class _Session:
    """One call of `run`. argv: the settings, as the command line has them."""

    def __init__(
        self,
        places: Places,
        preset: str,
        run_name: str | None,
        argv: Sequence[str],
        hours: float | None,
        resume: Resume,
        data_dir: str | Path | None,
        working_gb: float,
    ) -> None:
        for folder in (places.inputs, places.working):
            require(
                folder.is_dir(), f"{folder}: no such folder. Name the one that holds input/ and working/: root='…'."
            )
        require(working_gb > 0, f"working_gb is {working_gb:g}, but must be above 0.")
        name = run_name or preset
        is_name = Path(name).name == name and not name.startswith(".")
        require(is_name, f"run_name is {name!r}, but must be the name of a folder.")
        is_free = not is_aside(name) and not name.endswith(_LOG_SUFFIX)
        require(is_free, f"run_name is {name!r}, but such names are those of logs and of runs that were moved aside.")
        words = [word.partition("=")[0].replace("_", "-") for word in argv]
        require("--run-dir" not in words, "--run-dir: on Kaggle a run lies below /kaggle/working/runs. Use run_name.")
        self.places = places
        self.working_gb = working_gb
        self.run_dir = places.run_dir(name)
        self.is_named = run_name is not None
        self.data_dir = data_dir
        self.resume: Resume = resume
        self.words = ["--preset", preset, *argv, "--run-dir", str(self.run_dir), "--resume", resume]
        if hours is not None:
            self.words += ["--session.hours", f"{hours!r}"]
        # Before anything takes time: a typo is told at once.
        config = parse([f"--data.train={_UNKNOWN}", f"--data.val={_UNKNOWN}", *self.words], "kaggle.run")
        if hours is None and config.session.hours == 0 and "--session.hours" not in words:
            self.words += ["--session.hours", f"{DEFAULT_HOURS:g}"]
            config = dataclasses.replace(config, session=dataclasses.replace(config.session, hours=DEFAULT_HOURS))
        self.config = config
        self.says_wandb = "--track.wandb" in words
        self.began = session_began(places)

    def run(self) -> None:
        self._check_time()
        gpus = usable_gpus(probe_gpus())
        self._check_precision(gpus)
        self._wait_for_predecessor()
        # For what comes before a checkpoint's size is known: an index may be written.
        make_room(self.places.working, self.run_dir, self.config, 0, self.working_gb, goes_on=False)
        found, at_work = look(self.places.inputs), look(self.places.working)
        runs = [*at_work.runs, *found.runs]
        data = self._data(found, at_work, runs)
        opened = {split: open_index(location, self.config.data) for split, location in data.items()}
        saved = self._saved(runs, opened)
        self._prepare(saved, opened["train"])
        secrets = self._secrets()
        self._say_session(gpus)
        words = [*self.words, "--data.train", data["train"], "--data.val", data["val"]]
        self._train(command(max(gpus, 1), words), secrets)

    def _check_time(self) -> None:
        limit_h = self.config.session.hours
        # Who states when the session began, or has it end at once, may do so.
        is_over = limit_h > 0 and time.time() > self.began + limit_h * 3600 and BEGAN_VARIABLE not in os.environ
        require(
            not is_over,
            f"this session's {limit_h:g} hours are over: it began at {_clock_time(self.began)}, says "
            f"{self.places.session_began}. Start a new session, give more hours=… (0: no limit), or delete that file "
            "where it is wrong.",
        )

    def _check_precision(self, gpus: int) -> None:
        if gpus:
            return
        precision = self.config.loop.precision
        require(
            precision != "fp16",
            f"there is no GPU, and loop.precision is fp16, which is for GPUs. Set {GPU_SETTING}, or train on the CPU "
            "with loop={'precision': 'fp32'}.",
        )
        tell(f"GPUs       none: training on the CPU, in one process ({GPU_SETTING} if that is not meant)")

    def _wait_for_predecessor(self) -> None:
        """Whatever its name: two trainings would share the GPUs."""
        held = self._in_training()
        if held:
            tell(f"waiting    for the training that still runs in {held[0]}, {_PREDECESSOR_PATIENCE_S:g} s at most")
            if not wait_for_end(lambda: bool(self._in_training()), _PREDECESSOR_PATIENCE_S):
                raise UserError(f"{held[0]}: another process trains here. Stop it, and run the cell again.")

    def _in_training(self) -> list[Path]:
        """The runs in working that somebody trains now."""
        return [path for path in sorted(self.run_dir.parent.glob("*/")) if lease_is_held(path)]

    def _data(self, found: Found, at_work: Found, runs: Sequence[Path]) -> dict[str, str]:
        """Where both splits are. ImageNet's index is made where there is none."""
        stated = {"train": self.config.data.train, "val": self.config.data.val}
        if set(stated.values()) != {_UNKNOWN}:
            is_whole = _UNKNOWN not in stated.values()
            require(is_whole, "data.train and data.val go together: name both, or neither, to have them found.")
            tell(f"data       {stated['train']} and {stated['val']}, as the settings say")
            return stated
        indexes = [*at_work.indexes, *found.indexes]
        if self.data_dir is not None:
            require(Path(self.data_dir).is_dir(), f"data_dir is {str(self.data_dir)!r}: no such folder.")
            found = look(Path(self.data_dir))
            found.data_sets += map(index_as_data, found.indexes)  # named, so meant
        candidates = [self._with_manifests(candidate, indexes) for candidate in found.data_sets]
        known = {digest for run in runs if (digest := _manifest_of(run))}
        chosen, others = choose(candidates, known)
        if chosen is None:
            raise no_data(Path(self.data_dir or self.places.inputs), found, at_work.data_sets)
        why = ", which a run here was trained on" if chosen.manifests.get("train") in known else ""
        tell(f"data       {chosen}{why}; nothing of it is copied")
        for other in [*others, *found.unusable]:
            tell(f"           also seen: {other}")
        folder = chosen.folder
        if chosen.kind == "imagenet":
            folder = self._index(chosen).make(indexes, tell)
        return {split: str(folder / split) for split in SPLITS}

    def _with_manifests(self, candidate: DataSet, indexes: Sequence[Path]) -> DataSet:
        if candidate.kind != "imagenet" or not (folder := self._index(candidate).find(indexes)):
            return candidate
        read = {split: read_manifest(folder / split) for split in SPLITS}
        hashes = {split: digest for split, (_, digest) in read.items()}
        return dataclasses.replace(candidate, num_train=read["train"][0]["num_samples"], manifests=hashes)

    def _index(self, candidate: DataSet) -> ImagenetIndex:
        return ImagenetIndex(candidate.folder, self.places.working, self.places.temp)

    def _saved(self, runs: Sequence[Path], data: dict[str, Index]) -> Saved | None:
        """The checkpoint to go on from."""
        if self.resume == "never":
            return None
        manifests = {split: index.hash for split, index in data.items()}
        saved = newest(runs, fingerprint(self.config, manifests), self.run_dir, tell, self.is_named)
        if saved is None and self.resume == "must":
            raise UserError(
                f"resume='must', but neither {self.places.working} nor {self.places.inputs} holds a run with this "
                "configuration. Attach the output of the last session's version, or use resume='auto' to start anew."
            )
        return saved

    def _prepare(self, saved: Saved | None, train: Index) -> None:
        """See that there is room, and have the run in its folder."""
        num_bytes = saved.num_bytes if saved else checkpoint_bytes(self.config, train)
        is_here = saved is not None and saved.run == self.run_dir
        room = make_room(self.places.working, self.run_dir, self.config, num_bytes, self.working_gb, is_here)
        tell(f"room       {room}")
        if saved is None:
            why = "as resume='never' asks" if self.resume == "never" else "no checkpoint of it is attached"
            tell(f"run        {self.run_dir}, from the beginning: {why}")
            return
        spent = "" if saved.total_s is None else f", after {duration(saved.total_s)} of training"
        tell(f"run        {self.run_dir}, session {saved.sessions + 1}{spent}, from {saved.checkpoint}")
        if saved.run.name != self.run_dir.name:
            tell(f"           that run is named {saved.run.name}, and goes on here; for a new run, give run_name")
        if not is_here and (aside := carry_over(saved, self.run_dir)):
            tell(f"           what stood there had come less far, and is now in {aside}")

    def _secrets(self) -> dict[str, str]:
        """W&B's key, where Kaggle keeps one for this notebook; it also turns W&B on, unless the settings say."""
        if os.environ.get(_SECRET) or not (key := kaggle_secret(_SECRET)):
            return {}
        if not self.says_wandb and self.config.track.wandb == "off":
            self.words += ["--track.wandb", "online"]
            tell(f"W&B        on, with the secret {_SECRET}")
        return {_SECRET: key}

    def _say_session(self, gpus: int) -> None:
        if gpus:
            tell(f"GPUs       {gpus}, a process each")
        if hours := self.config.session.hours:
            ends_at = self.began + hours * 3600
            left = duration(ends_at - time.time())
            tell(f"session    ends by itself at {_clock_time(ends_at)}, {left} from now")

    def _train(self, words: list[str], secrets: dict[str, str]) -> None:
        display = notebook_display()
        log = self.run_dir.with_name(f"{self.run_dir.name}{_LOG_SUFFIX}")
        is_new = self.resume == "never"
        view = NotebookView(self.run_dir, display, is_new=is_new) if display else PlainView()
        watch = Watch(view, lambda: too_full(self.places.working, self.working_gb))
        code = Training(words, log, self.began, secrets).attend(watch, tell)
        if code == 2:
            raise UserError(watch.errors[-1] if watch.errors else f"the training refused to start; {log} says why.")
        for error in watch.errors:
            tell(f"error: {error}")
        if code != 0:
            if display:
                tell("\n".join(watch.last))
            raise TrainingFailedError(f"the training ended with exit code {code}; what happened is in {log}")
        for line in closing_words(self.run_dir):
            tell(line)


def _clock_time(at: float) -> str:
    """Seconds since 1970 as a time of day."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M} UTC"


def _manifest_of(run: Path) -> str | None:
    """SHA-256 of the training manifest that a run was made with; None where its configuration cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return str(yaml.safe_load((run / CONFIG_NAME).read_text(encoding="utf-8"))["manifest"]["train"])
    return None


def main(argv: list[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m ast_dist.kaggle",
        usage="python -m ast_dist.kaggle [PRESET] [OPTION …] [SETTING …]",
        description="Train on Kaggle. What is not listed here goes to ast_dist.train, as --loop.epochs 18.",
        allow_abbrev=False,
    )
    parser.add_argument("--root", help=f"the folder with input/ and working/ (${ROOT_VARIABLE}, or /kaggle)")
    parser.add_argument("--run-name", help="the run's folder below working/runs (the preset's name)")
    parser.add_argument("--data-dir", help="folder of the data set, instead of the one that is found")
    parser.add_argument("--hours", type=float, help=f"hours after which the session ends ({DEFAULT_HOURS:g}; 0: never)")
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help="as for training (auto)")
    parser.add_argument("--working-gb", type=float, default=WORKING_GB, help=f"room in working ({WORKING_GB:g})")
    # By hand: a setting's value must not be taken for the preset.
    has_preset = bool(argv) and not argv[0].startswith("-")
    preset, rest = (argv[0], argv[1:]) if has_preset else (DEFAULT_PRESET, argv)
    arguments, words = parser.parse_known_args(rest)
    try:
        run(preset, **vars(arguments), words=words)
    except TrainingFailedError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads any more, which is no failure; Python would fail at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
