"""Compare policies at equal cost, over seeds: `python -m ast_dist.compare --preset NAME --out DIR …`.

    python -m ast_dist.compare --preset cifar10 --policies full,short,random,infobatch,selective_backprop,sundew \\
        --rates 0.5,0.3 --seeds 3 --out DIR --data.train TRAIN --data.val VAL

A rate is a budget: the share of full training's cost (forward, backward and scoring) that a run may spend. Every run
is a real training command with its own folder below DIR/runs. The same command again goes on where it was stopped.
DIR/compare.json, compare.md and compare.png are replaced after every run; seeds are the outermost loop, so what is
there early is a whole table of fewer seeds.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from ast_dist import compare_plot, compare_rows
from ast_dist import run_dir as run_folder
from ast_dist.command_line import parse
from ast_dist.compare_budget import Prediction, predict, settings_at_cost
from ast_dist.compare_jobs import Jobs, Run, RunFailed, RunPaused
from ast_dist.config import Config, differences
from ast_dist.data.remote import open_index
from ast_dist.errors import UserError, run_command
from ast_dist.fault.lease import Lease
from ast_dist.preflight import check_data, with_block_shards
from ast_dist.result_file import describe_result, rounded, write_result
from ast_dist.track.progress import duration, replace_atomically

PROG = "python -m ast_dist.compare"
SETTINGS_NAME = "compare.yaml"
ALWAYS = ("full", "short", "random")
DEFAULT_POLICIES = (*ALWAYS, "infobatch", "selective_backprop", "sundew")
# Options of the training command that a comparison sets, and what sets them.
_SET_HERE = {
    "--run-dir": "--out",
    "--seed": "--seeds",
    "--resume": "nothing: run the same command again to go on",
    "--gate.policy": "--policies",
    "--gate.target-rate": "--rates",
}
_FOLDERS = {"--out": "OUT", "--data.train": "TRAIN", "--data.val": "VAL"}


@dataclass(frozen=True)
class Arguments:
    """What was asked for. training: arguments for ast_dist.train, unchecked."""

    policies: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    out: Path
    processes: int
    jobs: int
    dry_run: bool
    training: tuple[str, ...]

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Every policy at every rate, full once, in the order in which a seed runs them."""
        return [("full", 1.0), *((p, rate) for rate in self.rates for p in self.policies if p != "full")]


@dataclass(frozen=True)
class Member:
    """One run of the comparison."""

    policy: str
    rate: float
    seed: int
    config: Config
    prediction: Prediction
    run: Run


