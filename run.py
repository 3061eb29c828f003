"""A run folder: what every stage needs around its mathematics. The bottom of the house: it imports no other module.

    runs/NAME/STAGE/   config.json, model.safetensors (with LoRA the adapters), tokenizer.json, metrics.csv, and last of
                       all summary.json

A stage is finished when its `summary.json` is there. No file is ever half written: it is written beside its place and
renamed over what was there.
"""
import ast
import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm


class BadInput(Exception):
    """Something the user gave cannot be used. Shown as one line, with exit code 2."""


class NotFinite(BadInput):
    """Infinite or no number: logits, scores, a gradient."""


def flag(default, help, least=None, most=1e9):
    """A documented field of a stage's dataclass of flags; girl.py makes the command line and its --help from them. Counts
    are at least 1 and other numbers at least 0, where `least` does not say otherwise; texts and switches have no least."""
    if least is None:
        least = {int: 1, float: 0}.get(type(default))
    return field(default=default, metadata={"help": help, "least": least, "most": most})


# ------------------------------------------------------------------------------------------------- atomic files
@contextmanager
def beside(path):
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
    with beside(path) as new:
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
    with beside(path) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def load_tensors(path):
    check_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise BadInput(f"{path}: cannot be read as safetensors ({e}); run the stage that writes it again, or download it again")


# ----------------------------------------------------------------------------------------- device and randomness
def pick_device():
    """CUDA or MPS where there is one, else the CPU; GIRL_DEVICE in the environment decides otherwise."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name, is_there in there.items() if is_there]
    asked = os.environ.get("GIRL_DEVICE", here[0])
    if asked not in here:
        raise BadInput(f"GIRL_DEVICE={asked}: there is no such device here; choose one of {', '.join(here)}")
    return torch.device(asked)


def autocast(device):
    """The precision of what is computed: bf16 autocast on CUDA, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def frozen_dtype(device):
    """The dtype in memory of the weights that LoRA leaves as they are."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def generator(seed, *where, device="cpu"):
    """A random generator that depends on (seed, stage, step, ...) alone, never on what ran before."""
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


# ------------------------------------------------------------------------------------------------ optimisation
class Optimizer:
    """Muon for the matrices of the transformer's layers, AdamW for the rest (embeddings, norms, heads), or for all where
    `matrix_lr` is 0; with one schedule over both: linear warm-up, then a half cosine down to 0.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal, so that all its
    directions are learned at the same pace. In our trials its loss fell a little sooner than that of AdamW alone.
    Three Newton-Schulz steps instead of the usual five: 5% faster, and a valid NLL of 0.383 instead of 0.379 (one
    short run each)."""

    def __init__(self, model, flags, steps):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in trained.items() if p.dim() == 2 and ".layers." in n and flags.matrix_lr]
        chosen = set(map(id, matrices))
        rest = [p for p in trained.values() if id(p) not in chosen]
        self.parameters, self.flags, self.steps = matrices + rest, flags, steps
        self.parts = [(torch.optim.AdamW(rest, lr=flags.lr, betas=(0.9, 0.95), weight_decay=0.0), flags.lr)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=flags.matrix_lr, weight_decay=0.0, ns_steps=3)
            self.parts.insert(0, (muon, flags.matrix_lr))

    def clip(self):
        """Shorten the gradients to the largest norm that the flags allow; returns the norm that they had."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.flags.max_grad_norm))

    def step(self, step):
        """Set the learning rates of step 0..steps-1, update, and clear the gradients."""
        factor = cosine(step, self.steps, self.flags.warmup)
        for part, peak in self.parts:
            part.param_groups[0]["lr"] = peak * factor
            part.step()
            part.zero_grad()


