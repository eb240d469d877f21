"""Atomic folders: fail the N-th call, for all N, and the previous folder is
bit-identical.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime.contract import files
from runtime.contract.errors import BuildError, BusyError
from runtime.contract.files import staged_folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_new(folder: Path) -> None:
    for index in range(3):
        (folder / f"new{index}").write_bytes(b"new" * 100)


def test_replaces_a_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for text in (b"one", b"two"):
        with staged_folder(target, "file") as folder:
            (folder / "file").write_bytes(text)
        assert content(target) == {"file": text}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target, "file") as folder:
        (folder / "file").write_bytes(b"old")
    with pytest.raises(ValueError), staged_folder(target, "file") as folder:
        write_new(folder)
        raise ValueError("no")
    assert content(target) == {"file": b"old"} and [path.name for path in tmp_path.iterdir()] == [
        "bundle"
    ]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_system_call_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, code: int
) -> None:
    """Fails the N-th fsync or rename for N = 1, 2, ... until a run gets through."""
    target = tmp_path / "bundle"
    with staged_folder(target, "file") as folder:
        (folder / "file").write_bytes(b"old")
    real = {name: getattr(os, name) for name in ("fsync", "rename")}
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    failures = 0
    for fail_at in range(1, 30):
        calls = 0

        def counted(name: str, *arguments: object, fail_at: int = fail_at) -> object:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise OSError(code, os.strerror(code))
            return real[name](*arguments)

        for name in real:
            monkeypatch.setattr(os, name, lambda *a, name=name: counted(name, *a))
        try:
            with staged_folder(target, "file") as folder:
                write_new(folder)
        except BuildError as error:
            failures += 1
            assert os.strerror(code) in str(error)
            committed = content(target) != {"file": b"old"}
            # Only the flush of the parent folder comes after the swap; then the new folder is
            # there whole.
            assert not committed or len(content(target)) == 3
            if committed:
                break
        else:
            break
    monkeypatch.undo()
    assert failures >= 4
    assert len(content(target)) == 3 or content(target) == {"file": b"old"}


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    with (
        staged_folder(tmp_path / "bundle", "file"),
        pytest.raises(BusyError, match="another process"),
        staged_folder(tmp_path / "bundle", "file"),
    ):
        pass


def test_a_file_in_the_way_and_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(BuildError, match="not a folder"),
        staged_folder(tmp_path / "file", "file") as folder,
    ):
        write_new(folder)
    assert (tmp_path / "file").read_text() == "mine"
    with (
        pytest.raises(BuildError, match="cannot write"),
        staged_folder(tmp_path / "file" / "below", "file"),
    ):
        pass


@pytest.mark.parametrize("when", ["in the middle", "before the swap"])
def test_a_killed_writer_leaves_the_old_folder_and_the_next_one_cleans_up(
    tmp_path: Path, when: str
) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target, "file") as folder:
        (folder / "file").write_bytes(b"old")
    code = f"""
        import os, signal
        from pathlib import Path
        from runtime.contract import files
        die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        if {when!r} == "before the swap":
            files._swap = die
        with files.staged_folder(Path({str(target)!r}), "file") as folder:
            (folder / "half").write_bytes(b"x")
            if {when!r} == "in the middle":
                die()
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2]
    )
    assert result.returncode == -9
    assert content(target) == {"file": b"old"}
    with staged_folder(target, "file") as folder:
        assert not list(folder.iterdir())
        (folder / "file").write_bytes(b"new")
    assert content(target) == {"file": b"new"} and [path.name for path in tmp_path.iterdir()] == [
        "bundle"
    ]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with (
        pytest.raises(BuildError, match="holds other files"),
        staged_folder(tmp_path / "thesis", "file") as folder,
    ):
        write_new(folder)
    assert content(tmp_path / "thesis") == {"chapter": b"years of work"}
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty", "file") as folder:
        write_new(folder)
    assert len(content(tmp_path / "empty")) == 3


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in (b"one", b"two"):
        with staged_folder(tmp_path / "link", "file") as folder:
            (folder / "file").write_bytes(text)
        assert content(tmp_path / "real") == {"file": text} and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_writer_killed_between_two_renames_is_undone(tmp_path: Path) -> None:
    """Where names cannot be exchanged, the old folder stands aside for a moment; the
    next writer brings it back.
    """
    (tmp_path / ".bundle.previous").mkdir()
    (tmp_path / ".bundle.previous" / "file").write_bytes(b"old")
    with pytest.raises(ValueError), staged_folder(tmp_path / "bundle", "file"):
        raise ValueError("no")
    assert content(tmp_path / "bundle") == {"file": b"old"}


def test_the_lock_is_held_until_everything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, told = files.sync_file, []

    def intrude(path: Path) -> None:
        real(path)
        with pytest.raises(BusyError) as caught, staged_folder(tmp_path / "bundle", "file"):
            pass
        told.append(str(caught.value))

    monkeypatch.setattr(files, "sync_file", intrude)
    with staged_folder(tmp_path / "bundle", "file") as folder:
        (folder / "file").write_bytes(b"x")
    assert len(told) == 3 and content(tmp_path / "bundle") == {"file": b"x"}
