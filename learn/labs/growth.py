"""How it grows: width, batch and length; speed, memory, and what is learned in the same time.

Two arms run at a time, and their speed sets the number of their steps: so results differ a little
from run to run. All have the learning rates that were chosen for width 64 and batch 16, and the
first tenth of their steps is warm-up."""
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context

import numpy as np
import torch

import girl
import sft
from aids import Optimizer
from data import read_half
from learn.labs.lab import CPU, changed, command, worth
from measure.report import SERIES
from model import LanguageModel
from plumbing.stage import peak_rss_mb, read_summary
from plumbing.weights import load_model

QUESTION = "How does it grow with its size?"
PREDICTION = (
    "Tokens per second fall with the FLOPs of a token, but slower: a narrow model wastes the "
    "processor, so the rate in GFLOP/s doubles from width 64 to 256. In the same 45 seconds the "
    "narrow models learn most: 64 or 96 is best, 256 worst by far. Small batches learn more in the "
    "same time than large ones, down to 8. Rows four times as long, with a quarter of the batch, "
    "cost nothing: the tokens are as many. With sixteen times as long rows the tokens per second "
    "fall by a third, since attention grows with the length, and its rate is lower.")
SAW = (
    "A token of width 256 costs thirteen times the FLOPs of one of width 64, and six to seven "
    "times the time: the rate rises from {width 64[gflops]} to {width 256[gflops]} GFLOP/s, "
    "about the double, as predicted. In so short a time the narrowest that we tried learns "
    "most, as predicted: its valid NLL is {width 64[nll]}, at width 256 {width 256[nll]}. A "
    "longer run may favour a wider one; this lab does not show it. Batches of 8 and 16 learn "
    "alike, though 8 got fewer seconds in two seeds. With 4 the NLL is a little higher in every "
    "seed ({width 64, batch 4[nll]}), and the processor works at half its rate; with 64 it is "
    "higher still ({width 64, batch 64[nll]}). The learning rates were chosen for 16. Rows four "
    "times as long cost nothing in two seeds, as predicted. Sixteen times as long they are "
    "slower by a quarter to a half, because a token has twice the FLOPs; the rate is higher, "
    "not lower as we had thought. Memory grows from {width 64[peak_rss_mb]} to {width "
    "256[peak_rss_mb]} MB with the width, and as much with a batch of 64.")
TABLE = {"tokens_per_s": "tokens/s", "gflops": "GFLOP/s", "peak_rss_mb": "MB", "pairs": "pairs "
         "seen", "nll": "valid NLL", "true_match": "true match", "greedy": "greedy",
         "format_rate": "format", "seconds": "seconds of training"}
NOTE = ("GFLOP/s count what a plain implementation computes; ours leaves out about a tenth of it, "
        "the end of the last block where no JD token is predicted.")
SECONDS = {"--quick": 45.0, "--smoke": 0.3}
STEPS, TIMED = 100, 80
AXES = 2


def joined(pairs, n):
    """Rows n times as long: the prompts of n pairs one after the other, then their JDs."""
    return [sft.Example([t for e in pairs[k:k + n] for t in e.prompt],
                        [t for e in pairs[k:k + n] for t in e.jd])
            for k in range(0, len(pairs), n)]


def speed(place, flags, longer=1):
    """How fast stage 1 trains with these flags: from TIMED steps of a model that is then thrown
    away. Tokens are without pads; `longer` says how many pairs stand in a row."""
    records = [r for r in read_half(place.models / "data", "A") if r.accepted]
    codec = sft.new_codec(records, flags)
    pairs = [sft.Example(codec.prompt(r.cv), codec.jd(r.jd))
             for r in records[:STEPS * flags.batch * longer]]
    pairs = joined(pairs, longer)
    codec.shrink(max(len(e.prompt) for e in pairs), max(len(e.jd) for e in pairs))
    model = sft.new_model(codec, pairs, flags, place.seed)
    reader = torch.nn.Linear(flags.hidden, 1)
    optimizer = Optimizer(torch.nn.ModuleList([model, reader]), flags, STEPS)
    lengths = [len(e.prompt) + len(e.jd) for e in pairs]
    batches = sft.schedule(lengths, flags.batch, STEPS, place.seed)
    tokens = 0
    for i, batch in enumerate(batches):
        if i == STEPS - TIMED:          # the first steps are slower
            start = time.time()
        batch = [pairs[k] for k in batch]
        sft.sft_step(model, reader, batch, flags, CPU)
        optimizer.clip()
        optimizer.step(i)
        if i >= STEPS - TIMED:
            tokens += sum(len(e.prompt) + len(e.jd) for e in batch)
    took = time.time() - start
    flops = flops_per_token(model, pairs)
    return {"tokens_per_s": tokens / took, "flops": flops, "gflops": flops * tokens / took / 1e9,
            "step": took / TIMED, "records": len(records)}