def cosine(step, steps, warmup):
    """Factor on the learning rate: linear warm-up, then a half cosine down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


# ---------------------------------------------------------------------------------------------------- a stage
STATE = ("state.json", "state-1.safetensors", "state-2.safetensors")


class Stage:
    """The folder of one stage while it runs: metrics.csv, a progress bar, the time, and the state from which it goes on if it
    is cut short. `finish` writes summary.json.

        with Stage(run, "sft") as stage:
            if stage.begin({"lr": 1e-3}, {"train.jsonl": "6d5c..."}):       # refuses other flags or files than it had before
                                                                        # (of other code it only says so)
                model, optimizer = ...
                stage.total(1000)
                numbers = stage.resume({"model": model}, [optimizer])   # those that were saved, or {}
                for step in range(stage.step, 1000):
                    ...
                    stage.log(step=step + 1, loss=2.3)
                    stage.checkpoint(step + 1)                          # a point from which it can go on
                stage.finish(valid_nll=1.2)

    state.json names the file of the tensors, and is renamed over the state before it when all of them are on the disk. Random
    generators are not part of it: they follow from seed, stage and step. A second process at the same folder is refused."""

    def __init__(self, run, name, save_seconds=60.0):
        self.folder, self.name, self.start = Path(run) / name, name, time.time()
        self.lock = lock(self.folder)
        self.rows, self.step, self.stopped = [], 0, False
        self.state, self.asked, self.inputs, self.code, self.modules, self.optimizers = {}, {}, {}, {}, {}, []
        self.save_seconds, self.saved, self.unsaved, self.before = save_seconds, time.monotonic(), False, 0.0
        self.bar = tqdm(desc=name, unit="step", mininterval=1 if sys.stderr.isatty() else 20, dynamic_ncols=True)

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if kind is KeyboardInterrupt:
            steps = f" of {self.bar.total}" if self.bar.total else ""           # not known yet while the data are read
            after = f"go on after step {self.state['step']}{steps}" if self.state else "begin anew"
            self.say(f"{self.name}: stopped; the same command will {after}")
        self.bar.close()
        os.close(self.lock)

    def stop(self, number, _):
        """Ctrl-C, SIGTERM: go on to the next checkpoint, where weights and optimizer belong together, and save. Stop at once if
        nothing is to be saved, and when Ctrl-C comes again."""
        if not self.unsaved or self.stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped = True

    def total(self, steps):
        self.bar.reset(steps)
        return steps

    def say(self, line):
        tqdm.write(line)
        sys.stdout.flush()

    def log(self, **row):
        """One row of metrics.csv, and one step of the progress bar."""
        self.rows.append(row)
        self.bar.update()

    def not_finite(self, step, cvs, remedy):
        """Ends the stage, where the loss or the gradient of this step, on these CVs, is no number."""
        records = ", ".join(repr(cv[:40]) for cv in cvs[:16]) + (" and more" if len(cvs) > 16 else "")
        raise BadInput(f"{self.name}: the loss or its gradient is not finite at step {step}, on the records {records}; {remedy}, "
                       f"and delete {self.folder} or choose another --run")

    def mean(self, name, last):
        """Mean of a column over the last rows."""
        values = [row[name] for row in self.rows[-last:]]
        return sum(values) / len(values)

    # ------------------------------------------------------------------------------------------------ the state
    def begin(self, asked, inputs, code=None):
        """The flags of this stage, and the checksums of what it learns from. Is there anything left to do? A stage that was begun
        or finished with others is refused, the first difference named. `code`: {file: code_checksum}; where it changed, a line says so."""
        self.asked, self.inputs, self.code = asked, inputs, code or {}
        if (self.folder / "summary.json").exists():
            check_folder(self.folder)
            summary = read_summary(self.folder)
            check_same(self.folder, "finished", summary, asked, inputs)
            for name in STATE:                          # killed between the last file and the end
                (self.folder / name).unlink(missing_ok=True)
            self.say(f"{self.name}: finished already, see {self.folder}")
            self.say_changes(summary, "to run it with the present code")
            return False
        path = self.folder / "state.json"
        if path.exists():
            self.state = read_checked(path, f"delete {self.folder} to begin the stage anew")
            check_same(self.folder, "begun", self.state, asked, inputs)
        return True

    def resume(self, modules, optimizers):
        """Name what is trained; and where there is a state, put it there. Returns the numbers that were saved with it; `step` is
        the steps done."""
        self.modules, self.optimizers, self.saved, state = modules, optimizers, time.monotonic(), self.state
        if not state:
            return {}
        path, remedy = self.folder / state["tensors"], f"delete {self.folder} to begin the stage anew"
        if state["tensors"] not in STATE or not path.exists() or sha256(path) != state["sha256"]:
            raise BadInput(f"{path}: missing or damaged (it does not match its checksum); {remedy}")
        found, trained = load_tensors(path), self.trained()
        if odd := [name for name, p in trained.items() if name not in found or found[name].shape != p.shape]:
            raise BadInput(f"{path}: of another model or version, {odd[0]} is not what it was; {remedy}")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(found.pop(name))
        for k, optimizer in enumerate(optimizers):
            values = {}
            for name in [n for n in found if n.startswith(f"optimizer.{k}.")]:
                _, _, i, key = name.split(".")
                values.setdefault(int(i), {})[key] = found.pop(name).clone()
            optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
        self.rows, self.step, self.before = state["rows"], state["step"], state["seconds"]
        self.bar.update(len(self.rows))
        self.say(f"{self.name}: resumed at step {self.step} of {self.bar.total}")
        self.say_changes(state, "to begin it anew with the present code")
        self.code = state.get("code", self.code)            # what is noted is the code that began the stage
        for name, was, now in differences(state["machine"], machine()):
            self.say(f"{self.name}: began with {name} {was}, goes on with {now}: its numbers may be rounded otherwise")
        return state["numbers"]

    def say_changes(self, noted, remedy):
        """Name the files whose code is not what was noted; an earlier version of GIRL noted none."""
        if files := [name for name, *_ in differences(noted.get("code", {}), self.code)]:
            what = f"{', '.join(files)} changed" if "code" in noted else "the code, which was not noted, may have changed"
            self.say(f"{self.name}: {what} since this stage began; {remedy}, delete {self.folder}")

    def trained(self):
        """{name: tensor} of what changes while it is trained: parameters that need a gradient, and buffers."""
        found = {}
        for name, module in self.modules.items():
            found |= {f"{name}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
            found |= {f"{name}.{n}": b for n, b in module.named_buffers()}
        return found

    def checkpoint(self, step, **numbers):
        """Here a stage can go on: after so many steps, with these numbers. It is saved every `save_seconds`, after the last step,
        and when it is to stop."""
        self.unsaved = True
        if self.stopped or step == self.bar.total or time.monotonic() - self.saved >= self.save_seconds:
            self.save(step, numbers)
        if self.stopped:
            raise KeyboardInterrupt

    def save(self, step, numbers):
        self.check_lock()
        found = self.trained()
        for k, optimizer in enumerate(self.optimizers):
            for i, values in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{k}.{i}.{key}": t for key, t in values.items()}
        # Two files in turn: the one that state.json names is whole at any moment.
        last = self.state.get("tensors")
        name = STATE[2] if last == STATE[1] else STATE[1]
        save_tensors(self.folder / name, {n: t.detach().cpu().contiguous() for n, t in found.items()})
        self.state = {"step": step, "asked": self.asked, "inputs": self.inputs, "code": self.code,
                      "machine": machine(), "tensors": name,
                      "numbers": numbers, "sha256": sha256(self.folder / name), "rows": self.rows, "seconds": self.seconds()}
        write_json(self.folder / "state.json", with_checksum(self.state))
        if last:
            (self.folder / last).unlink(missing_ok=True)
        self.write_metrics()            # to be looked at meanwhile
        self.saved, self.unsaved = time.monotonic(), False

    def check_lock(self):
        """Refuse to write into another folder than the one that is locked: it may be another process's."""
        try:
            ours = os.path.samestat(os.fstat(self.lock), os.stat(self.folder))
        except OSError:
            ours = False
        if not ours:
            raise BadInput(f"{self.folder}: was deleted or moved while {self.name} was at work on it; run it again")

    # ---------------------------------------------------------------------------------------------------- the end
    def seconds(self):
        """At work, over all processes that it took."""
        return round(self.before + time.time() - self.start, 1)

    def write_metrics(self):
        if not self.rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.folder / "metrics.csv", text.getvalue().encode())

    def finish(self, **summary):
        """summary.json, with the checksums of the other files: from now on the stage is finished."""
        self.check_lock()
        self.write_metrics()
        # Not adapter_config.json: whoever moves the base model corrects its path there. And not what is nobody's, such as notes.
        files = [path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".csv")
                 and path.name not in (*STATE, "summary.json", "adapter_config.json")]
        seconds = self.seconds()
        summary |= {"started": round(time.time() - seconds, 1), "seconds": seconds, "peak_rss_mb": peak_rss_mb(),
                    "asked": self.asked, "inputs": self.inputs, "code": self.code, "machine": machine(),
                    "sha256": checksums(files)}
        write_json(self.folder / "summary.json", with_checksum(summary))
        for name in STATE:
            (self.folder / name).unlink(missing_ok=True)
        return summary


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
        for path in Path(folder).glob(".*.[0-9]*.tmp"):     # see `beside`
            path.unlink()
        return held
    except BlockingIOError:
        why = "another process is at work on it; wait for it, or choose another folder"
    except OSError as e:
        why = f"cannot {cannot} ({e.strerror}); choose a folder on a disk of this machine"
    os.close(held)
    raise BadInput(f"{folder}: {why}")


