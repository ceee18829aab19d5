"""`ast-dist doctor`, on this machine and on broken ones."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from ast_dist import doctor
from tests.training import write_shards

REAL_CHECKS = ["Python", "torch", "torchvision", "decoders", "gloo", "CUDA"]
LATER_CHECKS = ["DALI", "webdataset", "wandb", "disk", "shared memory", "CPU"]


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ast_dist.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def find(ended: subprocess.CompletedProcess[str], name: str) -> dict[str, str]:
    return next(check for check in json.loads(ended.stdout)["checks"] if check["name"] == name)


def before_site_packages(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def write_stand_in(folder: Path, package: str, body: str) -> str:
    """A package under a real one's name, which Python finds first. Returns the PYTHONPATH that makes it so."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(body)
    return before_site_packages(folder)


def test_this_machine_passes_every_check_and_so_do_sound_data_and_a_run_that_is_to_be(tmp_path):
    shards, run_dir = write_shards(tmp_path / "shards"), tmp_path / "runs" / "1"
    ended = run_doctor("--json", "--data", str(shards), "--data", str(shards / "val"), "--run-dir", str(run_dir))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    document = json.loads(ended.stdout)
    assert document["ok"] is True
    said = ["run dir" if name == "disk" else name for name in LATER_CHECKS]
    names = [*REAL_CHECKS, *said[:3], "data", "data", "data", *said[3:]]
    assert [check["name"] for check in document["checks"] if check["name"] != "nccl"] == names
    assert f"GB free in {tmp_path}" in find(ended, "run dir")["detail"]
    assert not run_dir.parent.exists(), "looking changes nothing"


def test_the_nms_trap_is_named_with_its_remedy_and_the_rest_is_still_checked(tmp_path):
    # A stand-in: it raises what a CUDA build of torchvision raises beside a CPU-only torch.
    raised = "operator torchvision::nms does not exist"
    path = write_stand_in(tmp_path, "torchvision", f"raise RuntimeError({raised!r})\n")
    ended = run_doctor("--json", PYTHONPATH=path)
    assert ended.returncode == 1
    found = find(ended, "torchvision")
    assert found["status"] == "FAIL"
    assert found["remedy"] == "pip install --force-reinstall torch torchvision"
    assert raised in found["detail"]
    for package in ("torch", "torchvision"):
        assert f"{package} {metadata.version(package)}" in found["detail"]
    names = [check["name"] for check in json.loads(ended.stdout)["checks"]]
    assert [name for name in names if name != "nccl"] == [
        *("Python", "torch", "torchvision", "gloo", "CUDA"),  # decoders are torchvision's
        *LATER_CHECKS,
    ]


def test_a_torch_that_kills_its_process_does_not_kill_the_doctor(tmp_path):
    # A stand-in for a torch built for another processor, which dies on import.
    path = write_stand_in(tmp_path, "torch", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    ended = run_doctor(PYTHONPATH=path)
    assert ended.returncode == 1
    *lines, summary = ended.stdout.splitlines()
    # One line a check; what needs torch is left out, so that the one cause is said once.
    assert [line[6:19].strip() for line in lines] == ["Python", "torch", *LATER_CHECKS]
    assert lines[1] == "FAIL  torch          ended by SIGKILL → pip install --force-reinstall torch torchvision"
    assert summary.startswith(f"{len(lines)} checks: ")
    assert " 0 FAIL" not in summary


def test_a_library_that_cannot_be_imported_fails_with_its_reason_and_remedy(tmp_path, monkeypatch):
    # A stand-in for an installation with a library file missing.
    path = write_stand_in(tmp_path, "webdataset", "raise ImportError('libtar.so: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", path)
    assert doctor.run_probe("webdataset") == [
        doctor.Check(
            "webdataset",
            "FAIL",
            "ImportError: libtar.so: cannot open shared object file",
            "pip install --force-reinstall webdataset",
        )
    ]


def test_gloo_without_a_network_interface_fails_with_its_remedy(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (found,) = doctor.run_probe("gloo")
    assert (found.name, found.status) == ("gloo", "FAIL")
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_the_wandb_key_is_found_where_wandb_finds_it_and_never_shown(tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert doctor.wandb_key_source() is None
    secret = "0123456789abcdef" * 2 + "01234567"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {secret}\n")
    netrc.chmod(0o600)
    assert doctor.wandb_key_source() == str(netrc)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert doctor.wandb_key_source() is None
    monkeypatch.setenv("WANDB_API_KEY", secret)
    assert doctor.wandb_key_source() == "WANDB_API_KEY"
    (check,) = doctor.probe_wandb()
    assert "API key from WANDB_API_KEY" in check.detail
    assert secret not in str(check)


@pytest.mark.parametrize(
    ("has_driver", "built_for_cuda", "visible", "status"),
    [(False, "13.2", None, "ok"), (True, "13.2", "", "ok"), (True, None, None, "warn"), (True, "13.2", None, "warn")],
)
def test_a_gpu_that_torch_cannot_see_is_a_warning_only_where_there_is_one_to_see(
    has_driver, built_for_cuda, visible, status
):
    found = doctor.check_absent_gpu(has_driver, built_for_cuda, visible, "the driver is too old")
    assert found.status == status
    assert bool(found.remedy) == (status == "warn")


def test_python_below_the_floor_fails():
    assert doctor.check_python((3, 11, 0)).status == "ok"
    assert doctor.check_python((3, 10, 14)).status == "FAIL"


def test_a_cpu_quota_below_the_cores_is_a_warning(tmp_path):
    limit = tmp_path / "cpu.max"
    limit.write_text("50000 100000\n")
    found = doctor.check_cores(limit)
    assert found.status == "warn"
    assert "may use the time of 0.5" in found.detail
    limit.write_text("max 100000\n")
    assert doctor.check_cores(limit).status == "ok"
    assert doctor.check_cores(tmp_path / "absent").status == "ok"
