"""Files are written whole or not at all."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from duohead import files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def no_rename(monkeypatch: pytest.MonkeyPatch):
    """Make the n-th rename fail with the given error."""

    def arm(error: BaseException, at: int = 1) -> None:
        calls = [0]
        rename = os.replace

        def failing(source: str, target: str) -> None:
            calls[0] += 1
            if calls[0] == at:
                raise error
            rename(source, target)

        monkeypatch.setattr(os, "replace", failing)

    return arm


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "c.txt", "größer\r\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "größer\r\n".encode()
    assert len(tree(tmp_path)) == 1


def test_a_file_gets_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "ours", "")
    files.write_folder(tmp_path / "folder", {"x": b""})
    (tmp_path / "plain folder").mkdir()
    for ours, plain in (("ours", "plain"), ("folder", "plain folder"), ("folder/x", "plain")):
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (ours, plain)]
        assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, no_rename, error) -> None:
    files.write_text(tmp_path / "x", "old")
    no_rename(error)
    with pytest.raises(type(error)):
        files.write_text(tmp_path / "x", "new")
    assert tree(tmp_path) == {"x": b"old"}


def test_a_failed_write_leaves_no_folders_behind(tmp_path, no_rename) -> None:
    no_rename(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a" / "b" / "x", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_no_half_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with (
        pytest.raises(OSError, match="No space left"),
        files.replacing(tmp_path / "x") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_folder_is_named_as_the_caller_did(tmp_path, monkeypatch) -> None:
    def refuse(**options: object) -> str:
        raise PermissionError(13, "Permission denied", f"{options['dir']}/{options['prefix']}x.tmp")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(PermissionError, match="Permission denied: '.*/adapter'$"):
        files.write_folder(tmp_path / "adapter", {"x": b""})


def test_a_library_may_write_the_temporary_file_itself(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "picture.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"picture")
        assert not (tmp_path / "picture.png").exists()
    assert tree(tmp_path) == {"picture.png": b"picture"}


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        files.write_text(tmp_path, "")
    with pytest.raises(NotADirectoryError, match="name a folder"):
        files.write_folder(tmp_path / "file", {"x": b""})


def test_nothing_is_written_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for below in ("x", "x/y"):
        for write in (
            lambda path: files.write_text(path, ""),
            lambda path: files.write_folder(path, {"a": b""}),
        ):
            with pytest.raises(NotADirectoryError, match=r"is a file, below which .*/file'$"):
                write(tmp_path / "file" / below)
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "deep" / "out", {"a": b"1", "b": b"2"})
    assert tree(tmp_path) == {"deep/out/a": b"1", "deep/out/b": b"2"}


def test_an_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "out", {"a": b"1", "b": b"2"})
    (tmp_path / "out" / "notes").write_bytes(b"mine")
    files.write_folder(tmp_path / "out", {"a": b"3", "c": b"4"})
    assert tree(tmp_path) == {"out/a": b"3", "out/b": b"2", "out/c": b"4", "out/notes": b"mine"}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_puts_every_file_of_the_folder_back(tmp_path, no_rename, error, at) -> None:
    files.write_folder(tmp_path / "out", {"a": b"1", "b": b"2"})
    no_rename(error, at)
    with pytest.raises(type(error)):
        files.write_folder(tmp_path / "out", {"a": b"3", "new": b"4", "b": b"5"})
    assert tree(tmp_path) == {"out/a": b"1", "out/b": b"2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_the_way_is_found_before_anything_changes(tmp_path: Path) -> None:
    files.write_folder(tmp_path / "out", {"a": b"1"})
    (tmp_path / "out" / "b").mkdir()
    with pytest.raises(IsADirectoryError, match="a file of that name goes there"):
        files.write_folder(tmp_path / "out", {"a": b"3", "b": b"4"})
    assert tree(tmp_path) == {"out/a": b"1"}


def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        files.check_writable(pipe)
        files.write_text(pipe, "all of it")
        assert read.result(timeout=20) == "all of it"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
def test_a_device_is_written_to_and_never_replaced() -> None:
    with pytest.raises(OSError, match="No space left"):
        files.write_text("/dev/full", "text")
    assert Path("/dev/full").is_char_device()