@contextmanager
def alone(folder, wait=False):
    """A `lock` for the time of a block. A folder that was made for it, and in which nothing was written, does not stay."""
    new, held = not Path(folder).exists(), lock(folder, wait)
    try:
        yield
    finally:
        with suppress(OSError):             # it is not empty
            if new:
                os.rmdir(folder)
        os.close(held)


def machine():
    """What the rounding of a stage's numbers depends on, as far as we look (not at the kind of CPU)."""
    return {"device": pick_device().type, "threads": torch.get_num_threads(), "torch": torch.__version__}


def differences(was, now):
    """(name, value, other value) wherever two dictionaries differ."""
    return [(name, was.get(name), now.get(name)) for name in {**was, **now} if was.get(name) != now.get(name)]


def check_same(folder, how, was, asked, inputs):
    """Refuse other flags, or other files to learn from, than those with which the work in this folder was begun or finished."""
    remedy = "go on with the same, choose another folder, or delete this one"
    if flags := differences(was["asked"], asked):
        name, before, now = flags[0]
        raise BadInput(f"{folder}: was {how} with --{name.replace('_', '-')} {before}, not {now}; {remedy}")
    if files := differences(was["inputs"], inputs):
        raise BadInput(f"{folder}: was {how} with another {files[0][0]}; {remedy}")


