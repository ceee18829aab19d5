"""Claims about kaggle.run: what it refuses before anything starts, and how a training is watched and ended.

The runs of the real notebook are in test_kaggle_notebook.py.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from ast_dist import doctor, kaggle
from ast_dist.doctor import Check
from ast_dist.errors import UserError, run_command
from ast_dist.fault.deadline import BEGAN_VARIABLE
from ast_dist.kaggle_inputs import ImagenetIndex
from ast_dist.kaggle_machine import Places, checkpoint_bytes, kaggle_secret, probe_gpus, session_began, usable_gpus
from ast_dist.kaggle_training import command
from tests.kaggle_tree import digits, tree
from tests.launching import environment, start, wait_for
from tests.test_ilsvrc import SYNSETS, write_imagenet
from tests.test_launch import SHOWS_ITS_WORDS, torchrun
from tests.training import snapshot, write_shards

# A mock of the probe's output on a P100, which nobody here has: torch's message where it has no kernels for a GPU.
P100 = (
    '{"name": "CUDA", "status": "FAIL", "detail": "GPU 0: Tesla P100-PCIE-16GB (sm_60) fails at the first operation '
    "(CUDA error: no kernel image is available for execution on the device); torch is built for sm_70, sm_75, sm_80, "
    'sm_86, sm_90, sm_100, sm_120", "remedy": "install a torch built for sm_60, or take another GPU"}'
)
# Likewise of two T4s.
T4S = [
    Check("CUDA", "ok", "GPU 0: Tesla T4 (sm_75), 15.5 of 15.8 GB free"),
    Check("CUDA", "ok", "GPU 1: Tesla T4 (sm_75), 15.5 of 15.8 GB free"),
    Check("nccl", "ok", "2.27.5, summed in a group of one process"),
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(BEGAN_VARIABLE, raising=False)
    return tree(tmp_path / "kaggle")


def refused(root: Path, *words: str, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    """Run, which must be refused with one line and leave working as it is; returns the line."""
    before = snapshot(root / "working")
    with pytest.raises(kaggle.KaggleError) as caught:
        kaggle.run("digits", root=root, words=words, **options)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value._render_traceback_() == [f"error: {caught.value}"]
    assert snapshot(root / "working") == before
    return str(caught.value)


class TestGpus:
    def test_one_that_torch_has_no_kernels_for_is_refused_with_the_setting_to_change(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_shards(root / "input/shards")
        monkeypatch.setattr(kaggle, "probe_gpus", lambda: [Check(**json.loads(P100))])
        line = refused(root, capsys=capsys)
        assert "Tesla P100-PCIE-16GB (sm_60) fails at the first operation" in line
        assert "Settings → Accelerator → GPU T4 x2" in line

    def test_that_work_are_used_all(self) -> None:
        assert usable_gpus(T4S) == 2
        assert usable_gpus([*T4S[:1], T4S[2]]) == 1
        assert usable_gpus([]) == 0

    def test_that_a_driver_has_and_torch_does_not_see_are_refused(self) -> None:
        absent = Check("CUDA", "warn", "there is an NVIDIA driver, but torch is a CPU-only build", "reinstall")
        with pytest.raises(UserError, match="CPU-only build"):
            usable_gpus([absent])

    def test_are_to_be_changed_only_where_one_of_them_fails(self) -> None:
        nccl = Check("nccl", "FAIL", "RuntimeError: NCCL error", "export NCCL_DEBUG=INFO and try again")
        with pytest.raises(UserError) as caught:
            usable_gpus([*T4S[:1], nccl])
        assert str(caught.value) == "RuntimeError: NCCL error. Export NCCL_DEBUG=INFO and try again."
        with pytest.raises(UserError, match=r"GPU T4 x2, and run the cell again; or install a torch built for sm_60"):
            usable_gpus([Check(**json.loads(P100))])

    def test_that_do_not_answer_in_time_are_asked_once_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        silent = [Check("CUDA", "FAIL", doctor.NO_ANSWER, "look into `nvidia-smi`")]
        answers = [silent, T4S]
        monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
        monkeypatch.setattr(doctor, "run_probe", lambda _: answers.pop(0))
        assert probe_gpus() == T4S
        answers[:] = [silent, silent]
        assert probe_gpus() == silent

    @pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine has an NVIDIA driver")
    def test_are_not_probed_where_there_is_no_driver(self) -> None:
        assert probe_gpus() == []

    def test_are_needed_for_fp16(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if probe_gpus():
            pytest.skip("this machine has an NVIDIA driver")
        line = refused(root, "--loop.precision", "fp16", capsys=capsys)
        assert "there is no GPU" in line and "Settings → Accelerator → GPU T4 x2" in line


class TestRefusals:
    @pytest.fixture(autouse=True)
    def cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a machine without a GPU."""
        monkeypatch.setattr(kaggle, "probe_gpus", lambda: [])

    def test_no_data(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no data set is attached" in refused(root, capsys=capsys)

    def test_a_folder_of_data_that_is_not_there(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert refused(root, capsys=capsys, data_dir="/nope") == "data_dir is '/nope': no such folder."

    def test_no_index_that_was_named(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_imagenet(root / "input/imagenet")
        index = ImagenetIndex(root / "input/imagenet", root / "elsewhere", root / "temp").make([], print)
        refused(root, capsys=capsys, resume="must", data_dir=index)
        assert f"data       {index} (an index of files, {2 * len(SYNSETS)} training images)" in capsys.readouterr().out

    def test_options_of_another_type(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name, value in {"run_name": 3, "working_gb": "5", "hours": "8", "words": "--loop.epochs 3"}.items():
            with pytest.raises(kaggle.KaggleError, match=f"^{name} is {value!r}, but must be"):
                kaggle.run("digits", root=root, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(kaggle.KaggleError, match=r"^preset is None"):
            kaggle.run(None, root=root)  # type: ignore[arg-type]

    def test_names_by_which_a_run_would_not_be_found_again(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("digits.archived-1", "digits.log"):
            assert f"run_name is '{name}'" in refused(root, capsys=capsys, run_name=name)

    def test_no_kaggle(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere/input: no such folder"):
            kaggle.run("digits", root=tmp_path / "nowhere")

    def test_a_typo_before_anything_takes_time(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "epochz" in refused(root, capsys=capsys, loop={"epochz": 3})
        assert "loop.epochs is 0" in refused(root, capsys=capsys, loop={"epochs": 0})
        assert "no such preset" in refused(root, "--preset", "imagenet-cagle", capsys=capsys)

    def test_names_that_are_paths(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "run_name is '../a'" in refused(root, capsys=capsys, run_name="../a")
        assert "--run-dir" in refused(root, "--run-dir=x", capsys=capsys)

    def test_half_of_the_data(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "go together" in refused(root, "--data.train", "x", capsys=capsys)

    def test_too_little_room(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_shards(root / "input/shards")
        line = refused(root, capsys=capsys, working_gb=0.4)
        assert "0.00 GB are in" in line and "Kaggle keeps 0.4 GB" in line

    def test_too_little_room_before_an_index_is_written(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_imagenet(root / "input/imagenet")
        assert "Kaggle keeps 0.4 GB" in refused(root, capsys=capsys, working_gb=0.4)
        # And with room enough, ImageNet's folders are taken through an index, which is all that is written.
        with pytest.raises(UserError, match="resume='must'"):
            kaggle.run("digits", root=root, resume="must")
        assert (
            f"data       {root}/input/imagenet (ImageNet's folders); nothing of it is copied" in capsys.readouterr().out
        )
        assert [path.name for path in (root / "working").iterdir()] == ["index"]

    def test_nothing_to_go_on_from_where_there_must_be(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_shards(root / "input/shards")
        assert "resume='must'" in refused(root, capsys=capsys, resume="must")

    def test_of_the_command_are_one_line_and_exit_code_2(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(kaggle.main, ["digits", "--root", str(root), "--loop.epochs", "3"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "no data set is attached" in line
        # Without a preset, the value of a setting is not taken for one.
        assert run_command(kaggle.main, ["--root", str(root), "--loop.precision", "fp32"]) == 2
        assert "no data set is attached" in capsys.readouterr().err


def test_what_was_chosen_and_what_else_was_seen_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(root / "input/small", num_samples=12)
    write_shards(root / "input/datasets/me/large")
    monkeypatch.setattr(kaggle, "probe_gpus", lambda: T4S)
    refused(root, capsys=capsys, resume="must")
    said = capsys.readouterr().out
    assert f"data       {root}/input/datasets/me/large (shards, 96 training images); nothing of it is copied" in said
    assert f"also seen: {root}/input/small (shards, 12 training images)" in said
    refused(root, capsys=capsys, resume="must", data_dir=root / "input/small")
    assert f"data       {root}/input/small" in capsys.readouterr().out


def test_a_checkpoints_size_is_foreseen(tmp_path: Path) -> None:
    from ast_dist.data.index import Index

    train = Index.open(write_shards(tmp_path) / "train")
    resnet50 = checkpoint_bytes(digits("--model.name", "resnet50", "--model.num-classes", "1000"), train)
    # 25,557,032 weights and 53,120 batch statistics of 4 bytes, and as many of the optimizer.
    assert resnet50 == pytest.approx(2 * 4 * (25_557_032 + 53_120), rel=0.01)
    averaged = checkpoint_bytes(
        digits("--model.name", "resnet50", "--model.num-classes", "1000", "--optim.ema-decay", "0.9"), train
    )
    assert averaged == pytest.approx(1.5 * resnet50, rel=0.01)


class TestTheSessionsTime:
    def test_counts_from_the_start_of_this_process(self, root: Path) -> None:
        before = session_began(Places(root))
        assert before < time.time()
        program = "from ast_dist.kaggle_machine import *; print(session_began(Places(Path('NEW'))), time.time())"
        said = subprocess.run(
            [sys.executable, "-c", "import time; time.sleep(0.5);" + program.replace("NEW", str(root / "new"))],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert float(said[1]) - float(said[0]) >= 0.5

    def test_goes_on_where_the_kernel_is_restarted(self, root: Path) -> None:
        began = session_began(Places(root)) - 100
        path = Places(root).session_began
        path.write_text(path.read_text().replace(path.read_text().split()[0], f"{began:.3f}"))
        assert session_began(Places(root)) == pytest.approx(began, abs=0.001)

    @pytest.mark.parametrize("what", ["another machine", "another boot", "another day", "no such file"])
    def test_is_not_that_of_another_session_whose_folder_was_kept(self, root: Path, what: str) -> None:
        now = session_began(Places(root))
        path = Places(root).session_began
        _, _, boot = path.read_text().strip().partition(" ")
        host, _, boot_id = boot.partition("/")
        left = {
            "another machine": f"{now - 100} other/{boot_id}",
            "another boot": f"{now - 100} {host}/other",
            "another day": f"{now - 86400} {boot}",
            "no such file": f"{now - 100}",
        }
        path.write_text(left[what])
        assert session_began(Places(root)) == pytest.approx(now, abs=1)
        assert path.read_text().split()[1] == boot, "and the file is this session's now"

    @pytest.mark.parametrize(
        ("options", "hours"), [({}, 8.5), ({"hours": 0}, 0), ({"session": {"hours": 0}}, 0), ({"hours": 2}, 2)]
    )
    def test_is_limited_unless_the_settings_say_otherwise(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], hours: float
    ) -> None:
        limits = []
        monkeypatch.setattr(kaggle._Session, "run", lambda session: limits.append(session.config.session.hours))
        kaggle.run("digits", root=root, **options)  # type: ignore[arg-type]
        assert limits == [hours]

    def test_that_is_over_is_refused_with_the_file_that_says_so(
        self, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = Places(root).session_began
        line = refused(root, capsys=capsys, hours=1e-9)
        assert f"says {path}" in line and "hours=" in line

    def test_is_what_the_environment_says(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(BEGAN_VARIABLE, "2000")
        assert session_began(Places(root)) == 2000.0
        monkeypatch.setenv(BEGAN_VARIABLE, "noon")
        with pytest.raises(UserError, match="'noon'"):
            session_began(Places(root))


class TestASecret:
    """With a mock of Kaggle's module, which exists nowhere else."""

    def module(self, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
        module = types.ModuleType("kaggle_secrets")
        module.UserSecretsClient = lambda: types.SimpleNamespace(get_secret=answer)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kaggle_secrets", module)

    def test_is_none_outside_of_kaggle(self) -> None:
        assert kaggle_secret("WANDB_API_KEY") is None

    def test_is_what_kaggle_keeps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module(monkeypatch, lambda name: f"key of {name}")
        assert kaggle_secret("WANDB_API_KEY") == "key of WANDB_API_KEY"

    @pytest.mark.parametrize(("settings", "is_on"), [((), True), (("--track.wandb=off",), False)])
    def test_turns_wandb_on_unless_the_settings_say_otherwise_and_is_never_said(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        settings: tuple[str, ...],
        is_on: bool,
    ) -> None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        self.module(monkeypatch, lambda _: "s3cret")
        session = kaggle._Session(Places(root), "digits", "digits", settings, None, "auto", None, 20.0)
        assert session._secrets() == {"WANDB_API_KEY": "s3cret"}
        assert (session.words[-2:] == ["--track.wandb", "online"]) == is_on
        assert "s3cret" not in capsys.readouterr().out + " ".join(session.words)

    def test_that_is_not_attached_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def answer(name: str) -> str:
            raise ConnectionError(name)

        self.module(monkeypatch, answer)
        assert kaggle_secret("WANDB_API_KEY") is None

    def test_that_never_comes_stalls_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module(monkeypatch, lambda _: threading.Event().wait())
        assert kaggle_secret("WANDB_API_KEY", patience_s=0.01) is None


def test_training_is_started_as_the_launcher_for_one_host_starts_it(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(SHOWS_ITS_WORDS.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    words = ("--run-dir", "r")
    shown = torchrun("--nproc-per-node=2", "-m", "ast_dist.train", *words, PYTHON=str(tmp_path / "python"))
    launched = [word for word in shown.stdout.splitlines()[:-3] if word != "--nnodes=1"]  # the default
    started = command(2, words)
    assert started[0] == sys.executable and started[1:3] == launched[:2]
    assert started[-4:] == launched[-4:] == ["-m", "ast_dist.train", *words]
    assert set(started[3:-4]) == set(launched[2:-4])


# Saves when it is told to, and says so in a file: what a training does, without torch.
STUB = """
import signal, sys, time
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("error: a line that is no error's end", flush=True)
print("begun", flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from ast_dist.kaggle_training import Training
Training([sys.executable, sys.argv[1], sys.argv[2]], Path(sys.argv[3]), time.time(), {})
time.sleep(600)
"""


class TestATrainingThatIsWatched:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        (tmp_path / "stub.py").write_text(STUB)
        return tmp_path / "stub.py", tmp_path / "saved", tmp_path / "log"

    def test_saves_when_the_kernel_is_killed(self, files: tuple[Path, Path, Path]) -> None:
        _, saved, log = files
        kernel = start("-c", PARENT, *map(str, files))
        wait_for(lambda: log.exists() and "begun" in log.read_text(), "the training's first line", kernel)
        kernel.kill()
        kernel.communicate()
        deadline = time.monotonic() + 60
        while not saved.exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