@dataclass(frozen=True)
class Comparison:
    """All runs, and what they have in common. base: full training's configuration."""

    arguments: Arguments
    base: Config
    manifests: dict[str, str]
    num_samples: int
    members: tuple[Member, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What must not change between two starts in one folder."""
        return {"training": run_folder.fingerprint(self.base, self.manifests), "processes": self.arguments.processes}


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code; raises UserError for what the user can mend, before anything is written."""
    arguments = parse_compare_arguments(argv)
    comparison = plan(arguments)
    check_out(comparison)
    if arguments.dry_run:
        print_plan(comparison)
        return 0
    if not torch.cuda.is_available():
        # As under torchrun: more threads than one a process slow down many small ones, and change the last bits.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    lease = take_out(comparison)
    try:
        return run(comparison, command_line(argv))
    finally:
        lease.release()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {PROG} --help.")


def parse_compare_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line. What is not an option of the comparison is left for the training command.

    Raises UserError, in one line, for a value that makes no sense and for what a comparison sets itself.
    """
    parser = _Parser(
        prog=PROG,
        allow_abbrev=False,
        description="Train with several policies at equal cost, over several seeds, and write a table and a plot.",
        epilog="All else goes to every training: --preset NAME, --data.train DIR, --data.val DIR, --config FILE, and "
        "any option of python -m ast_dist.train, for instance --optim.lr 0.1.",
    )
    named = ",".join(DEFAULT_POLICIES)
    parser.add_argument("--policies", default=named, help=f"{', '.join(ALWAYS)} are always there (default: {named})")
    parser.add_argument("--rates", default="0.5,0.3", help="budgets: shares of full training's cost (default: 0.5,0.3)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … SEEDS-1 (default: 3)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and of the results")
    parser.add_argument("--processes", type=int, default=1, help="processes of each training (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the runs, write nothing")
    found, training = parser.parse_known_args(list(argv))
    for name in ("seeds", "processes", "jobs"):
        if getattr(found, name) < 1:
            raise UserError(f"--{name} is {getattr(found, name)}, but must be at least 1.")
    for word in training:
        instead = _SET_HERE.get(word.split("=", 1)[0].replace("_", "-"))
        if instead:
            raise UserError(f"{word}: a comparison sets this for each of its runs. Use {instead}.")
    policies = [name.strip() for name in found.policies.split(",") if name.strip()]
    return Arguments(
        policies=tuple(dict.fromkeys([*ALWAYS, *policies])),
        rates=_rates(found.rates),
        seeds=found.seeds,
        out=Path(found.out),
        processes=found.processes,
        jobs=found.jobs,
        dry_run=found.dry_run,
        training=tuple(training),
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = [float(f"{float(word):.6g}") for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--rates {text}: expected numbers with commas between them, like 0.5,0.3.") from None
    if not rates:
        raise UserError("--rates is empty. Name at least one budget, like --rates 0.5.")
    for rate in rates:
        if not 0.0 < rate <= 1.0:
            raise UserError(f"--rates {text}: {rate:g} is no share of full training's cost: it must lie in (0, 1].")
    return tuple(dict.fromkeys(rates))


def plan(arguments: Arguments) -> Comparison:
    """All runs with their configurations, checked against the data. Reads, writes nothing.

    Raises UserError for a training option that does not exist, data that does not fit, or a budget out of reach.
    """
    folder = arguments.out / "runs"

    def training(*words: str) -> tuple[tuple[str, ...], Config]:
        every = (*arguments.training, *words)
        return every, parse(every, PROG)

    _, base = training("--run-dir", str(folder), "--gate.policy", "full")
    if base.dry_run:
        raise UserError("dry_run: a comparison sets this for each of its runs. Use --dry-run.")
    train, val = open_index(base.data.train, base.data), open_index(base.data.val, base.data)
    base = with_block_shards(base, train)
    check_data(base, train, val, arguments.processes)
    at_seed_0 = []
    for policy, rate in arguments.cells:
        settings = settings_at_cost(policy, rate, base, train.num_samples)
        words, config = training("--run-dir", str(folder), *settings)
        config = with_block_shards(config, train)
        at_seed_0.append((policy, rate, words, config, predict(config, train.num_samples)))
    members = []
    for seed in range(arguments.seeds):
        for policy, rate, words, config, prediction in at_seed_0:
            run_dir = folder / f"{policy.replace(':', '.')}-{rate:g}-seed{seed}"
            run = Run(
                run_dir,
                (*words, "--run-dir", str(run_dir), "--seed", str(seed), "--resume", "auto"),
                base.checkpoint.grace_s,
            )
            own = dataclasses.replace(config, run_dir=str(run_dir), seed=seed)
            members.append(Member(policy, rate, seed, own, prediction, run))
    manifests = {"train": train.hash, "val": val.hash}
    return Comparison(arguments, base, manifests, train.num_samples, tuple(members))


def check_out(comparison: Comparison) -> None:
    """Judge whether the comparison may start or go on in its folder. Changes nothing.

    Policies, rates and seeds may be others than before: runs that are there already are used again.
    Raises UserError when the folder is a file, holds something else, or runs of another training.
    """
    out = comparison.arguments.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: this is a file. Name a folder.")
    path = out / SETTINGS_NAME
    if not path.is_file():
        others = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
        if others:
            raise UserError(
                f"--out {out}: holds {len(others)} other files or folders ({', '.join(others[:3])} …) and no "
                f"{SETTINGS_NAME}. Name a new or an empty folder."
            )
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = differences(old["training"], comparison.settings["training"])
        if old["processes"] != comparison.arguments.processes:
            changed.append(f"processes: {old['processes']} → {comparison.arguments.processes}")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}). Name another --out.") from None
    if changed:
        raise UserError(
            f"--out {out}: the comparison in it was made with other settings ({'; '.join(changed)}). Use the old "
            "values to go on with it, or another --out."
        )
    for member in comparison.members:
        run_folder.check(member.config, comparison.manifests)


def take_out(comparison: Comparison) -> Lease:
    """Become the owner of the folder and note the settings. Raises UserError when another comparison runs there."""
    arguments = comparison.arguments
    asked = {"policies": list(arguments.policies), "rates": list(arguments.rates), "seeds": arguments.seeds}
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        try:
            lease = Lease(arguments.out)
        except UserError:
            raise UserError(
                f"--out {arguments.out}: another comparison runs here. Wait for it, stop it, or name another folder."
            ) from None
        text = yaml.safe_dump({**asked, **comparison.settings}, sort_keys=False, allow_unicode=True)
        replace_atomically(arguments.out / SETTINGS_NAME, text.encode())
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written ({error.strerror}). Name another folder.") from None
    return lease


def run(comparison: Comparison, command: str) -> int:
    """Train what is not finished, report after each, print the table. Returns the exit code."""
    arguments = comparison.arguments
    members = {member.run: member for member in comparison.members}
    is_done = {run: run.state == "finished" for run in members}
    left = [run for run, done in is_done.items() if not done]
    print(f"{len(members)} runs, {len(members) - len(left)} of them finished; output: {arguments.out / 'runs'}/*.log")

    def finished(run: Run) -> None:
        is_done[run] = True
        found = compare_rows.outcome(run.run_dir)
        print(
            f"[{sum(is_done.values())}/{len(members)}] {run.name}: top-1 {found.acc1:.2f} %, cost {found.cost:.2f}, "
            f"{duration(found.wall_s)}",
            flush=True,
        )
        report(comparison, [member for run, member in members.items() if is_done[run]], command)

    rows = report(comparison, [member for run, member in members.items() if is_done[run]], command)
    try:
        Jobs(arguments.jobs, arguments.processes).run(left, finished)
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return 1
    except RunPaused as pause:
        print(f"{pause}. The same command goes on.", flush=True)
        return 0
    except KeyboardInterrupt:
        print(f"{sum(is_done.values())} of {len(members)} runs are finished. The same command goes on.", flush=True)
        raise
    rows = report(comparison, comparison.members, command)
    compare_rows.print_table(rows, comparison.base.loop.epochs)
    print(f"written: {', '.join(str(arguments.out / f'compare.{kind}') for kind in ('json', 'md', 'png'))}")
    return 0


def report(comparison: Comparison, members: Sequence[Member], command: str) -> list[dict[str, Any]]:
    """Write compare.json, compare.md and compare.png from finished runs, where there are any. Returns the rows."""
    arguments, epochs = comparison.arguments, comparison.base.loop.epochs
    rows = []
    for policy, rate in arguments.cells:
        runs = [member for member in members if (member.policy, member.rate) == (policy, rate)]
        if runs:
            outcomes = [compare_rows.outcome(member.run.run_dir) for member in runs]
            row = compare_rows.aggregate(
                policy, rate, runs[0].prediction.target_rate, outcomes, epochs, comparison.num_samples
            )
            rows.append({**row, "jobs": arguments.jobs, "processes": arguments.processes})
    if not rows:
        return []
    rows = compare_rows.add_leads(rows)
    content = describe_result("compare", command)
    content["rows"] = [{key: rounded(value) for key, value in row.items()} for row in rows]
    write_result(arguments.out / "compare.json", content)
    text = compare_rows.markdown({**content, "rows": rows}, epochs)
    replace_atomically(arguments.out / "compare.md", text.encode())
    name = comparison.base.preset or "training"
    title = f"{name}: {comparison.base.model.name}, full training is {epochs} epochs"
    compare_plot.render(rows, arguments.out / "compare.png", title)
    return rows


def print_plan(comparison: Comparison) -> None:
    """Say what would be run."""
    width = max(len(member.run.name) for member in comparison.members)
    print(f"{'run':<{width}}  epochs  target   cost")
    for member in comparison.members:
        ahead = member.prediction
        done = "  (finished)" if member.run.state == "finished" else ""
        print(f"{member.run.name:<{width}}  {ahead.epochs:6}  {ahead.target_rate:6.4f}  {ahead.cost:5.2f}{done}")
    print(f"{len(comparison.members)} runs, cost in epochs of full training, predicted. Dry run: nothing was written")


def command_line(argv: Sequence[str]) -> str:
    """The command as it may be published: words such as TRAIN in the place of folders."""
    words = list(argv)
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in _FOLDERS and equals:
            words[position] = f"{flag}={_FOLDERS[flag]}"
        elif flag in _FOLDERS and position + 1 < len(words):
            words[position + 1] = _FOLDERS[flag]
        elif flag == "--config" and equals:
            words[position] = f"{flag}={Path(value).name}"
        elif flag == "--config" and position + 1 < len(words):
            words[position + 1] = Path(words[position + 1]).name
    return f"{PROG} {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(run_command(main))
