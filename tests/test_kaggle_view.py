"""Claims about what is shown of a training on Kaggle, while it goes on and at its end."""

import json
import os
import types
from pathlib import Path

import pytest

from ast_dist import kaggle
from ast_dist.kaggle_view import AgentNoise, NotebookView, notebook_display


class FakeDisplay(types.ModuleType):
    """A mock of IPython.display that notes what is shown; the real one runs in test_kaggle_notebook.py."""

    def __init__(self) -> None:
        super().__init__("display")
        self.shown: list[tuple[str, dict[str, str]]] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> types.SimpleNamespace:
        assert raw and display_id
        self.shown.append(("new", bundle))
        return types.SimpleNamespace(update=lambda bundle, raw: self.shown.append(("update", bundle)))


class TestTheCell:
    @pytest.fixture
    def display(self) -> FakeDisplay:
        return FakeDisplay()

    def test_is_refreshed_every_minute_at_each_epoch_and_with_each_picture(
        self, tmp_path: Path, display: FakeDisplay
    ) -> None:
        now = [0.0]
        view = NotebookView(tmp_path, display, clock=lambda: now[0])

        def news(after_s: float) -> int:
            now[0] += after_s
            before = len(display.shown)
            view.refresh()
            return len(display.shown) - before

        assert news(0) == 2, "the picture's place and the status, at once"
        assert news(59) == 0
        assert news(1) == 1
        (tmp_path / "progress.json").write_text(json.dumps({"state": "finished", "epoch": 1}))
        assert news(1) == 1, "an epoch"
        assert news(1) == 0
        (tmp_path / "dashboard.png").write_bytes(b"png")
        assert news(1) == 2, "the picture and the status"
        assert news(1) == 0
        os.utime(tmp_path / "dashboard.png", ns=(1, 1))
        assert news(1) == 2
        (tmp_path / "dashboard.png").unlink()
        assert news(1) == 1, "that it is gone"
        assert news(1) == 0, "and no more of that"
        assert [kind for kind, _ in display.shown].count("new") == 2, "one picture and one text, in place"

    def test_keeps_warnings_and_shows_the_last_lines(
        self, tmp_path: Path, display: FakeDisplay, capsys: pytest.CaptureFixture[str]
    ) -> None:
        view = NotebookView(tmp_path, display)
        view.lines([f"epoch {number}" for number in range(50)])
        view.lines(["warning: a sample is damaged"])
        view.refresh()
        text = display.shown[-1][1]["text/plain"]
        assert "epoch 49" in text and "epoch 40" not in text
        assert capsys.readouterr().out == "warning: a sample is damaged\n"

    def test_that_cannot_show_anything_warns_once_and_stops_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        view = NotebookView(tmp_path, types.ModuleType("no display"))
        for _ in range(4):
            view.refresh(is_last=True)
        assert capsys.readouterr().err == "", "it may pass"
        for _ in range(4):
            view.refresh(is_last=True)
        assert capsys.readouterr().err.count("nothing more is shown here") == 1

    def test_that_misreads_a_file_once_goes_on(self, tmp_path: Path, display: FakeDisplay) -> None:
        view = NotebookView(tmp_path, display)
        for looks in (1, 4):
            (tmp_path / "dashboard.png").mkdir()  # no picture can be read
            for _ in range(looks):
                view.refresh(is_last=True)
            (tmp_path / "dashboard.png").rmdir()
            view.refresh(is_last=True)
        view.lines(["epoch 1"])
        view.refresh(is_last=True)
        assert "epoch 1" in display.shown[-1][1]["text/plain"]

    def test_of_a_run_that_begins_anew_shows_nothing_of_the_one_that_it_moves_aside(
        self, tmp_path: Path, display: FakeDisplay
    ) -> None:
        for name, content in {"progress.json": '{"state": "paused"}', "dashboard.png": "old", "run_id": "old"}.items():
            (tmp_path / name).write_text(content)
        view = NotebookView(tmp_path, display, is_new=True)
        view.refresh(is_last=True)
        shown = [bundle["text/plain"] for _, bundle in display.shown]
        assert shown[0] == "no dashboard yet" and shown[1].startswith("starting")
        (tmp_path / "run_id").write_text("new")
        view.refresh(is_last=True)
        assert "image/png" in display.shown[-2][1] and "paused" in display.shown[-1][1]["text/plain"]

    def test_is_no_cell_outside_of_a_notebook(self) -> None:
        assert notebook_display() is None


class TestTheClosingWords:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        self.write(tmp_path, state="paused", message="session deadline: saved, nothing lost")
        return tmp_path

    def write(self, run_dir: Path, **more: object) -> None:
        known = {"epoch": 3, "epochs": 30, "step": 1234, "best_acc1": 51.5, "checkpoint": "step-00001234"}
        (run_dir / "progress.json").write_text(json.dumps({**known, **more}))

    def test_name_the_one_action_that_keeps_what_an_interactive_session_saved(self, run_dir: Path) -> None:
        saved, keep, go_on = kaggle.closing_words(run_dir, "Interactive")
        assert saved.startswith("saved: epoch 3 of 30, step 1,234, best top-1 51.50 %, step-00001234")
        assert "Save Version" in keep and "/kaggle/working does not last by itself" in keep
        assert "attach that output" in go_on

    def test_say_of_a_saved_versions_run_that_its_output_is_kept(self, run_dir: Path) -> None:
        _, keep, go_on = kaggle.closing_words(run_dir, "Batch")
        assert "the output of this version" in keep and "Save Version" not in keep
        assert "attach that output" in go_on

    def test_give_a_command_that_can_be_pasted(self, tmp_path: Path) -> None:
        run_dir = tmp_path / "my run"
        run_dir.mkdir()
        self.write(run_dir, state="finished", message="")
        assert f"ast-dist export '{run_dir}' --to" in kaggle.closing_words(run_dir)[-1]

    def test_say_where_the_weights_of_a_finished_run_are(self, run_dir: Path) -> None:
        self.write(run_dir, state="finished", message="")
        finished, keep, weights = kaggle.closing_words(run_dir, "Interactive")
        assert finished.startswith("finished: ") and "Save Version" in keep and "ast-dist export" in weights

    def test_stand_an_odd_file(self, run_dir: Path) -> None:
        (run_dir / "progress.json").write_text('{"state": "paused", "step": "x", "best_acc1": null}')
        assert "step 0" in kaggle.closing_words(run_dir)[0]

    def test_of_a_run_that_did_no_step_say_so(self, tmp_path: Path) -> None:
        assert "nothing is lost" in kaggle.closing_words(tmp_path / "none")[0]


def test_what_torchrun_says_of_a_stop_is_left_out_and_other_tracebacks_are_not() -> None:
    noise = AgentNoise()
    stop = [
        "W1125 09:53:56.081000 6119 /x/torch/distributed/elastic/agent/server/api.py:753] Received 15 death signal",
        "Traceback (most recent call last):",
        '  File "/x/torch/distributed/run.py", line 1142, in <module>',
        "torch.distributed.elastic.multiprocessing.api.SignalException: Process 6119 got signal: 15",
    ]
    other = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "ZeroDivisionError: by zero"]
    lines = ["epoch 1", *stop, *other, "epoch 2", *other[:2]]
    kept = [line for start in range(0, len(lines), 2) for line in noise.without(lines[start : start + 2])]
    assert [*kept, *noise.rest()] == ["epoch 1", *other, "epoch 2", *other[:2]]
