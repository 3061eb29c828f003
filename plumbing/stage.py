"""A stage without its mathematics: its flags, device, random generators and folder.

    runs/NAME/STAGE/   config.json, model.safetensors (with LoRA: the adapters), tokenizer.json,
                       metrics.csv, and last of all summary.json

A stage is finished when its `summary.json` exists.
"""
import ast
import csv
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import field
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import (BadInput, checksum, checksums, load_tensors, lock, read_checked,
                            read_file, save_tensors, sha256, with_checksum, write_bytes,
                            write_json)


def flag(default, help, least=None, most=1e9, choices=None):
    """A documented field of a stage's dataclass of flags. girl.py makes the command line and its
    --help from these fields. Unless `least` says otherwise, counts are at least 1 and other numbers
    at least 0; texts and switches have no minimum. `choices`: the texts that are allowed."""
    if least is None:
        least = {int: 1, float: 0}.get(type(default))
    return field(default=default, metadata={"help": help, "least": least, "most": most,
                                            "choices": choices})


# ---------------------------------------------------------------------------- device and randomness
def pick_device():
    """CUDA or MPS if available, else the CPU. GIRL_DEVICE in the environment overrides this."""
    is_available = {"cuda": torch.cuda.is_available(),
                    "mps": torch.backends.mps.is_available(),
                    "cpu": True}
    devices = [name for name, available in is_available.items() if available]
    asked = os.environ.get("GIRL_DEVICE", devices[0])
    if asked not in devices:
        raise BadInput(f"GIRL_DEVICE={asked}: there is no such device here; choose one of "
                       f"{', '.join(devices)}")
    return torch.device(asked)


