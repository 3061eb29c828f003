"""Atomic writes, locked folders, checksums; and the errors that all modules raise.

No file is ever half written: it is written under a temporary name in the same folder, then renamed
over the old file. Weights are safetensors, all else is JSON or CSV. This module imports no other of
GIRL's modules.
"""
import errno
import fcntl
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class BadInput(Exception):
    """The user's input cannot be used. Shown as one line, with exit code 2."""


class NotFinite(BadInput):
    """Logits, scores or a gradient are infinite or NaN."""


# ------------------------------------------------------------------------------------- atomic files
@contextmanager
def atomic_write(path):
    """A temporary path beside `path` to write to. Afterwards it is synced and renamed to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():        # a folder, or a device; keep it
            raise BadInput(f"{path}: exists, and is not a file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_names(path.parent)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        # SafetensorError has no errno; it is raised when the disk is full.
        disk_full = getattr(e, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "choose another folder"
        if disk_full:
            remedy = f"free some space or {remedy}"
        raise BadInput(f"{path}: cannot be written ({reason}); {remedy}")
    finally:
        with suppress(OSError):                 # exists only after a failure or an interrupt
            temporary.unlink()


def sync(path):
    """Wait until a file, or the names in a folder, are on disk."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


# The errors by which shared and network file systems say that they cannot sync a folder.
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR,
           errno.EACCES)


def sync_names(folder):
    """`sync` a folder, if its file system can. If it cannot, the last rename may be lost when the
    machine crashes, but the file is whole either way."""
    try:
        sync(folder)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise


def write_bytes(path, content):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_json(path, value):
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise BadInput(f"{path}: not written, one of its numbers is not finite: training diverged; "
                       "lower its --lr")
    # The error handler writes half of a surrogate pair as JSON does: \ud800.
    write_bytes(path, text.encode("utf-8", "backslashreplace") + b"\n")


def read_json(path, remedy="restore it, or run the command that wrote it again"):
    """The object in a JSON file."""
    try:
        value = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({e}); {remedy}")
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must be a JSON object, found {type(value).__name__}; {remedy}")
    return value


def read_file(path):
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}")


def check_file(path):
    """Accept only regular files: a folder cannot be read, and a pipe would block."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: {'is not a file' if Path(path).exists() else 'no such file'}")


def save_tensors(path, tensors):
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_tensors(path):
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot be read as safetensors ({e}); run the stage that writes it "
                       "again, or download it again")


# -------------------------------------------------------------------------------------------- locks
def lock(folder, wait=False):
    """Create the folder if needed, and lock it for this process until the returned descriptor is
    closed or the process ends. If another process has locked it, wait, or refuse. Files that a
    killed process left half written in it are deleted."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise BadInput(f"{folder}: cannot be made or opened ({e.strerror}); choose another folder")
    failing = "be locked, as on NFS and some other shared file systems"
    try:
        # Refuse to work without a lock: two processes would overwrite each other's files.
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        failing = "be written to"
        for path in Path(folder).glob(".*.[0-9]*.tmp"):     # see atomic_write
            path.unlink()
        return descriptor
    except BlockingIOError:
        problem = "another process is at work on it; wait for it, or choose another folder"
    except OSError as e:
        problem = f"cannot {failing} ({e.strerror}); choose a folder on a disk of this machine"
    os.close(descriptor)
    raise BadInput(f"{folder}: {problem}")


@contextmanager
def locked(folder, wait=False):
    """A `lock` for the time of a block. If the lock made the folder and it is empty at the end,
    remove it."""
    is_new = not Path(folder).exists()
    descriptor = lock(folder, wait)
    try:
        yield
    finally:
        with suppress(OSError):             # it is not empty
            if is_new:
                os.rmdir(folder)
        os.close(descriptor)


# ---------------------------------------------------------------------------------------- checksums
def checksum(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_checksum(value):
    return value | {"checksum": checksum(value)}


def read_checked(path, remedy):
    """The object in a JSON file that was written `with_checksum`."""
    value = read_json(path, remedy)
    if value.pop("checksum", None) != checksum(value):
        raise BadInput(f"{path}: damaged or edited (it does not match its checksum), or of another "
                       f"version of GIRL; {remedy}")
    return value


def sha256(path):
    digest = hashlib.sha256()
    check_file(path)
    try:
        with open(path, "rb") as f:
            while block := f.read(2 ** 20):
                digest.update(block)
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}")
    return digest.hexdigest()


def checksums(paths):
    return {path.name: sha256(path) for path in sorted(paths)}
