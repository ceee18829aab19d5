"""Claims about the state that a Kaggle session goes on from: the newest sound checkpoint, whole, or nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ast_dist import kaggle_state
from ast_dist.errors import UserError
from ast_dist.fault.commit import committed
from ast_dist.kaggle import _Session
from ast_dist.kaggle_machine import Places
from ast_dist.kaggle_state import Saved, bytes_of, carry_over, make_room, newest, too_full
from ast_dist.run_dir import checkpoints_path
from tests.kaggle_tree import damage, digits, tree, wanted, write_run
from tests.training import snapshot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tree(tmp_path / "kaggle")


@pytest.fixture
def own(root: Path) -> Path:
    return root / "working" / "runs" / "digits"


class Told(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def choose(own: Path, *runs: Path, words: tuple[str, ...] = (), told: Told | None = None) -> Saved | None:
    return newest(runs, wanted(*words), own, told if told is not None else Told())


class TestTheNewestCheckpoint:
    def test_is_the_one_with_the_most_steps_whichever_run_has_it(self, root: Path, own: Path) -> None:
        runs = [write_run(own, 20, 40), write_run(root / "input/a/runs/digits", 60, 100), write_run(root / "b", 80)]
        saved = choose(own, *runs)
        assert saved is not None
        assert saved.checkpoint == runs[1] / "checkpoints/step-00000100"
        assert (saved.run, saved.total_s, saved.sessions) == (runs[1], 1000.0, 2)

    def test_of_two_alike_is_the_one_that_need_not_be_copied(self, root: Path, own: Path) -> None:
        for runs in ([write_run(root / "a", 40), write_run(own, 40)], [own, root / "a"]):
            saved = choose(own, *runs)
            assert saved is not None and saved.run == own

    def test_that_is_damaged_gives_way_to_the_one_before_and_is_named(self, root: Path, own: Path) -> None:
        run = write_run(root / "a", 20, 40, 60)
        other = write_run(root / "b", 30)
        damage(run / "checkpoints/step-00000060")
        damage(run / "checkpoints/step-00000040")
        told = Told()
        saved = choose(own, run, other, told=told)
        assert saved is not None and saved.checkpoint == other / "checkpoints/step-00000030"
        assert ["step-00000060" in told[0], "step-00000040" in told[1], len(told)] == [True, True, 2]
        assert all("SHA-256" in line and "step-00000030" in line for line in told)

    def test_is_refused_where_all_are_damaged(self, root: Path, own: Path) -> None:
        run = write_run(root / "a", 20)
        damage(run / "checkpoints/step-00000020")
        with pytest.raises(UserError, match=r"none of the 1 checkpoints here is sound.*step-00000020"):
            choose(own, run)

    def test_is_none_where_there_is_no_run(self, own: Path) -> None:
        assert choose(own) is None

    def test_of_another_configuration_is_passed_over_and_the_difference_told(self, root: Path, own: Path) -> None:
        other = write_run(root / "a" / "width", 90, words=("--model.width", "64"))
        same = write_run(root / "b", 10)
        told = Told()
        saved = choose(own, other, same, told=told)
        assert saved is not None and saved.run == same
        assert "model.width: 64 → 32" in told[0] and str(other) in told[0]

    @pytest.mark.parametrize("where", ["attached", "in working"])
    def test_of_a_run_of_the_same_name_with_another_configuration_is_refused(
        self, root: Path, own: Path, where: str
    ) -> None:
        run = own if where == "in working" else root / "input/notebooks/me/nb/runs/digits"
        write_run(run, 90, words=("--seed", "3"))
        with pytest.raises(UserError, match=r"another configuration \(seed: 3 → 0\)"):
            choose(own, run)

    def test_may_differ_in_what_does_not_decide_the_weights(self, root: Path, own: Path) -> None:
        run = write_run(root / "a", 10, words=("--checkpoint.keep-last", "7", "--data.threads", "3"))
        assert choose(own, run, words=("--session.hours", "3")) is not None

    def test_counts_as_the_same_where_the_run_settled_an_automatic_setting(self, root: Path, own: Path) -> None:
        run = write_run(root / "a", 10, words=("--data.shuffle-block-shards", "8"))
        assert choose(own, run) is not None
        with pytest.raises(UserError, match="shuffle_block_shards: 8 → 0"):
            choose(root / "a", run, words=("--data.shuffle-block-shards", "0"))


class TestAnotherRunOfTheSameConfiguration:
    def begun(self, folder: Path, step: int, identity: str) -> Path:
        write_run(folder, step)
        (folder / "run_id").write_text(f"{identity}\n")
        return folder

    def test_does_not_undo_a_run_that_was_begun_anew_however_far_it_came(self, root: Path, own: Path) -> None:
        attached = self.begun(root / "input/nb/runs/digits", 229, "old")
        self.begun(own, 42, "new")
        told = Told()
        saved = choose(own, own, attached, told=told)
        assert saved is not None and saved.checkpoint == own / "checkpoints/step-00000042"
        [line] = told
        assert line.startswith(f"passed over {attached}: another run") and str(own) in line

    def test_is_not_a_later_state_of_the_same_run(self, root: Path, own: Path) -> None:
        attached = self.begun(root / "input/nb/runs/digits", 229, "same")
        self.begun(own, 42, "same")
        saved = choose(own, own, attached)
        assert saved is not None and saved.run == attached

    def test_is_none_of_it_where_the_name_was_asked_for(self, root: Path, own: Path) -> None:
        other = write_run(root / "input/nb/runs/other", 40)
        told = Told()
        assert newest([other], wanted(), own, told, is_named=True) is None
        assert told == [f"passed over {other}: its name is not digits"]
        saved = newest([other], wanted(), own, told)
        assert saved is not None and saved.run == other

    def test_is_continued_without_a_name_and_that_is_said(
        self, root: Path, own: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        saved = choose(own, write_run(root / "input/nb/runs/other", 40))
        assert saved is not None
        data = ["--data.train=t", "--data.val=v"]
        _Session(Places(root), "digits", None, data, None, "auto", None, 20.0)._prepare(saved, None)  # type: ignore[arg-type]
        assert "that run is named other, and goes on here; for a new run, give run_name" in capsys.readouterr().out
        assert committed(checkpoints_path(own))


class TestACarriedRun:
    @pytest.fixture
    def saved(self, root: Path, own: Path) -> Saved:
        run = write_run(root / "input/nb/runs/digits", 20, 40, 60, 80, acc1={20: 50.0, 40: 90.0, 60: 80.0})
        damage(run / "checkpoints/step-00000080")
        (run / "wandb_id").write_text("abc\n")
        (run / "run_id").write_text("0f\n")
        for path in run.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        saved = choose(own, run)
        assert saved is not None and saved.checkpoint.name == "step-00000060"
        return saved

    def test_has_its_files_the_sound_checkpoint_and_the_best_one_and_can_be_written(
        self, saved: Saved, own: Path
    ) -> None:
        assert carry_over(saved, own) is None
        assert [path.name for path in committed(checkpoints_path(own))] == ["step-00000040", "step-00000060"]
        names = {path.name for path in own.iterdir()}
        assert names == {
            "checkpoints",
            *"config.yaml metrics.jsonl progress.json run_id sessions.jsonl wandb_id".split(),
        }
        assert all(path.stat().st_mode & 0o200 for path in own.rglob("*"))
        assert choose(own, own) is not None

    def test_has_the_logs_by_which_wandb_knows_its_rows_and_no_more_of_its_files(self, saved: Saved, own: Path) -> None:
        session = saved.run / "wandb" / "offline-run-20260101_000000-abc"
        (session / "files").mkdir(parents=True)
        for name in ("run-abc.wandb", "run-abc.wandb.synced", "files/media.jpg"):
            (session / name).write_text("x")
        carry_over(saved, own)
        assert {path.name for path in (own / "wandb").rglob("*") if path.is_file()} == {
            "run-abc.wandb",
            "run-abc.wandb.synced",
        }

    def test_takes_the_place_of_one_that_came_less_far_which_is_kept(self, saved: Saved, own: Path) -> None:
        write_run(own, 7)
        aside = carry_over(saved, own)
        assert aside is not None and [path.name for path in committed(checkpoints_path(aside))] == ["step-00000007"]
        assert committed(checkpoints_path(own))[-1].name == "step-00000060"

    @pytest.mark.parametrize("at", ["file", "checkpoint", "rename"])
    def test_that_is_killed_in_mid_copy_leaves_what_stood_there(
        self, saved: Saved, own: Path, at: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class KilledError(BaseException):
            """Ends the copy at that place, as a kill would: nothing catches it."""

        def kill(*_: object) -> None:
            raise KilledError

        place = {"file": (shutil, "copyfile"), "checkpoint": (kaggle_state, "copy_folder"), "rename": None}[at]
        write_run(own, 7)
        before = snapshot(own)
        with monkeypatch.context() as patch:
            patch.setattr(*(place or (kaggle_state, "archive")), kill)
            with pytest.raises(KilledError):
                carry_over(saved, own)
        assert snapshot(own) == before
        assert carry_over(saved, own) is not None
        assert [path.name for path in own.parent.iterdir() if path.name.startswith(".")] == []

    def test_that_arrives_changed_is_refused_and_nothing_has_changed(
        self, saved: Saved, own: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = kaggle_state.copy_folder

        def flip(source: Path, target: Path) -> None:
            copy(source, target)
            damage(target)

        write_run(own, 7)
        before = snapshot(own.parent)
        monkeypatch.setattr(kaggle_state, "copy_folder", flip)
        with pytest.raises(UserError, match="cannot be copied"):
            carry_over(saved, own)
        assert snapshot(own.parent) == before


class TestRoom:
    def room(self, root: Path, *words: str, goes_on: bool = False) -> str:
        """Of a run with checkpoints of 0.1 GB, in 20 GB."""
        config = digits("--checkpoint.keep-every-h", "0", "--checkpoint.keep-last", "2", *words)
        return make_room(root / "working", root / "working/runs/digits", config, 10**8, 20.0, goes_on)

    def test_is_said_with_what_is_there_and_what_the_run_needs(self, root: Path) -> None:
        sparse(root / "working" / "notes.txt", 3.0)
        # The two newest, the best, the one being written, and 0.5 GB for the rest.
        assert self.room(root) == f"3.00 GB are in {root}/working, and the run needs up to 0.90 GB more, of 20 GB"
        assert "up to 1.00 GB more" in self.room(root, "--checkpoint.keep-last", "3")

    def test_is_refused_in_one_line_with_both_numbers_and_the_largest_thing_there(self, root: Path) -> None:
        sparse(root / "working" / "notes.txt", 6.2)
        sparse(root / "working" / "old" / "shards.tar", 13.0)
        with pytest.raises(UserError) as caught:
            self.room(root)
        (line,) = str(caught.value).splitlines()
        assert "19.20 GB are in" in line and "up to 0.90 GB more, but Kaggle keeps 20 GB" in line
        assert f"(the largest is {root}/working/old, 13.00 GB)" in line
        assert sorted(path.name for path in root.rglob("*.t*")) == ["notes.txt", "shards.tar"]
        sparse(root / "working" / "notes.txt", 6.0)
        self.room(root)

    def test_is_what_the_runs_own_checkpoints_hold_already(self, root: Path) -> None:
        sparse(root / "working/runs/digits/checkpoints/step-00000001/tensors", 0.3)
        assert "up to 0.60 GB more" in self.room(root, goes_on=True)
        assert "up to 0.90 GB more" in self.room(root, goes_on=False)

    def test_counts_the_checkpoints_that_are_kept_for_their_hours(self, root: Path) -> None:
        assert "up to 1.40 GB more" in self.room(root, "--checkpoint.keep-every-h", "2", "--session.hours", "8.5")

    def test_is_missing_once_more_is_there_than_kaggle_keeps(self, root: Path) -> None:
        sparse(root / "working" / "notes.txt", 19.9)
        assert too_full(root / "working", 20) is None
        sparse(root / "working" / "more.txt", 0.2)
        line = too_full(root / "working", 20)
        assert line is not None and line.startswith(f"20.10 GB are in {root}/working, but Kaggle keeps 20 GB")

    def test_is_counted_while_files_go(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sparse(root / "working" / "notes.txt", 6.2)
        sparse(root / "working" / "old" / "shards.tar", 13.0)
        walk = os.walk

        def walk_and_delete(path: Path) -> list[tuple[str, list[str], list[str]]]:
            listed = list(walk(path))
            for name in ("old/shards.tar", "notes.txt"):
                (root / "working" / name).unlink(missing_ok=True)
            return listed

        monkeypatch.setattr(os, "walk", walk_and_delete)
        assert bytes_of(root / "working") == 0

    def test_is_made_by_removing_what_a_kill_in_mid_copy_or_in_mid_save_left(self, root: Path) -> None:
        sparse(root / "working/runs/.copying-digits/checkpoints/step-00000001/tensors", 13.0)
        sparse(root / "working/runs/digits/checkpoints/stage-step-00000002/tensors", 13.0)
        assert self.room(root).startswith("0.00 GB are in")
        assert [path.name for path in (root / "working").rglob("*")] == ["runs", "digits", "checkpoints"]


def sparse(path: Path, gb: float) -> None:
    """A file of that size which takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, round(gb * 1e9))


def test_sessions_of_a_run_without_a_record_are_none(root: Path) -> None:
    run = write_run(root / "a", 10)
    rows = [{"event": "warning"}, {"session": None}, {"session": "two"}, {}]
    (run / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = choose(root / "own", run)
    assert saved is not None and saved.sessions == 0
