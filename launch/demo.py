"""The main job in two minutes: digits to shards, training with the gate, a worker killed on the way, and a table.

    make demo        (or: python launch/demo.py [--out DIR])

Everything is real: shards on disk, two processes under torchrun, SIGKILL, the restart, the checkpoint.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ast_dist.data.index import Index
from ast_dist.errors import UserError, run_command
from ast_dist.track.history import read

MARKER = ".ast_dist_demo"
SHOWN = re.compile(r"^epoch +\d+/")


def main(argv: list[str]) -> int:
    """Run the demo. Returns 0, or 1 when a part of it failed."""
    parser = argparse.ArgumentParser(description="Shards, training with a killed worker, and a table.")
    parser.add_argument("--out", default="demo-run", help="folder for shards, runs and logs (emptied first)")
    parser.add_argument("--epochs", type=int, help="epochs of each run, instead of the preset's")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    began = time.monotonic()
    empty(out)

    say("1. scikit-learn's digits → WebDataset shards")
    for split in ("train", "val"):
        command("data_prep.make_shards", "digits", str(out / "shards"), "--split", split)

    say("2. training with the Sundew gate, 2 processes; one is killed half-way")
    gated = train(out, "sundew", arguments.epochs, kill=True)
    say("3. the same on everything, to compare")
    full = train(out, "full", arguments.epochs, kill=False)

    report(gated, full)
    say(f"done in {time.monotonic() - began:.0f} s. The dashboard: {gated / 'dashboard.png'}")
    print(
        f"""
What to type next
  {python()} -m ast_dist.status {gated}
  {python()} -m ast_dist.train --help
  your own images (folders train and val, one folder a class in each):
  {python()} -m data_prep.make_shards PATH/TO/IMAGES shards --split train      # and --split val
  torchrun --standalone --nproc_per_node=N --max-restarts=3 -m ast_dist.train \\
      --run-dir runs/1 --data.train shards/train --data.val shards/val --model.name resnet50"""
    )
    return 0


def empty(out: Path) -> None:
    """Clear what an earlier demo left; refuse a folder that is somebody else's."""
    if out.exists() and not (out / MARKER).exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty and not made by the demo. Name a new folder.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def train(out: Path, policy: str, epochs: int | None, *, kill: bool) -> Path:
    """Train one policy under torchrun, kill rank 0 half-way if asked to, and return the run directory."""
    run_dir, log_path = out / policy, out / f"{policy}.log"
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"),
        *("-m", "ast_dist.train", "--preset", "digits", "--gate.policy", policy, "--run-dir", str(run_dir)),
        *("--data.train", str(out / "shards/train"), "--data.val", str(out / "shards/val")),
        *(("--loop.epochs", str(epochs)) if epochs else ()),
    ]
    print(f"$ torchrun {' '.join(words[3:])}", flush=True)
    to_kill = kill
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log_path.open("w") as log:
        job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        assert job.stdout is not None
        for line in job.stdout:
            log.write(line)
            if SHOWN.match(line):
                print(f"  {line.rstrip()}", flush=True)
            if to_kill and is_half_way(run_dir):
                pid = json.loads((run_dir / ".lease").read_bytes()[16:])["pid"]
                os.kill(pid, signal.SIGKILL)
                to_kill = False
                print(f"  ---- SIGKILL to rank 0 (pid {pid}); torchrun restarts the processes ----", flush=True)
        code = job.wait()
    if code != 0:
        print("\n".join(log_path.read_text().splitlines()[-30:]), file=sys.stderr)
        raise SystemExit(f"error: the {policy} run ended with exit code {code}; its log: {log_path}")
    return run_dir


def is_half_way(run_dir: Path) -> bool:
    """Whether half of the epochs are done, and a step more, so that the kill strikes between checkpoints."""
    rows = read(run_dir / "metrics.jsonl")
    return bool(rows) and rows[-1]["kind"] == "step" and rows[-1]["progress/epoch"] > epochs_of(run_dir) / 2


def epochs_of(run_dir: Path) -> int:
    """Epochs that a run was asked for."""
    epochs: int = json.loads((run_dir / "progress.json").read_text())["epochs"]
    return epochs


def report(gated: Path, full: Path) -> None:
    """Print what the kill cost and the table."""
    events = read(gated / "sessions.jsonl")
    recoveries = [row["recovery_s"] for row in events if "recovery_s" in row]
    repeated = sum(row.get("steps_repeated", 0) for row in events)
    sizes = [Index.open(gated.parent / "shards" / split).num_samples for split in ("train", "val")]
    table = Table(title=f"digits: {sizes[0]:,} training and {sizes[1]:,} validation images, 2 processes")
    for name in ("policy", "top-1 %", "samples skipped", "FLOPs saved", "time"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for run_dir in (gated, full):
        last = [row for row in read(run_dir / "metrics.jsonl") if row["kind"] == "epoch"][-1]
        restarts = json.loads((run_dir / "progress.json").read_text())["restarts"]
        table.add_row(
            run_dir.name,
            f"{last['val/acc1']:.2f}",
            f"{last['cost/samples_skipped']:,}",
            f"{last['cost/flops_saved']:.1%}",
            f"{last['time/total_s']:.1f} s" + (f", {restarts} kill survived" if restarts else ""),
        )
    say("result")
    Console(width=100).print(table)
    if recoveries:
        steps = "step" if repeated == 1 else "steps"
        print(
            f"The kill cost {repeated} repeated {steps}. From the last sign of life to the next finished step: "
            f"{recoveries[0]:.1f} s, mostly starting Python and torch again."
        )


def command(module: str, *words: str) -> None:
    """Run one of the package's commands as a user would."""
    print(f"$ python -m {module} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def python() -> str:
    """The interpreter as a person would type it."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def say(text: str) -> None:
    """A headline."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
