"""Writing files so that a reader never meets half of one.

Everything goes to a temporary name in the same folder, is flushed to the disk and renamed, because a rename is the
one step that either happened or did not. Use `write_text` or `write_bytes` for one file, `replacing` where a library
insists on writing by itself, and `write_folder` for files that belong together.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` into the file at `path`, which afterwards holds all of it or what it held before.

    Missing parent folders are made, and removed again when writing fails. A symbolic link is followed, not replaced.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` for text, in UTF-8 and with its line ends as they are."""
    write_bytes(path, text.encode())


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Name a temporary file to write; leaving the block renames it to `path`, an exception removes it.

    The temporary name keeps the suffix of `path`, since some writers choose their format by it. What is no file but a
    device or a pipe (`/dev/stdout`) gets the content written into it, since a rename would put a file in its place.
    """
    if _is_stream(path):
        with _copied_into(path) as temporary:
            yield temporary
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    with _parents(target):
        temporary = _temporary_name(target)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(target.parent)


def _is_stream(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _copied_into(path: str | os.PathLike[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="duohead.") as folder:
        temporary = Path(folder) / (Path(path).name or "content")
        yield temporary
        with open(path, "wb", buffering=0) as stream, temporary.open("rb") as content:
            shutil.copyfileobj(content, stream)


def write_folder(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write files that belong together, name to content: all of them, or none and the folder as it was.

    A new folder appears whole, under one rename. In an existing folder the files are staged first, which is where disks
    fill up, and then renamed one after the other; if that fails, the earlier ones are put back. Other files there stay.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder")
    with _parents(target):
        # Beside a new folder, inside an old one: that may be a mount point, and a rename stays on one file system.
        place = target if target.exists() else target.parent
        try:
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=place))
        except OSError as error:
            error.filename = os.fspath(folder)  # not a temporary name, of which nobody has heard
            raise
        try:
            for name, data in contents.items():
                (staging / name).write_bytes(data)
                _sync(staging / name)
            if target.exists():
                _replace_each(staging, target, list(contents))
            else:
                staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
                os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _sync(target.parent)


def _replace_each(staging: Path, target: Path, names: list[str]) -> None:
    backup = staging / "backup"
    backup.mkdir()
    for name in names:
        if (target / name).is_dir():
            raise IsADirectoryError(f"{target / name} is a folder; a file of that name goes there")
        if (target / name).exists():
            shutil.copy2(target / name, backup / name)
    done: list[str] = []
    try:
        for name in names:
            done.append(name)  # before the rename: Ctrl-C may come right after it
            os.replace(staging / name, target / name)
    except BaseException:
        for name in done:
            if (backup / name).exists():
                os.replace(backup / name, target / name)
            elif not (staging / name).exists():
                (target / name).unlink(missing_ok=True)
        raise
    _sync(target)


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    made = [p for p in target.parents if not p.exists()]
    last = last_existing(target.parent)
    if not last.is_dir():
        text = "this is a file, below which nothing can be written; name another place"
        raise NotADirectoryError(errno.ENOTDIR, text, str(last))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # somebody else's file is in there by now
            for folder in made:
                folder.rmdir()
        raise


def _temporary_name(target: Path) -> Path:
    # Not mkstemp: its files are private, and ours should have the permissions that the user's umask gives.
    return target.with_name(f".{target.stem}.{os.urandom(4).hex()}.tmp{target.suffix}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and needs no such flush
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def last_existing(path: str | os.PathLike[str]) -> Path:
    """What of a path is there already: itself, or the nearest folder above it (a file, where one is in the way)."""
    target = Path(path)
    return next(place for place in (target, *target.absolute().parents) if place.exists())


def check_writable(path: str | os.PathLike[str], *, suffix: str | None = None) -> None:
    """Make sure, before long work, that a file can be made at ``path`` (its missing folders included).

    Raises:
        ValueError: it cannot, it is a folder, or its name does not end in ``suffix``.
    """
    target = Path(path)
    if suffix is not None and target.suffix.lower() != suffix:
        raise ValueError(f"output {str(path)!r} must end in {suffix}")
    if _is_stream(path):
        return
    if target.is_dir():
        raise ValueError(f"output {str(path)!r} is a folder; name a file in it")
    folder = last_existing(target.absolute().parent)
    try:
        # Permission bits do not tell what root, a full disk or a read-only mount will do: try it.
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"\0" * 65536)
    except OSError as error:
        raise ValueError(
            f"output {str(path)!r} cannot be written ({error.strerror}); choose another place"
        ) from error
