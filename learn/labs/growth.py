"""How it grows: width and batch, speed, memory, and what is learned in the same time.

Two arms run at a time, and their speed sets the number of their steps: so results differ a little
from run to run. All have the learning rates that were chosen for width 64 and batch 16."""
import subprocess
import sys
import time

import torch

import girl
import sft
from aids import Optimizer
from data import read_half
from learn.copies import HOME
from learn.labs.lab import CPU, worth
from measure.report import SERIES
from model import LanguageModel
from plumbing.stage import read_summary
from plumbing.weights import load_model

QUESTION = "How does it grow with its size?"
PREDICTION = (
    "Tokens per second fall with the FLOPs of a token, but slower: a narrow model wastes the "
    "processor, so the rate in GFLOP/s doubles from width 64 to 256. In the same 45 seconds the "
    "narrow models learn most: 64 or 96 is best, 256 worst by far. Small batches learn more in the "
    "same time than large ones, down to 8.")
SAW = ""
TABLE = {"tokens_per_s": "tokens/s", "gflops": "GFLOP/s", "peak_rss_mb": "MB", "pairs": "pairs "
         "seen", "nll": "valid NLL", "true_match": "true match", "greedy": "greedy",
         "format_rate": "format", "seconds": "seconds"}
SECONDS = {"--quick": 45.0, "--smoke": 0.3}
AXES = 2


def speed(place, flags):
    """Real tokens in a second of training, seconds a step, FLOPs a token, pairs an epoch: from 20
    steps of a model that is then thrown away."""
    records = [r for r in read_half(place.models / "data", "A") if r.accepted]
    codec = sft.new_codec(records, flags)
    pairs = [sft.Example(codec.prompt(r.cv), codec.jd(r.jd)) for r in records[:25 * flags.batch]]
    codec.shrink(max(len(e.prompt) for e in pairs), max(len(e.jd) for e in pairs))
    model = sft.new_model(codec, pairs, flags, place.seed)
    reader = torch.nn.Linear(flags.hidden, 1)
    optimizer = Optimizer(torch.nn.ModuleList([model, reader]), flags, 25)
    batches = sft.schedule([len(e.prompt) + len(e.jd) for e in pairs], flags.batch, 25, place.seed)
    tokens = 0
    for i, batch in enumerate(batches):
        if i == 5:
            start = time.time()
        batch = [pairs[k] for k in batch]
        sft.sft_step(model, reader, batch, flags, CPU)
        optimizer.clip()
        optimizer.step(i)
        tokens += sum(len(e.prompt) + len(e.jd) for e in batch) if i >= 5 else 0
    took = time.time() - start
    jd_share = sum(len(e.jd) for e in pairs) / sum(len(e.prompt) + len(e.jd) for e in pairs)
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    head = model.lm_head.weight.numel()
    return {"tokens_per_s": tokens / took, "step": took / 20, "records": len(records),
            "flops": 6 * (blocks + jd_share * head)}        # forward 2, backward 4 a weight


def grown(place, **sizes):
    """Stage 1 in a process of its own, for as many steps as fit into the time."""
    words = [place.size, "--seed", str(place.seed)]
    for name, value in sizes.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    flags = girl.from_args(sft.SFTFlags, girl.parse(["sft", *words]))
    measured = speed(place, flags)
    steps = SECONDS[place.size] / measured["step"]
    epochs = max(steps * flags.batch / measured["records"], 0.01)
    subprocess.run([sys.executable, "girl.py", "sft", *words, "--epochs", f"{epochs:.3f}", "--run",
                    place.run, "--data", place.models / "data"], cwd=HOME, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    summary = read_summary(place.run / "sft")
    return worth(place, load_model(place.run / "sft", LanguageModel, CPU).eval()) | {
        "tokens_per_s": measured["tokens_per_s"], "nll": summary["valid_nll"],
        "gflops": measured["flops"] * measured["tokens_per_s"] / 1e9,
        "flops": measured["flops"], "peak_rss_mb": summary["peak_rss_mb"],
        "pairs": round(epochs * measured["records"]), "seconds": summary["seconds"]}


WIDTHS = (64, 96, 128, 192, 256)
ARMS = {f"width {width}": lambda place, width=width: grown(
            place, hidden=width, heads=width // 32, kv_heads=width // 32) for width in WIDTHS}
ARMS |= {f"width 64, batch {batch}": lambda place, batch=batch: grown(place, batch=batch)
         for batch in (4, 8, 64)}
SMOKE = ("width 64",)


def draw(found, axes):
    """Speed over the FLOPs of a token, with the line of a constant rate; what was learned over the
    width."""
    widths = [row for row in found if "batch" not in row["arm"]]
    flops = [row["flops"] for row in widths]
    axes[0].plot(flops, [row["tokens_per_s"] for row in widths], "o", ms=4)
    middle = sorted(row["flops"] * row["tokens_per_s"] for row in widths)[len(widths) // 2]
    ends = [min(flops), max(flops)]
    axes[0].plot(ends, [middle / x for x in ends], lw=0.8, color=SERIES[2],
                 label=f"{middle / 1e9:.0f} GFLOP/s")
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("FLOPs of a token")
    axes[0].set_ylabel("tokens per second")
    axes[0].legend(fontsize=7)
    axes[1].plot([int(row["arm"].split()[1]) for row in widths], [row["nll"] for row in widths],
                 "o", ms=4)
    axes[1].set_xlabel("width")
    axes[1].set_ylabel("valid NLL after the same time")