def flops_per_token(model, pairs):
    """Forward 2 for a weight, backward 4; the head only before the JDs' tokens. In attention a
    token sees half of its row on average, in two products."""
    c, tokens = model.config, sum(len(e.prompt) + len(e.jd) for e in pairs)
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    head = model.lm_head.weight.numel() * sum(len(e.jd) for e in pairs) / tokens
    attention = c.num_hidden_layers * c.hidden_size * tokens / len(pairs)
    return 6 * (blocks + head + attention)


def wide(width):
    return {"hidden": width, "heads": width // 32, "kv_heads": width // 32}


def words_and_flags(place, sizes):
    """The command line of stage 1 with these sizes, and its flags."""
    words = [place.size, "--seed", str(place.seed)]
    for name, value in sizes.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words, girl.from_args(sft.SFTFlags, girl.parse(["sft", *words]))


def longer_rows(place, longer):
    """Only the speed: the market has no longer texts to learn from."""
    _, flags = words_and_flags(place, wide(64) | {"batch": 16 // longer})
    return speed(place, flags, longer)


def trained(words, log):
    """Stage 1; what it prints goes to the log. Returns the seconds of its training, without
    validation, and its peak memory."""
    torch.set_num_threads(1)
    seconds = {"train": 0.0, "validate": 0.0}

    def timed(name):
        function = getattr(sft, name)

        def measured(*args):
            start = time.time()
            found = function(*args)
            seconds[name] += time.time() - start
            return found
        return measured
    with log.open("a") as said, redirect_stdout(said), redirect_stderr(said):
        with changed(sft, train=timed("train"), validate=timed("validate")):
            command("sft", *words)
    return seconds["train"] - seconds["validate"], peak_rss_mb()


def grown(place, sizes):
    """Stage 1 in a process of its own, for as many steps as fit into the time."""
    words, flags = words_and_flags(place, sizes)
    measured = speed(place, flags)
    steps = SECONDS[place.size] / measured["step"]
    epochs = max(steps * flags.batch / measured["records"], 0.01)
    words += ["--epochs", f"{epochs:.3f}", "--warmup", max(1, round(steps / 10)),
              "--run", place.run, "--data", place.models / "data"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, peak = pool.submit(trained, words, place.run / "log.txt").result()
    summary = read_summary(place.run / "sft")
    generator = load_model(place.run / "sft", LanguageModel, CPU).eval()
    return worth(place, generator) | measured | {
        "nll": summary["valid_nll"], "peak_rss_mb": peak, "seconds": seconds,
        "pairs": round(epochs * measured["records"])}


WIDTHS = (64, 96, 128, 192, 256)
ARMS = {f"width {width}": lambda place, width=width: grown(place, wide(width)) for width in WIDTHS}
ARMS |= {f"width 64, batch {batch}": lambda place, batch=batch: grown(
            place, wide(64) | {"batch": batch}) for batch in (4, 8, 64)}
ARMS |= {f"width 64, rows {n} times as long (speed only)": lambda place, n=n: longer_rows(place, n)
         for n in (4, 16)}
SMOKE = ("width 64", "width 64, rows 4 times as long (speed only)")


def draw(found, axes):
    """Speed over the FLOPs of a token, with a fitted power; what was learned over the width."""
    widths = [row for row in found if "," not in row["arm"]]
    flops = np.array([row["flops"] for row in widths])
    speeds = np.array([row["tokens_per_s"] for row in widths])
    axes[0].plot(flops, speeds, "o", ms=4)
    if len(set(flops)) > 1:
        power, offset = np.polyfit(np.log(flops), np.log(speeds), 1)
        ends = np.array([min(flops), max(flops)])
        axes[0].plot(ends, np.exp(offset) * ends ** power, lw=0.8, color=SERIES[2],
                     label=f"FLOPs to the power {power:.2f}")
        axes[0].legend(fontsize=7)
    axes[0].set_xscale("log")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("FLOPs of a token")
    axes[0].set_ylabel("tokens per second")
    axes[1].plot([int(row["arm"].split()[1]) for row in widths], [row["nll"] for row in widths],
                 "o", ms=4)
    axes[1].set_xlabel("width")
    axes[1].set_ylabel("valid NLL after the same time")
