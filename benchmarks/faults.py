"""What faults cost: `python -m benchmarks.faults [TRAIN VAL]`.

Real trainings on this machine's processes are killed, stopped and asked to end, and timed until they step again; the
same for two other ways to train. TRAIN and VAL are folders that data_prep.make_shards made of CIFAR-10; without them
images of that size are made up. The parts can be run apart: each replaces its own rows in the result file.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ast_dist.arguments import parse_arguments
from ast_dist.data.index import Index
from ast_dist.errors import UserError, run_command
from benchmarks import tables
from benchmarks.faults_goodput import goodput_by_formula, goodput_of_regular_kills, measure_goodput, predictions
from benchmarks.faults_peers import lightning_tool, torchvision_tool, write_images
from benchmarks.faults_recovery import KILL_AGENT, KILL_RANK, STOP_RANK, TERMINATE, compare_ends, recover
from benchmarks.faults_runs import Tool, Training, our_tool, torchrun
from benchmarks.faults_saving import measure_saving, peer_saving
from benchmarks.images import make_shard_set
from benchmarks.result import RESULTS, ROOT, ResultFile, load

# The parts, in the order of their rows in the file; the last one reads what the others measured.
PARTS = ("recovery", "peers", "exact", "saving", "kills", "goodput", "goodput_5min", "prediction")
_DEFAULT_PARTS = ("recovery", "peers", "exact", "saving", "kills", "goodput", "prediction")
_KILL_EVERY_S = {"goodput": 60.0, "goodput_5min": 300.0}
_WATCHDOG_S = 5.0
_NUM_CLASSES = 10


@dataclass(frozen=True)
class Arguments:
    """Measure what faults cost."""

    data: Positional[tuple[Path, ...]] = ()
    """TRAIN VAL: folders of the training and the validation shards; nothing makes images up."""
    parts: tuple[str, ...] = _DEFAULT_PARTS
    """What to measure: recovery, peers (their recovery), exact, saving, kills, goodput, goodput_5min, prediction."""
    tries: int = 5
    """Strikes of each fault."""
    kills: int = 200
    """Kills of a process that saves all the time."""
    every_s: float = 10.0
    """Seconds between checkpoints while faults are measured; a training's default is 120."""
    goodput_minutes: float = 15.0
    """Minutes of the run that is killed again and again."""
    processes: int = 2
    """Processes that train."""
    seed: int = 0
    """Seed of the moments of all strikes."""
    toy: bool = False
    """Minutes on anything: a tiny model, few tries. The result file is faults-toy.json."""
    out: Path = RESULTS
    """Folder of the result file."""

    def __post_init__(self) -> None:
        if len(self.data) not in (0, 2):
            raise UserError(f"{len(self.data)} folders of shards, but there must be two, TRAIN VAL, or none.")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise UserError(f"--parts {unknown[0]}: no such part. There are: {', '.join(PARTS)}.")
        for name in ("tries", "kills", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("every_s", "goodput_minutes"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name):g}, but must be above 0.")


@dataclass(frozen=True)
class Size:
    """How much of everything. images: made up for training. quiet_s: undisturbed training."""

    images: int
    width: int
    batch_size: int
    segment_s: float
    pairs: int
    quiet_s: float
    resnet_pairs: int
    patience_s: float


_FULL = Size(17_920, 64, 256, 5.0, 10, 30.0, 5, 300.0)
_TOY = Size(640, 8, 16, 0.3, 2, 1.0, 0, 90.0)
_EXACT_WIDTH = 16


def main(argv: list[str]) -> int:
    """Measure the parts asked for, write, print. Returns 0."""
    arguments = parse_arguments(Arguments, argv, "python -m benchmarks.faults")
    for folder in arguments.data:
        Index.open(folder)
    name = "faults-toy" if arguments.toy else "faults"
    results = _Results(arguments.out / f"{name}.json", name, _command(arguments), arguments.parts)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(arguments, _TOY if arguments.toy else _FULL, Path(folder), results)
        for part in PARTS:
            if part in arguments.parts:
                for measure in getattr(bench, part)():
                    results.add(part, measure)
    print()
    print(tables.render_all(results.content))
    return 0


