"""Claims about the commit of a folder: whole or not at all, and damage does not pass."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ast_dist.fault import commit
from ast_dist.fault.retention import to_prune


def save(folder: Path, step: int) -> Path:
    """Commit a folder of two files that name their step."""
    stage = commit.new_stage(folder, f"step-{step:08d}")
    for name in ("a.bin", "b.bin"):
        (stage / name).write_bytes(f"{name} of step {step} ".encode() * 2000)
    final = folder / f"step-{step:08d}"
    commit.commit(stage, final, {"step": step})
    return final


def save_forever(folder: Path) -> None:
    """Commit and prune until killed."""
    for step in range(10**8):
        save(folder, step)
        commit.remove(folder, to_prune(commit.saved(folder), keep_last=2, keep_every_h=0.0))


def test_sigkill_at_random_moments_leaves_a_newest_checkpoint_that_verifies(tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", "0")) or random.randrange(1, 10**6)
    print(f"KILL_SEED={seed}")
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    for kill in range(40):
        folder = tmp_path / str(kill)
        process = context.Process(target=save_forever, args=(folder,))
        process.start()
        while not commit.committed(folder):
            pass
        # Strike somewhere in the next saves, each of which takes a few milliseconds.
        strike = time.perf_counter() + rng.random() * 0.03
        while time.perf_counter() < strike:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        newest = commit.committed(folder)[-1]
        manifest = commit.verify(newest)
        assert f"step-{manifest['step']:08d}" == newest.name
        next_step = manifest["step"] + 1
        assert commit.verify(save(folder, next_step))["step"] == next_step, "a crash must not block the next save"
        assert not list(folder.glob("stage-*"))


@pytest.mark.parametrize("name", ["a.bin", "b.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_every_kind_of_damage_to_every_file_is_found(tmp_path: Path, name: str, damage: str) -> None:
    final = save(tmp_path, 7)
    file = final / name
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        position = data.index(b'"sha256": "') + 15 if name == "manifest.json" else len(data) // 2
        data[position] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(commit.DamagedCheckpointError) as caught:
        commit.verify(final)
    assert str(final) in str(caught.value)


def test_each_flipped_bit_of_the_manifest_is_found(tmp_path: Path) -> None:
    manifest = save(tmp_path, 7) / "manifest.json"
    data = manifest.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            manifest.write_bytes(changed)
            with pytest.raises(commit.DamagedCheckpointError):
                commit.verify(manifest.parent)


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(str(Path(f"/proc/self/fd/{file}").readlink())), fsync(file))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("rename"), rename(old, new)))
    final = save(tmp_path / "checkpoints", 7)
    stage = final.with_name(f"stage-{final.name}")
    at = done.index("rename")
    assert done.count("rename") == 1
    assert {str(stage / name) for name in ("a.bin", "b.bin", "manifest.json")} | {str(stage)} <= set(done[:at])
    assert str(tmp_path) in done[:at], "the folder of checkpoints was new itself"
    assert done[at + 1 :] == [str(final.parent)]


def test_a_fence_that_objects_leaves_everything_as_it_was(tmp_path: Path) -> None:
    before = save(tmp_path, 1)
    stage = commit.new_stage(tmp_path, "step-00000002")

    def fence() -> None:
        assert (stage / "manifest.json").is_file(), "asked last of all"
        raise RuntimeError("not yours")

    with pytest.raises(RuntimeError, match="not yours"):
        commit.commit(stage, tmp_path / "step-00000002", {}, fence)
    assert commit.committed(tmp_path) == [before]


def test_checkpoints_sort_by_step_past_the_digits_of_their_names(tmp_path: Path) -> None:
    names = ["step-99999998", "step-99999998-evaluated", "step-99999999", "step-100000000"]
    for name in reversed(names):
        (tmp_path / name).mkdir()
    assert [path.name for path in commit.committed(tmp_path)] == names


def test_a_stage_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    stage = commit.new_stage(tmp_path, "step-00000001")
    (stage / "a.bin").write_bytes(b"x")
    assert commit.committed(tmp_path) == []


def test_a_crash_while_pruning_leaves_no_half_under_a_checkpoints_name(tmp_path: Path) -> None:
    for step in range(3):
        save(tmp_path, step)
    folder = tmp_path / ".pruned-step-00000000"
    (tmp_path / "step-00000000").rename(folder)
    (folder / "a.bin").unlink()
    assert [commit.verify(path)["step"] for path in commit.committed(tmp_path)] == [1, 2]
    save(tmp_path, 3)
    assert not folder.exists()


def test_the_best_is_found_although_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    for step, acc1 in ((1, 50.0), (2, 90.0), (3, 90.0), (4, 70.0)):
        stage = commit.new_stage(tmp_path, f"step-{step:08d}")
        commit.commit(stage, tmp_path / f"step-{step:08d}", {"step": step, "val_acc1": acc1})
    (tmp_path / "step-00000001/manifest.json").write_text("{")
    (tmp_path / "step-00000004/manifest.json").unlink()
    assert commit.best(tmp_path) == "step-00000003"


def test_quarantine_takes_a_checkpoint_out_of_the_way_and_keeps_it(tmp_path: Path) -> None:
    asides = [commit.quarantine(save(tmp_path, 3)) for _ in range(2)]
    assert commit.committed(tmp_path) == []
    assert all((aside / "a.bin").is_file() for aside in asides)
    assert len(set(asides)) == 2


def test_the_manifest_states_what_was_asked_of_it(tmp_path: Path) -> None:
    stage = commit.new_stage(tmp_path, "step-00000001")
    (stage / "a.bin").write_bytes(b"abc")
    commit.commit(stage, tmp_path / "step-00000001", {"step": 1, "val_acc1": 90.5})
    manifest = json.loads((tmp_path / "step-00000001/manifest.json").read_text())
    assert manifest["val_acc1"] == 90.5
    assert manifest["files"]["a.bin"]["bytes"] == 3
