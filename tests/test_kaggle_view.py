"""Claims about what a cell shows of a training."""

import json
import os
import types
from pathlib import Path

import pytest

from ast_dist.kaggle_view import NotebookView, notebook_display


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