@lru_cache
def code_checksum(path):
    """Of a Python file as it runs: comments, docstrings and layout do not count, nor does the version of Python. Computed once in
    a process: girl.py does it when it is imported, so that it is that of the code that runs."""
    return checksum(skeleton(ast.parse(read_file(path))))


def skeleton(node):
    """A syntax tree as nested lists, without docstrings and without empty fields, since Python versions differ in which they have."""
    if isinstance(node, list):
        return [skeleton(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        parts["body"] = node.body[1:]
    return [type(node).__name__, *([name, skeleton(part)] for name, part in parts.items() if part not in (None, []))]


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


def what_helps(folder):
    """The remedy where a file of a finished stage, or of a data set, is not what it was."""
    if list(Path(folder).glob("*.jsonl")):
        return "bring it back, or make the data anew; to use data that you edited, copy them without summary.json, and give the " \
               "copy with --data"
    return f"bring it back, or delete {folder} and run the stage again"


def read_summary(folder):
    """The summary.json of a finished stage, or of a data set."""
    path, remedy = Path(folder) / "summary.json", what_helps(folder)
    found = {"asked": {}, "inputs": {}, "sha256": {}} | read_checked(path, remedy)
    kinds = [type(found[key]) for key in ("asked", "inputs", "sha256")]
    if kinds != [dict] * 3 or any("/" in name for name in found["sha256"]):
        raise BadInput(f"{path}: not the summary of a stage; {remedy}")
    return found


def check_folder(folder):
    """Refuse the folder of a finished stage, or of a data set, in which a file is not what it was when that was finished."""
    if not (Path(folder) / "summary.json").exists():
        return                          # a stranger's model, data that were not made here
    remedy = what_helps(folder)
    for name, digest in read_summary(folder)["sha256"].items():
        path = Path(folder) / name
        if not path.exists():
            raise BadInput(f"{path}: is missing; {remedy}")
        if sha256(path) != digest:
            raise BadInput(f"{path}: damaged or edited (it does not match its checksum in summary.json); {remedy}")


def finished(run, name):
    return (Path(run) / name / "summary.json").exists()


def peak_rss_mb():
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (1024 if sys.platform != "darwin" else 1024 ** 2))
