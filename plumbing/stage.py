"""A stage's flags, device and random generators, and its folder: what it needs around its mathematics.

    runs/NAME/STAGE/   config.json, model.safetensors (with LoRA the adapters), tokenizer.json, metrics.csv, and last of
                       all summary.json

A stage is finished when its `summary.json` is there.
"""
import ast
import csv
import hashlib
import io
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import field
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import (BadInput, checksum, checksums, load_tensors, lock, read_checked, read_file,
                            save_tensors, sha256, with_checksum, write_bytes, write_json)


def flag(default, help, least=None, most=1e9):
    """A documented field of a stage's dataclass of flags; girl.py makes the command line and its --help from them. Counts
    are at least 1 and other numbers at least 0, where `least` does not say otherwise; texts and switches have no least."""
    if least is None:
        least = {int: 1, float: 0}.get(type(default))
    return field(default=default, metadata={"help": help, "least": least, "most": most})


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