def autocast(device):
    """The precision of computations: bf16 autocast on CUDA, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def frozen_dtype(device):
    """The dtype in memory of the weights that LoRA leaves frozen."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def generator(seed, *where, device="cpu"):
    """A random generator that depends on (seed, stage, step, ...) alone, never on earlier draws."""
    digest = hashlib.sha256(repr((seed, *where)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def progress(items, name, unit="step"):
    """These items, with a progress bar; on a file instead of a terminal it shows less often."""
    return tqdm(items, desc=name, unit=unit, mininterval=1 if sys.stderr.isatty() else 20,
                dynamic_ncols=True)


# ------------------------------------------------------------------------------------------ a stage
STATE = ("state.json", "state-1.safetensors", "state-2.safetensors")
KEPT = "kept"           # the folder in a stage's folder for the states that are kept for good


class Stage:
    """The folder of one stage while it runs, with metrics.csv and the state from which an
    interrupted stage resumes. Also its progress bar and its clock. `finish` writes summary.json.

        with Stage(run, "sft") as stage:
            # Refuses other flags or files than before. Of changed code it only warns.
            if stage.begin({"lr": 1e-3}, {"train.jsonl": "6d5c..."}):
                model, optimizer = ...
                stage.total(1000)
                numbers = stage.resume({"model": model}, [optimizer])   # those saved, or {}
                for step in range(stage.step, 1000):
                    ...
                    stage.log(step=step + 1, loss=2.3)
                    stage.checkpoint(step + 1)              # the stage can resume from here
                stage.finish(valid_nll=1.2)

    state.json names the file of the tensors. It replaces the previous state.json by a rename, once
    all tensors are on disk. Random generators are not saved: they follow from seed, stage and step.
    A second process in the same folder is refused."""

    def __init__(self, run, name, save_seconds=60.0):
        self.folder, self.name, self.start = Path(run) / name, name, time.time()
        self.lock = lock(self.folder)
        self.rows, self.step, self.stopped = [], 0, False
        self.state, self.asked, self.inputs, self.code = {}, {}, {}, {}
        self.modules, self.optimizers = {}, []
        self.save_seconds, self.saved_at, self.unsaved = save_seconds, time.monotonic(), False
        self.earlier_seconds = 0.0              # of the processes before this one
        self.bar = progress(None, name)

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {number: signal.signal(number, self.stop) for number in signals}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            # While the data are read, the number of steps is not known yet.
            steps = f" of {self.bar.total}" if self.bar.total else ""
            rerun = f"resume after step {self.state['step']}{steps}" if self.state else "start over"
            self.say(f"{self.name}: stopped; the same command will {rerun}")
        self.bar.close()
        os.close(self.lock)

    def stop(self, number, _):
        """Ctrl-C or SIGTERM: run to the next checkpoint, where weights and optimizer match, save
        and stop. Stop at once if there is nothing to save, or if a Ctrl-C follows another signal.
        """
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
        """End the stage: at this step, on these CVs, the loss or its gradient is not finite."""
        records = ", ".join(repr(cv[:40]) for cv in cvs[:16])
        records += " and more" if len(cvs) > 16 else ""
        raise BadInput(f"{self.name}: the loss or its gradient is not finite at step {step}, "
                       f"on the records {records}; {remedy}, "
                       f"and delete {self.folder} or choose another --run")

    def mean(self, name, last):
        """Mean of a column over the last rows."""
        values = [row[name] for row in self.rows[-last:]]
        return sum(values) / len(values)

    # ------------------------------------------------------------------------------------ the state
    def begin(self, asked, inputs, code=None):
        """Take the flags of this stage, the checksums of its inputs, and `code`, which is
        {file: code_checksum}. Return whether anything is left to do. If the stage was begun or
        finished with other flags or inputs, refuse it and name the first difference. If the code
        changed, only say so."""
        self.asked, self.inputs, self.code = asked, inputs, code or {}
        if (self.folder / "summary.json").exists():
            check_folder(self.folder)
            summary = read_summary(self.folder)
            check_same(self.folder, "finished", summary, asked, inputs)
            for name in STATE:                  # still there if `finish` was killed near its end
                (self.folder / name).unlink(missing_ok=True)
            self.say(f"{self.name}: finished already, see {self.folder}")
            self.say_changes(summary, "to run it with the present code")
            return False
        path = self.folder / STATE[0]
        if not path.exists():                   # of an attempt that saved no state
            shutil.rmtree(self.folder / KEPT, ignore_errors=True)
        if path.exists():
            self.state = read_checked(path, f"delete {self.folder} to start the stage over")
            check_same(self.folder, "begun", self.state, asked, inputs)
        return True

    def resume(self, modules, optimizers):
        """Take the modules and optimizers that are trained. If a state was saved, restore it into
        them. Return the numbers saved with it; `self.step` is then the number of steps done."""
        self.modules, self.optimizers, self.saved_at = modules, optimizers, time.monotonic()
        state = self.state
        if not state:
            return {}
        remedy = f"delete {self.folder} to start the stage over"
        if state["tensors"] not in STATE:
            raise BadInput(f"{self.folder / STATE[0]}: not the state of a stage; {remedy}")
        restore(self.folder / state["tensors"], state["sha256"], modules, optimizers, remedy)
        self.rows, self.step, self.earlier_seconds = state["rows"], state["step"], state["seconds"]
        self.bar.update(len(self.rows))
        self.say(f"{self.name}: resumed at step {self.step} of {self.bar.total}")
        self.say_changes(state, "to start it over with the present code")
        self.code = state.get("code", self.code)            # record the code that began the stage
        for name, was, now in differences(state["machine"], machine()):
            self.say(f"{self.name}: began with {name} {was}, resumes with {now}: "
                     "its numbers may be rounded differently")
        return state["numbers"]

    def say_changes(self, recorded, remedy):
        """Name the files whose code is not the recorded one. Earlier versions recorded none."""
        if files := [name for name, *_ in differences(recorded.get("code", {}), self.code)]:
            change = f"{', '.join(files)} changed"
            if "code" not in recorded:
                change = "the code, which was not recorded, may have changed"
            self.say(f"{self.name}: {change} since this stage began; "
                     f"{remedy}, delete {self.folder}")

    def checkpoint(self, step, **numbers):
        """A stage can resume from here, after `step` steps, with these numbers. Save every
        `save_seconds`, after the last step, and before stopping."""
        self.unsaved = True
        is_due = time.monotonic() - self.saved_at >= self.save_seconds
        if self.stopped or step == self.bar.total or is_due:
            self.save(step, numbers)
        if self.stopped:
            raise KeyboardInterrupt

    def save(self, step, numbers):
        self.check_lock()
        # Two files in turn: the one that state.json names is always complete.
        previous = self.state.get("tensors")
        name = STATE[2] if previous == STATE[1] else STATE[1]
        self.save_trained(self.folder / name)
        self.state = {"step": step, "asked": self.asked, "inputs": self.inputs, "code": self.code,
                      "machine": machine(), "tensors": name, "numbers": numbers,
                      "sha256": sha256(self.folder / name), "rows": self.rows,
                      "seconds": self.seconds()}
        write_json(self.folder / "state.json", with_checksum(self.state))
        if previous:
            (self.folder / previous).unlink(missing_ok=True)
        self.write_metrics()                    # for a look at the running stage
        self.saved_at, self.unsaved = time.monotonic(), False

    def save_trained(self, path):
        """All that training has changed, and what the optimizers remember."""
        tensors = trained(self.modules)
        for k, optimizer in enumerate(self.optimizers):
            for i, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{i}.{key}": t for key, t in values.items()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_tensors(path, tensors)

    def keep(self, step, **numbers):
        """Keep the state before this step for good, in KEPT: the step can be done again."""
        self.check_lock()
        folder = self.folder / KEPT
        os.close(lock(folder))                  # makes it, and deletes files left half written
        self.save_trained(folder / f"{step}.safetensors")
        kept = {"numbers": numbers, "machine": machine(),
                "sha256": sha256(folder / f"{step}.safetensors")}
        write_json(folder / f"{step}.json", with_checksum(kept))

    def check_lock(self):
        """Refuse to write if the folder of this name is no longer the locked one: it may be
        another process's."""
        try:
            same_folder = os.path.samestat(os.fstat(self.lock), os.stat(self.folder))
        except OSError:
            same_folder = False
        if not same_folder:
            raise BadInput(f"{self.folder}: was deleted or moved while {self.name} was running; "
                           "run it again")

    # -------------------------------------------------------------------------------------- the end
    def seconds(self):
        """The time that the stage has run, over all its processes."""
        return round(self.earlier_seconds + time.time() - self.start, 1)

    def write_metrics(self):
        if not self.rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.folder / "metrics.csv", text.getvalue().encode())

    def finish(self, **summary):
        """Write summary.json, with the checksums of the other files. The stage is then finished."""
        self.check_lock()
        self.write_metrics()
        # Without adapter_config.json: whoever moves the base model corrects its path there. Other
        # kinds of files, such as notes, are not the stage's.
        left_out = (*STATE, "summary.json", "adapter_config.json")
        files = [path for path in self.folder.iterdir()
                 if path.suffix in (".json", ".safetensors", ".csv") and path.name not in left_out]
        seconds = self.seconds()
        summary |= {"started": round(time.time() - seconds, 1), "seconds": seconds,
                    "peak_rss_mb": peak_rss_mb(), "asked": self.asked, "inputs": self.inputs,
                    "code": self.code, "machine": machine(), "sha256": checksums(files)}
        if torch.cuda.is_initialized():
            summary["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
        write_json(self.folder / "summary.json", with_checksum(summary))
        for name in STATE:
            (self.folder / name).unlink(missing_ok=True)
        return summary


def trained(modules):
    """{name: tensor} of all that training changes in these modules, {name: module}: parameters with
    a gradient, and buffers."""
    tensors = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
        tensors |= {f"{name}.{n}": b for n, b in module.named_buffers()}
    return tensors


def restore(path, digest, modules, optimizers, remedy):
    """Read what `Stage.save_trained` wrote into these modules and optimizers. Refuse a file that
    does not match its checksum `digest`, or that is of other modules."""
    if not path.is_file() or sha256(path) != digest:
        raise BadInput(f"{path}: missing or damaged (it does not match its checksum); {remedy}")
    tensors, changed = load_tensors(path), trained(modules)
    for name, p in changed.items():
        if name not in tensors or tensors[name].shape != p.shape:
            raise BadInput(f"{path}: of another model or version, {name} is missing or has "
                           f"another shape; {remedy}")
    with torch.no_grad():
        for name, p in changed.items():
            p.copy_(tensors.pop(name))
    for k, optimizer in enumerate(optimizers):
        values = {}
        for name in [n for n in tensors if n.startswith(f"optimizer.{k}.")]:
            _, _, i, key = name.split(".")
            values.setdefault(int(i), {})[key] = tensors.pop(name).clone()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    if tensors:
        raise BadInput(f"{path}: of another model or version, there is no place for "
                       f"{min(tensors)}; {remedy}")


def machine():
    """What we record of the things that rounding depends on. The kind of CPU is not among them."""
    return {"device": pick_device().type, "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def differences(was, now):
    """(name, value, other value) of each key in which two dictionaries differ."""
    return [(name, was.get(name), now.get(name))
            for name in {**was, **now} if was.get(name) != now.get(name)]


def check_same(folder, how, was, asked, inputs):
    """Refuse flags or input files other than those that this folder was begun or finished with."""
    remedy = "use the same again, choose another folder, or delete this one"
    # A flag that another version did not have is no difference if it is off.
    if flags := [f for f in differences(was["asked"], asked) if f[1] or f[2]]:
        name, old, new = flags[0]
        flag_name = "--" + name.replace("_", "-")
        if name not in asked or name not in was["asked"]:
            had = f"with {flag_name} {old}" if name in was["asked"] else f"without {flag_name}"
            raise BadInput(f"{folder}: was {how} by another version of GIRL, {had}; choose another "
                           "folder, or delete this one")
        raise BadInput(f"{folder}: was {how} with {flag_name} {old}, not {new}; {remedy}")
    if files := differences(was["inputs"], inputs):
        raise BadInput(f"{folder}: was {how} with another {files[0][0]}; {remedy}")


# A Python file as it was when it was first read: plumbing/inputs.py does so at import. So what is
# noted is the code that runs, even if somebody edits it meanwhile.
source_of = lru_cache(read_file)


@lru_cache
def code_checksum(path):
    """The checksum of a Python file's code. It ignores comments, docstrings and layout, and is the
    same in all versions of Python."""
    return checksum(skeleton(ast.parse(source_of(path))))


def skeleton(node):
    """A syntax tree as nested lists, without docstrings. Empty fields are left out too, since
    Python versions differ in which ones they have."""
    if isinstance(node, list):
        return [skeleton(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = dict(ast.iter_fields(node))
    has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    if has_body and ast.get_docstring(node) is not None:
        parts["body"] = node.body[1:]
    filled = ([name, skeleton(part)] for name, part in parts.items() if part not in (None, []))
    return [type(node).__name__, *filled]


def restore_remedy(folder):
    """The remedy if a file of a finished stage, or of a data set, is missing or changed."""
    if list(Path(folder).glob("*.jsonl")):
        return ("restore it, or make the data again; to use data that you edited, copy them "
                "without summary.json, and give the copy with --data")
    return f"restore it, or delete {folder} and run the stage again"


def read_summary(folder):
    """The summary.json of a finished stage, or of a data set."""
    path, remedy = Path(folder) / "summary.json", restore_remedy(folder)
    summary = {"asked": {}, "inputs": {}, "sha256": {}} | read_checked(path, remedy)
    kinds = [type(summary[key]) for key in ("asked", "inputs", "sha256")]
    if kinds != [dict] * 3 or any("/" in name for name in summary["sha256"]):
        raise BadInput(f"{path}: not the summary of a stage; {remedy}")
    return summary


def check_folder(folder):
    """Refuse a finished stage, or a data set, if one of its files has changed since."""
    if not (Path(folder) / "summary.json").exists():
        return                          # a model or data from elsewhere
    remedy = restore_remedy(folder)
    for name, digest in read_summary(folder)["sha256"].items():
        path = Path(folder) / name
        if not path.exists():
            raise BadInput(f"{path}: is missing; {remedy}")
        if sha256(path) != digest:
            raise BadInput(f"{path}: damaged or edited (it does not match its checksum in "
                           f"summary.json); {remedy}")


def finished(run, name):
    return (Path(run) / name / "summary.json").exists()


def peak_rss_mb():
    """The most memory that this process has had. On Linux ru_maxrss starts at the peak of the
    process that started this one; VmHWM does not."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if peak:
        return round(int(peak[1]) / 1024)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 ** 2 if sys.platform == "darwin" else 1024))
