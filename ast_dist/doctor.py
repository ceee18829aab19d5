"""What this machine can run, one line a check, and the remedy where one is due.

Usage: `python -m ast_dist.doctor [--data DIR …] [--run-dir RUN] [--json]`

Libraries are probed in processes of their own: a torch that crashes on import takes its probe down, not the doctor.
A device or a process group counts only after a real operation on it, data only after a sample was decoded. Nothing
here uses the network, but for data behind a URL.
"""

import argparse
import json
import netrc
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ast_dist import __version__
from ast_dist.doctor_folders import Check, check_disk, check_run_dir, probe_data
from ast_dist.errors import run_command

PROBE_DEADLINE_S = 120
NO_ANSWER = f"no answer within {PROBE_DEADLINE_S} s"
MIN_SHARED_MEMORY_MB = 256  # NCCL's rings between GPUs of one host; a container gets 64 MB unless told otherwise
REINSTALL_PAIR = "pip install --force-reinstall torch torchvision"


def diagnose(data: Sequence[str] = (), run_dir: Path | None = None) -> list[Check]:
    """Run every check. Where torch cannot be imported, what needs it is left out: the one cause is said once.

    data: folders or URLs of shard sets. run_dir: of a run that there is, or is to be.
    """
    checks = [check_python(), *run_probe("torch")]
    torch_works = any(check.name == "torch" and check.status == "ok" for check in checks)
    probes = [*(("gloo", "cuda") if torch_works else ()), "dali", "webdataset", "wandb"]
    with ThreadPoolExecutor() as pool:
        for found in [
            *pool.map(run_probe, probes),
            *(pool.map(partial(run_probe, "data"), data) if torch_works else ()),
        ]:
            checks += found
    disk = check_run_dir(run_dir) if run_dir else check_disk(Path.cwd())
    return [*checks, disk, check_shared_memory(), check_cores()]


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """A checkout also starts on an older Python than the one that pip would have insisted on."""
    number = ".".join(map(str, version))
    detail = f"{number} on {platform.system()} {platform.machine()}, ast-dist {__version__}"
    if version < (3, 11):
        return Check("Python", "FAIL", detail, "install Python 3.11 or newer and make a new environment with it")
    return Check("Python", "ok", detail)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    if not folder.is_dir():
        return Check("shared memory", "ok", f"no {folder} on this system, none needed")
    size_mb = shutil.disk_usage(folder).total / 1e6
    if size_mb < MIN_SHARED_MEMORY_MB:
        detail = f"{size_mb:.0f} MB in {folder}, below {MIN_SHARED_MEMORY_MB} MB: too little for NCCL between GPUs"
        return Check("shared memory", "warn", detail, "start the container with --shm-size=1g or --ipc=host")
    return Check("shared memory", "ok", f"{size_mb:,.0f} MB in {folder}")