class _Results:
    """The result file, in which each part's rows stand together, whenever they were measured."""

    def __init__(self, path: Path, benchmark: str, command: str, parts: Iterable[str]) -> None:
        try:
            before = load(path)
        except (OSError, ValueError):
            before = {"rows": []}
        self._file = ResultFile(path, benchmark, command)
        about = {key: before.get(key) for key in ("commit", "date", "command")}
        # What an earlier run of other parts left says itself from which code it is.
        kept = [row if "commit" in row else {**row, **about} for row in before["rows"] if row["part"] not in parts]
        self._put(kept)

    @property
    def content(self) -> dict[str, Any]:
        return self._file.content

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._file.rows

    def add(self, part: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and write it; where that fails, the row says so, and the rest goes on."""
        began = time.monotonic()
        row: dict[str, Any] = {"part": part, "device": self.content["machine"]["gpu"] or "cpu"}
        try:
            row |= measure()
        except Exception as error:  # noqa: BLE001 - told in the row; hours of other rows must not be lost for it
            row |= {"measure": part, "error": f"{type(error).__name__}: {error}"[:1000]}
        # More than the processes measured here means that others were at work, too.
        row |= {"took_s": time.monotonic() - began, "load_1min": os.getloadavg()[0]}
        self._put([*self.rows, row])
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def _put(self, rows: list[dict[str, Any]]) -> None:
        self._file.replace(sorted(rows, key=lambda row: PARTS.index(row["part"])))


class _Bench:
    """The parts: each yields functions that measure one row."""

    def __init__(self, arguments: Arguments, size: Size, folder: Path, results: _Results) -> None:
        self._arguments = arguments
        self._size = size
        self._folder = folder
        self._results = results
        self._made = 0
        self._training: Training | None = None

    @property
    def training(self) -> Training:
        """What is trained; its images are made when they are first needed."""
        if self._training is None:
            size, arguments = self._size, self._arguments
            if arguments.data:
                train, val = (Index.open(folder) for folder in arguments.data)
            else:
                train, val = make_shard_set(self._folder / "data", size.images, 32, 32, _NUM_CLASSES)
            images = self._folder / "images.pt"
            write_images(train.root, 32, images)
            self._training = Training(
                train.root.absolute(),
                val.root.absolute(),
                images,
                "small_cnn",
                size.width,
                32,
                train.num_classes,
                size.batch_size,
                arguments.processes,
                arguments.seed,
                size.patience_s,
            )
        return self._training

    def recovery(self) -> Iterator[Callable[[], dict[str, Any]]]:
        every_s = self._arguments.every_s
        ours = our_tool("ast_dist", _agent, every_s, by_hand=False)
        by_hand = our_tool("ast_dist", _agent, every_s, by_hand=True)
        watched = our_tool("ast_dist", _agent, every_s, "--fault.watchdog-s", str(_WATCHDOG_S), by_hand=False)
        supervised = our_tool("ast_dist", _supervisor, every_s, by_hand=False)
        yield lambda: self._recover(ours, KILL_RANK)
        yield lambda: self._recover(supervised, KILL_AGENT)
        yield lambda: self._recover(by_hand, TERMINATE)
        yield lambda: {**self._recover(watched, STOP_RANK), "watchdog_s": _WATCHDOG_S}

    def peers(self) -> Iterator[Callable[[], dict[str, Any]]]:
        for tool in (torchvision_tool(), lightning_tool(self._arguments.every_s), lightning_tool(0.0)):
            yield lambda tool=tool: self._recover(tool, KILL_RANK)

    def exact(self) -> Iterator[Callable[[], dict[str, Any]]]:
        every_s = min(self._arguments.every_s, 2.0)
        ours = our_tool("ast_dist", _agent, every_s, by_hand=False)
        for tool in (ours, torchvision_tool(), lightning_tool(every_s)):
            yield lambda tool=tool: self._compare_ends(tool)

    def saving(self) -> Iterator[Callable[[], dict[str, Any]]]:
        size, training = self._size, self.training
        yield lambda: {"measure": "saving", **self._saving(training, size.pairs)}
        peers = {("small_cnn", size.width)}
        if size.resnet_pairs:
            # For its state alone: a ResNet-50 with momentum, on images far smaller than it is meant for.
            resnet = Training(**{**vars(training), "model": "resnet50", "batch_size": 16})
            yield lambda: {"measure": "saving", **self._saving(resnet, size.resnet_pairs)}
            peers.add(("resnet50", size.width))
        for model, width in sorted(peers, reverse=True):
            for row in peer_saving(model, width, training.num_classes, self._new_folder(), 5):
                yield lambda row=row: {"measure": "saving", **row}

    def kills(self) -> Iterator[Callable[[], dict[str, Any]]]:
        for way in ("ast_dist", "torchvision reference", "Lightning"):
            yield lambda way=way: {"measure": "kills", **self._kills(way)}

    def goodput(self) -> Iterator[Callable[[], dict[str, Any]]]:
        yield from self._goodput("goodput")

    def goodput_5min(self) -> Iterator[Callable[[], dict[str, Any]]]:
        yield from self._goodput("goodput_5min")

    def prediction(self) -> Iterator[Callable[[], dict[str, Any]]]:
        parts = self._parts("ast_dist")
        if parts is None:
            reason = "no rows of saving and recovery in the result file: run these parts first"
            yield lambda: {"measure": "prediction", "skipped": reason}
            return
        for kill_every_s in _KILL_EVERY_S.values():
            for tool in ("ast_dist", "torchvision reference", "Lightning"):
                row = self._formula_goodput(tool, kill_every_s)
                if row:
                    yield lambda row=row: row
        for row in predictions(*parts):
            yield lambda row=row: {"measure": "prediction", **row}

    def _recover(self, tool: Tool, fault: Any) -> dict[str, Any]:
        if fault is KILL_AGENT and importlib.util.find_spec("ast_dist.supervise") is None:
            return {"measure": "fault", "tool": tool.name, "fault": fault.name, "skipped": "no supervisor here"}
        row = recover(tool, fault, self.training, self._new_folder() / "run", tries=self._arguments.tries)
        return {"measure": "fault", **row, "model": self.training.model}

    def _compare_ends(self, tool: Tool) -> dict[str, Any]:
        # What comes back is asked here, not how fast: a narrower model has the same parts.
        training = Training(**{**vars(self.training), "width": min(self.training.width, _EXACT_WIDTH)})
        steps = -(-Index.open(training.train).num_samples // training.batch_size)
        row = compare_ends(tool, training, self._new_folder(), epochs=3, kill_at_step=steps + int(0.6 * steps))
        return {"measure": "exact", **row, "model": training.model, "width": training.width}

    def _saving(self, training: Training, pairs: int) -> dict[str, Any]:
        epoch_steps = -(-Index.open(training.train).num_samples // training.batch_size)
        return measure_saving(
            training, self._new_folder(), epoch_steps=epoch_steps, segment_s=self._size.segment_s, pairs=pairs
        )

    def _kills(self, way: str) -> dict[str, Any]:
        arguments = [str(self._new_folder()), str(self._arguments.kills), str(self._arguments.seed)]
        command = [sys.executable, "-m", "benchmarks.faults_kills", way, *arguments, str(self._size.width)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {' / '.join(done.stderr.splitlines()[-6:])}")
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    def _goodput(self, part: str) -> Iterator[Callable[[], dict[str, Any]]]:
        arguments, kill_every_s = self._arguments, _KILL_EVERY_S[part]
        if arguments.toy:
            kill_every_s /= 10.0
        ours = our_tool("ast_dist", _agent, arguments.every_s, by_hand=False)
        quiet = our_tool("ast_dist", _agent, 0.0, by_hand=False)

        def measure() -> dict[str, Any]:
            row = measure_goodput(
                ours,
                quiet,
                self.training,
                self._new_folder(),
                kill_every_s=kill_every_s,
                interval_s=arguments.every_s,
                minutes=arguments.goodput_minutes,
                quiet_s=self._size.quiet_s,
            )
            return {"measure": "goodput", **row, "every_s": arguments.every_s}

        yield measure

    def _rows(self, measure: str, **wanted: Any) -> list[dict[str, Any]]:
        rows = [row for row in self._results.rows if row.get("measure") == measure and "error" not in row]
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def _parts(self, tool: str) -> tuple[float, float, float] | None:
        """What a save takes, how long it takes to be committed, and the recovery from a kill: seconds, as measured."""
        saves = self._rows("saving", tool=tool, model="small_cnn")
        faults = self._rows("fault", tool=tool, fault=KILL_RANK.name)
        if not saves or not faults:
            return None
        # Noise may make a save look like a gain; it never takes less than the wait for it.
        save_ms = max(saves[0]["total_ms"], saves[0]["stall_ms"])
        commit_s = (saves[0].get("commit_s") or 0.0) if tool == "ast_dist" else 0.0
        return save_ms / 1000.0, commit_s, faults[0]["recovery_s_median"]

    def _formula_goodput(self, tool: str, kill_every_s: float) -> dict[str, Any] | None:
        """A goodput row by the formula, from the parts measured; a tool that saves once an epoch has that interval."""
        parts, faults = self._parts(tool), self._rows("fault", tool=tool, fault=KILL_RANK.name)
        if parts is None:
            return None
        save_s, commit_s, recovery_s = parts
        every_s = faults[0]["interval_s"]
        return {
            "measure": "goodput",
            "tool": tool,
            "saves": faults[0]["saves"],
            "source": "formula",
            "kill_every_s": kill_every_s,
            "goodput": goodput_of_regular_kills(kill_every_s, every_s, save_s, recovery_s + commit_s),
            "goodput_poisson": goodput_by_formula(kill_every_s, every_s, save_s, recovery_s + commit_s),
            "every_s": every_s,
        }

    def _new_folder(self) -> Path:
        self._made += 1
        folder = self._folder / f"{self._made:03d}"
        folder.mkdir()
        return folder


def _agent(processes: int) -> list[str]:
    """torchrun as launch/torchrun.sh starts it on one host, but with the peers' monitor interval."""
    return torchrun(processes, 1_000_000)


def _supervisor(processes: int) -> list[str]:
    # Strikes come within one interval of each other, where no step beyond the last checkpoint may be gained.
    return ["-m", "ast_dist.supervise", "--max-stalled=1000", sys.executable, *_agent(processes)]


def _command(arguments: Arguments) -> str:
    """The command that gives these figures, without what it leaves at its default."""
    words = ["python -m benchmarks.faults", *(["TRAIN VAL"] if arguments.data else [])]
    default = Arguments()
    for name in ("parts", "tries", "kills", "every_s", "goodput_minutes", "processes", "seed", "toy"):
        value = getattr(arguments, name)
        if value != getattr(default, name):
            shown = " ".join(value) if isinstance(value, tuple) else f"{value:g}"
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}"))
    return " ".join(words)


if __name__ == "__main__":
    # Its trainings run in sessions of their own: whoever ends this must end them, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(run_command(main))
