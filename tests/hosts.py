"""Several hosts on one machine: network namespaces that meet at a switch, itself in a namespace of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.launching import PATIENCE_S, ROOT, environment

PORT = 29400
SUPERVISE = ("launch/supervise", "--backoff-s=0.2", "launch/torchrun.sh")


def missing() -> str:
    """Why this machine cannot have such hosts; empty where it can."""
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    name = f"ast-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """`count` hosts with addresses 10.77.0.1, 10.77.0.2 … and a disk in common.

    rendezvous: the number of the host where they meet, from 0.
    """

    def __init__(self, count: int, folder: Path, rendezvous: int = 0) -> None:
        self._folder = folder
        self._rendezvous = rendezvous
        self._prefix = f"ast{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._processes: list[list[subprocess.Popen[bytes]]] = [[] for _ in range(count)]
        self.logs = [folder / f"host-{number}.log" for number in range(count)]
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number in range(count):
                self._plug_in(number)
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        return len(self._processes)

    def start(self, number: int, *words: str) -> "subprocess.Popen[bytes]":
        """Start launch/supervise with launch/torchrun.sh and these words on a host; its output goes to its log."""
        settings = {
            "NNODES": f"2:{self.count}",
            "NPROC_PER_NODE": "1",
            "RDZV_ENDPOINT": f"{_address(self._rendezvous)}:{PORT}",
            "RDZV_ID": self._prefix,
            # Short waits: all hosts have one clock, and nothing else to do.
            "RDZV_CONF": f"is_host={int(number == self._rendezvous)},last_call_timeout=4,keep_alive_interval=1,"
            "keep_alive_max_attempt=4",
            "LOCAL_ADDR": _address(number),
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHON": sys.executable,
        }
        with self.logs[number].open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name(number), *SUPERVISE, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(), **settings},
                cwd=ROOT,
            )
        self._processes[number].append(process)
        return process

    def lose(self, number: int) -> None:
        """All the host's processes end at once; its kernel still closes their connections."""
        with contextlib.suppress(ProcessLookupError):
            for _ in range(3):  # what a killed process had just started
                for pid in self._pids(number):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes[number]:
            process.wait(timeout=PATIENCE_S)

    def cut(self, number: int) -> None:
        """Pull the host's network cable."""
        _ip("-n", self._switch, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Put the cable back."""
        _ip("-n", self._switch, "link", "set", f"port{number}", "up")

    def close(self) -> None:
        """Leave no process and no namespace behind."""
        for number in range(self.count):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.lose(number)
        for name in [*map(self._name, range(self.count)), self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _plug_in(self, number: int) -> None:
        name, switch = self._name(number), self._switch
        _ip("netns", "add", name)
        _ip("-n", switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", name, "link", "set", link, "up")

    def _name(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def _pids(self, number: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._name(number)], check=True, capture_output=True, text=True)
        return [int(word) for word in listed.stdout.split()]


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