def check_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> Check:
    """Cores this process may run on, and the container's limit on their time, which the cores do not show."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = quota_file.read_text().split() if quota_file.is_file() else ("max", "100000")
    if quota != "max" and int(quota) < cores * int(period):
        limit = int(quota) / int(period)
        detail = f"{cores} cores, but the container may use the time of {limit:g}"
        return Check("CPU", "warn", detail, f"set --data.threads to {max(1, int(limit))} or fewer per process")
    return Check("CPU", "ok", f"{cores} cores")


def probe_torch() -> Iterator[Check]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only build"
    yield Check("torch", "ok", f"{torch.__version__} ({build})")
    import torchvision
    from torchvision.io import decode_image, encode_jpeg, encode_png

    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist()
    if kept != [0]:
        raise RuntimeError(f"torchvision::nms kept boxes {kept} where it should keep [0]")
    yield Check("torchvision", "ok", str(torchvision.__version__))
    grey = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    for name, encode in (("JPEG", encode_jpeg), ("PNG", encode_png)):
        if not torch.equal(decode_image(encode(grey)), grey):
            raise RuntimeError(f"a grey {name} did not come back as it was")
    yield Check("decoders", "ok", "JPEG and PNG through torchvision")


def probe_gloo() -> Iterator[Check]:
    import torch

    _all_reduce_alone("gloo", torch.device("cpu"))
    yield Check("gloo", "ok", "summed in a group of one process")


def probe_cuda() -> Iterator[Check]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reason = _first_line(str(caught[0].message)) if caught else ""
        has_driver = Path("/proc/driver/nvidia/version").exists()
        yield check_absent_gpu(has_driver, torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"), reason)
        return
    for number in range(torch.cuda.device_count()):
        yield _check_gpu(number)
    _all_reduce_alone("nccl", torch.device("cuda", 0))
    yield Check("nccl", "ok", f"{'.'.join(map(str, torch.cuda.nccl.version()))}, summed in a group of one process")


def _check_gpu(number: int) -> Check:
    """Train one convolution on the GPU: `is_available` is also true where torch has no kernels for it."""
    import torch

    major, minor = torch.cuda.get_device_capability(number)
    device = f"GPU {number}: {torch.cuda.get_device_name(number)} (sm_{major}{minor})"
    try:
        images = torch.ones(2, 3, 8, 8, device=f"cuda:{number}", requires_grad=True)
        weights = torch.ones(4, 3, 3, 3, device=f"cuda:{number}")
        torch.nn.functional.conv2d(images, weights).sum().backward()
        torch.cuda.synchronize(number)
    except RuntimeError as error:
        built_for = ", ".join(torch.cuda.get_arch_list())
        detail = f"{device} fails at the first operation ({_first_line(str(error))}); torch is built for {built_for}"
        return Check("CUDA", "FAIL", detail, f"install a torch built for sm_{major}{minor}, or take another GPU")
    free_bytes, total_bytes = torch.cuda.mem_get_info(number)
    return Check("CUDA", "ok", f"{device}, {free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB free")


def check_absent_gpu(has_driver: bool, built_for_cuda: str | None, visible: str | None, reason: str) -> Check:
    """Judge a torch that sees no GPU.

    built_for_cuda: torch.version.cuda. visible: CUDA_VISIBLE_DEVICES. reason: what torch said, or "".
    """
    on_cpu = "training runs on the CPU, over gloo"
    if not has_driver:
        return Check("CUDA", "ok", f"no NVIDIA driver: {on_cpu}")
    if visible in ("", "-1"):
        return Check("CUDA", "ok", f"GPUs are hidden by CUDA_VISIBLE_DEVICES={visible!r}: {on_cpu}")
    if built_for_cuda is None:
        return Check("CUDA", "warn", "there is an NVIDIA driver, but torch is a CPU-only build", REINSTALL_PAIR)
    detail = (
        f"there is an NVIDIA driver, but torch (CUDA {built_for_cuda}) finds no GPU: {reason or 'it gives no reason'}"
    )
    return Check("CUDA", "warn", detail, "upgrade the driver, or install a torch built for the CUDA it supports")


def _all_reduce_alone(backend: str, device: Any) -> None:
    """Sum a tensor in a process group of one. Raises RuntimeError when the backend cannot start or sums wrongly."""
    import torch
    import torch.distributed as dist

    # HashStore stays in this process: no port that could be taken.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        ones = torch.ones(4, device=device)
        dist.all_reduce(ones)
        if ones.tolist() != [1.0] * 4:
            raise RuntimeError(f"{backend} summed four ones over one process to {ones.tolist()}")
    finally:
        dist.destroy_process_group()


def probe_dali() -> Iterator[Check]:
    names = [f"nvidia-dali-cuda{version}" for version in ("130", "120", "110")]
    installed = [d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"] in names]
    if not installed:
        yield Check("DALI", "ok", "not installed (optional): torchvision decodes")
        return
    import torch
    from nvidia import dali

    from ast_dist.data.decode_dali import DaliBatchDecoder, DaliCpuDecoder

    DaliCpuDecoder().try_out()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        DaliBatchDecoder(torch.device("cuda", 0), threads=1).try_out()
    decoded = f"decoded a JPEG on the {'CPU and on GPU 0' if on_gpu else 'CPU'}"
    yield Check("DALI", "ok", f"{dali.__version__} ({installed[0]}), {decoded}")


def probe_webdataset() -> Iterator[Check]:
    import webdataset

    yield Check("webdataset", "ok", str(webdataset.__version__))


def probe_wandb() -> Iterator[Check]:
    import wandb

    key = wandb_key_source()
    said = f"API key from {key}" if key else "no API key: --track.wandb offline works, online needs `wandb login`"
    yield Check("wandb", "ok", f"{wandb.__version__}, {said}")


def wandb_key_source() -> str | None:
    """Where W&B would find its key, or None. The key itself is neither returned nor checked with the server."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    candidates = [os.environ.get("NETRC") or "~/.netrc", "~/_netrc"]
    path = next((p for p in (Path(c).expanduser() for c in candidates) if p.is_file()), None)
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        found = netrc.netrc(path).authenticators(host) if path else None
    except (netrc.NetrcParseError, OSError):
        return None
    return str(path) if found else None


