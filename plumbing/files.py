"""Files that are never half written, folders that one process holds, checksums; and the errors that all modules raise.

No file is ever half written: it is written beside its place, and renamed over what was there. Weights are safetensors, all
else is JSON or CSV. The bottom of the house: this module imports no other.
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
    """Something the user gave cannot be used. Shown as one line, with exit code 2."""


class NotFinite(BadInput):
    """Infinite or no number: logits, scores, a gradient."""


# ------------------------------------------------------------------------------------------------- atomic files
@contextmanager
def atomic_write(path):
    """A path beside this one to write to; then what was written there is synced, and renamed over this one."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():        # a folder; or a device, which must stay one
            raise BadInput(f"{path}: is there, and is not a file; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        sync(new)
        os.replace(new, path)
        sync_names(path.parent)
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        # SafetensorError has no number; on a full disk it is what we get.
        full = getattr(e, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or choose another folder" if full else "choose another folder"
        raise BadInput(f"{path}: cannot be written ({why}); {remedy}")
    finally:
        with suppress(OSError):                 # it is there only after a failure or an interrupt
            new.unlink()


def sync(path):
    """Wait until a file, or the names in a folder, are given to the disk."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


# "This cannot be done with a folder", as shared and network file systems say it.
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR,
           errno.EACCES)


def sync_names(folder):
    """`sync` of a folder, if its file system can: without, the last rename may be lost when the
    machine stops, but the file is whole either way."""
    try:
        sync(folder)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise


def write_bytes(path, content):
    with atomic_write(path) as new:
        new.write_bytes(content)


def write_json(path, value):
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise BadInput(f"{path}: not written, one of its numbers is not finite: the training went astray; lower its --lr")
    write_bytes(path, text.encode("utf-8", "backslashreplace") + b"\n")      # halves of surrogate pairs, as JSON writes them


def read_json(path, remedy="bring it back, or run again what wrote it"):
    """The object in a JSON file."""
    try:
        found = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({e}); {remedy}")
    if not isinstance(found, dict):
        raise BadInput(f"{path}: must be a JSON object, found {type(found).__name__}; {remedy}")
    return found


def read_file(path):
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}")


def check_file(path):
    """Refuse what is no file: a folder, or a pipe, at which we would wait for ever."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: {'is not a file' if Path(path).exists() else 'no such file'}")


def save_tensors(path, tensors):
    with atomic_write(path) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def load_tensors(path):
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot be read as safetensors ({e}); run the stage that writes it again, or download it again")


# ------------------------------------------------------------------------------------------------------- locks
def lock(folder, wait=False):
    """The folder, made if need be, for this process alone, until what is returned is closed or the process ends. Where
    another has it: wait for it, or refuse. What a killed process left half written in it is cleared away."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise BadInput(f"{folder}: cannot be made or opened ({e.strerror}); choose another folder")
    cannot = "be locked, as on NFS and some other shared file systems"
    try:
        # Refused without: two processes at once would write over each other's files.
        fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        cannot = "be written to"
        for path in Path(folder).glob(".*.[0-9]*.tmp"):     # see atomic_write
            path.unlink()
        return held
    except BlockingIOError:
        why = "another process is at work on it; wait for it, or choose another folder"
    except OSError as e:
        why = f"cannot {cannot} ({e.strerror}); choose a folder on a disk of this machine"
    os.close(held)
    raise BadInput(f"{folder}: {why}")


@contextmanager
def locked(folder, wait=False):
    """A `lock` for the time of a block. A folder that was made for it, and in which nothing was written, does not stay."""
    new, held = not Path(folder).exists(), lock(folder, wait)
    try:
        yield
    finally:
        with suppress(OSError):             # it is not empty
            if new:
                os.rmdir(folder)
        os.close(held)


# --------------------------------------------------------------------------------------------------- checksums
def checksum(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_checksum(value):
    return value | {"checksum": checksum(value)}


def read_checked(path, remedy):
    """The object in a JSON file that was written `with_checksum`."""
    found = read_json(path, remedy)
    if found.pop("checksum", None) != checksum(found):
        raise BadInput(f"{path}: damaged or edited (it does not match its checksum), or of another version of GIRL; {remedy}")
    return found


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