# Probe → (what it runs, the names of its findings in order, the remedy where it ends without them).
PROBES: dict[str, tuple[Callable[..., Iterator[Check]], tuple[str, ...], str]] = {
    "torch": (probe_torch, ("torch", "torchvision", "decoders"), REINSTALL_PAIR),
    "gloo": (
        probe_gloo,
        ("gloo",),
        "export GLOO_SOCKET_IFNAME=lo (one machine), or let the host name resolve (/etc/hosts)",
    ),
    "cuda": (probe_cuda, ("CUDA", "nccl"), "look into `nvidia-smi`; for NCCL, export NCCL_DEBUG=INFO and try again"),
    "dali": (probe_dali, ("DALI",), "pip install --force-reinstall 'ast-dist[dali]', or pip uninstall it"),
    "webdataset": (probe_webdataset, ("webdataset",), "pip install --force-reinstall webdataset"),
    "wandb": (probe_wandb, ("wandb",), "pip install --force-reinstall wandb"),
    "data": (probe_data, ("data",), "run data_prep.check_shards on it"),
}


def run_probe(probe: str, *arguments: str) -> list[Check]:
    """Run one probe in a process of its own; what it did not live to say is a FAIL."""
    command = [sys.executable, "-c", f"from ast_dist import doctor; doctor.report_probe(*{(probe, *arguments)!r})"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_DEADLINE_S, check=False)
        returncode, stdout, stderr = child.returncode, child.stdout, child.stderr
    except subprocess.TimeoutExpired:
        returncode, stdout, stderr = 1, "", NO_ANSWER
    checks = [Check(**json.loads(line)) for line in stdout.splitlines() if line.startswith('{"name"')]
    _, names, remedy = PROBES[probe]
    if returncode:
        said = {check.name for check in checks}
        name = next((name for name in names if name not in said), names[-1])
        checks.append(_explain(name, returncode, stderr, remedy))
    return checks


def report_probe(probe: str, *arguments: str) -> None:
    """Print a probe's findings, one JSON object a line, each as soon as it is known; end on the first exception."""
    try:
        for check in PROBES[probe][0](*arguments):
            print(json.dumps(asdict(check)), flush=True)
    except Exception as error:  # noqa: BLE001 - whatever ends a probe is its finding
        sys.exit(f"{type(error).__name__}: {_first_line(str(error))}")


def _explain(name: str, returncode: int, stderr: str, remedy: str) -> Check:
    """Say why a probe ended early: the signal that ended it, or its exception's line."""
    if returncode < 0:
        reason = f"ended by {signal.Signals(-returncode).name}"
    else:
        reason = (stderr.strip().splitlines() or [f"exit code {returncode}"])[-1]
    if "torchvision::nms does not exist" in reason:
        versions = " beside ".join(f"{package} {_installed_version(package)}" for package in ("torch", "torchvision"))
        reason = (
            f"{versions} is no matching pair of builds, often a CPU-only torch beside a CUDA torchvision ({reason})"
        )
    return Check(name, "FAIL", reason, remedy)


def _installed_version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def main(argv: list[str]) -> int:
    """Print all checks. Returns 0 when nothing FAILs, else 1."""
    parser = argparse.ArgumentParser(prog="python -m ast_dist.doctor", description="Check what this machine can run.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--data", action="append", default=[], metavar="DIR", help="shards to look at; may be repeated")
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="where a run's checkpoints go, or are to go")
    arguments = parser.parse_args(argv)
    checks = diagnose(arguments.data, arguments.run_dir)
    count = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "FAIL")}
    if arguments.json:
        document = {"ok": not count["FAIL"], "version": __version__, "checks": [asdict(check) for check in checks]}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        print(*checks, sep="\n")
        print(f"{len(checks)} checks: {count['ok']} ok, {count['warn']} warn, {count['FAIL']} FAIL")
    return 1 if count["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
