"""Speed and memory, for RESULTS.md.

    python tests/bench.py sft|reward|generate|ppo [--workload DIR]
                        the fixed workload, which other libraries can do too: a JSON line
    python tests/bench.py speed --init DIR
                        a pretrained model's tokens per second: training and generation, each way
    python tests/bench.py memory --init DIR
                        peak memory of PPO iterations against the plan, a process each
                        (iterations: one of them, in this process)
    python tests/bench.py saving
                        seconds of the three stages at their default sizes, with saving and without

The fixed workload is a Llama of 6 layers, C 256, H 8, F 704, V 2048, tied, and 2,048 prompts of 40
to 120 random tokens, each with a response of 40 to 120. Where no folder is given, such a model and
the very same rows are made.
  sft       32 rows a step, bucketed by length; AdamW; a step learns the responses only
  reward    16 pairs a step: a prompt's own response is preferred to that of row i + 1,024
  generate  the first 32 prompts, 96 new tokens each, nothing ends them
  ppo       64 prompts, 64 new tokens, 4 epochs of 4 minibatches; all models of the same size
A figure is the median of --repeats windows of --steps steps, after one step for warming up.
`gflops` counts 2 for each weight of the blocks and token forward, twice that backward, causal
attention, and the head only in generation and PPO. It counts what a plain implementation computes
(a prompt once for each of its responses, every token in every block). `of_sgemm_peak` divides it by
the best of some products of 1,024 x 1,024 in the same process.

In the other commands texts are random tokens at their full budgets, so that the work is always the
same; what is learned means nothing.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import girl
import plumbing.plan
import ppo
import reward
import sft
from data import bucketed
from model import Config, LanguageModel, RewardModel, copy_trainable, generate
from aids import Optimizer
from plumbing.stage import Stage, generator, peak_rss_mb, pick_device
from plumbing.weights import load_model, load_pretrained

MAX_CV, MAX_JD = 160, 240
ADAMW = dict(lr=1e-4, matrix_lr=0.0)        # as the other libraries: no Muon


def no_stage(log):
    """What ppo.train needs of a run.Stage, where nothing is saved."""
    return SimpleNamespace(step=0, rows=[], total=lambda n: n, say=lambda line: None, log=log,
                           resume=lambda modules, optimizers: {},
                           checkpoint=lambda step, **numbers: None)


# --------------------------------------------------------------------------- the fixed workload
SIZES = dict(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
             num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512)


def workload(folder):
    """The model, and (prompt, response) token rows: those of the folder, or the same made anew."""
    if folder:
        model = load_model(Path(folder) / "model")
        lines = (Path(folder) / "data.jsonl").read_text().splitlines()
        rows = [(row["prompt"], row["response"]) for row in map(json.loads, lines)]
    else:
        torch.manual_seed(0)
        model, rows = LanguageModel(Config(**SIZES)), random_rows()
    # Nothing ends a text: each is of full length.
    model.config = model.model.config = replace(model.config, eos_token_id=-1)
    return model.to(pick_device()), rows


def random_rows(n=2048, shortest=40, longest=120, first=3, vocab=2048):
    draw = np.random.default_rng(0)
    sizes = [draw.integers(shortest, longest + 1, n) for _ in ("prompts", "responses")]
    texts = [draw.integers(first, vocab, p + r).tolist() for p, r in zip(*sizes)]
    return [(text[:p], text[p:]) for text, p in zip(texts, sizes[0])]


def forward_flops(c, lengths):
    """Of the blocks, for rows of these lengths: the weights, and attention over half the square."""
    C, L = c.hidden_size, c.num_hidden_layers
    weights = L * (4 * C * C + 3 * C * c.intermediate_size) + (2 * L + 1) * C
    return sum(2 * weights * n + 2 * L * C * n * n for n in map(int, lengths))


def head_flops(c, tokens):
    return 2 * c.vocab_size * c.hidden_size * tokens


def sgemm_gflops(n=1024):
    a, b, best = torch.randn(n, n), torch.randn(n, n), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best / 1e9


def seconds(work, windows):
    """What `work(k)` takes for each k in each window, added up by window."""
    found = []
    for window in windows:
        start = time.perf_counter()
        for k in window:
            work(k)
        found.append(time.perf_counter() - start)
    return found


def windows(args):
    """[0], which warms up, and `repeats` windows of `steps` numbers."""
    first = range(1, 1 + args.steps * args.repeats, args.steps)
    return [[0]] + [list(range(k, k + args.steps)) for k in first]


def rates(amounts, found):
    """Amount per second of each window but the first."""
    return [amount / s for amount, s in zip(amounts[1:], found[1:])]


def sft_figures(model, rows, args):
    flags = sft.SFTFlags(batch=32, **ADAMW)
    lengths = [len(p) + len(r) for p, r in rows]
    batches = bucketed(lengths, flags.batch, generator(0, "bench"))
    optimizer = Optimizer(model, flags, 10 ** 6)

    def step(k):
        batch = [sft.Example(*rows[i]) for i in batches[k % len(batches)]]
        sft.sft_step(model.train(), None, batch, flags, pick_device())
        optimizer.clip()
        optimizer.step(k)
    tokens = [sum(lengths[i] for k in window for i in batches[k % len(batches)])
              for window in windows(args)]
    found = rates(tokens, seconds(step, windows(args)))
    return "tokens_per_s", found, 3 * forward_flops(model.config, lengths) / sum(lengths)


def reward_figures(lm, rows, args):
    flags, half = reward.RewardFlags(groups=16, reading=0.0, **ADAMW), len(rows) // 2
    model = RewardModel(lm.config, body=lm.model).to(pick_device()).train()
    groups = [reward.Group([(p, r), (p, rows[(i + half) % len(rows)][1])], [True, False])
              for i, (p, r) in enumerate(rows)]
    lengths = [[len(p) + len(r) for p, r in g.rows] for g in groups]
    batches = bucketed(list(map(max, lengths)), flags.groups, generator(0, "bench"))
    optimizer = Optimizer(model, flags, 10 ** 6)

    def step(k):
        batch = [groups[i] for i in batches[k % len(batches)]]
        reward.reward_step(model, None, batch, flags, pick_device())
        optimizer.clip()
        optimizer.step(k)
    pairs = [sum(len(batches[k % len(batches)]) for k in window) for window in windows(args)]
    found = rates(pairs, seconds(step, windows(args)))
    return "pairs_per_s", found, 3 * forward_flops(model.config, sum(lengths, [])) / len(groups)


def generate_figures(model, rows, args):
    prompts, written = [p for p, _ in rows[:32]], 0

    def batch(k):
        nonlocal written
        out = generate(model.eval(), prompts, args.new or 96, generator=generator(0, "bench", k))
        written = sum(map(len, out))
    found = seconds(batch, windows(args))
    c, lengths = model.config, [len(p) + (args.new or 96) - 1 for p in prompts]
    flops = forward_flops(c, lengths) + head_flops(c, written)
    return "tokens_per_s", rates([written * len(w) for w in windows(args)], found), flops / written


def ppo_figures(model, rows, args):
    new, ends, flags = args.new or 64, [], ppo.PPOFlags(
        iterations=1 + args.steps * args.repeats, episodes=64, minibatch=16, ppo_epochs=4, lr=1e-6,
        keep=0)
    model.config = model.model.config = replace(model.config, max_cv_tokens=120, max_jd_tokens=new)
    judge = RewardModel(model.config, body=copy_trainable(model.model))
    codec = SimpleNamespace(max_jd=new, eos=-1, prompt=lambda i: rows[i][0], text=str)
    ppo.train(model, judge, codec, list(range(len(rows))), flags, 0,
              no_stage(lambda **row: ends.append(time.perf_counter())), pick_device())
    ends = ends[::args.steps]               # the first iteration was for warming up
    found = [(b - a) / args.steps for a, b in zip(ends, ends[1:])]
    # Rollout; a forward of policy, reference and reward model; 4 times forward and backward.
    c, lengths = model.config, [len(p) + new for p, _ in rows]
    flops = 64 * (4 + 4 * 3) * forward_flops(c, lengths) / len(rows)
    return "s_per_iteration", found, flops + (3 + 4 * 3) * head_flops(c, 64 * new)


def fixed(args):
    peak = sgemm_gflops()
    figures = {"sft": sft_figures, "reward": reward_figures, "generate": generate_figures,
               "ppo": ppo_figures}[args.what]
    name, found, flops = figures(*workload(args.workload), args)
    figure = statistics.median(found)
    gflops = (flops / figure if name == "s_per_iteration" else flops * figure) / 1e9
    peak = max(peak, sgemm_gflops())
    print(json.dumps({
        "bench": args.what, name: round(figure, 3), "windows": [round(x, 3) for x in found],
        "peak_rss_mb": peak_rss_mb(), "gflops": float(f"{gflops:.3g}"),
        "sgemm_gflops": round(peak, 1), "of_sgemm_peak": round(gflops / peak, 3),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__}}))


# --------------------------------------------------------------------------- a pretrained model
def model_of(args, rank):
    """The pretrained model, and a codec whose texts are token rows already. Nothing ends a JD: each
    is of full length."""
    flags = sft.SFTFlags(init=args.init, lora_rank=rank, max_cv=MAX_CV, max_jd=MAX_JD,
                         reading=0.0, matrix_lr=0.0, lr=1e-5)
    codec = sft.new_codec([], flags)
    model = load_pretrained(flags, codec, 0, pick_device())
    model.config = model.model.config = replace(model.config, eos_token_id=-1)

    def row(n, seed):
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(codec.tokenizer.get_vocab_size(), (n,), generator=draw).tolist()
    stub = SimpleNamespace(max_jd=MAX_JD, eos=-1,
                           prompt=lambda i: row(MAX_CV + plumbing.plan.TEMPLATE, i),
                           jd=lambda i: row(MAX_JD, -i), text=str)
    return model, stub, flags


# ---------------------------------------------------------------------------------------- speed
def train_step(model, reader, optimizer, codec, flags, step):
    batch = [sft.Example(codec.prompt(4 * step + i), codec.jd(4 * step + i + 1)) for i in range(4)]
    start = time.time()
    sft.sft_step(model, reader, batch, replace(flags, accumulate=2), pick_device())
    optimizer.clip()
    optimizer.step(step)
    return sum(len(e.prompt) + len(e.jd) for e in batch) / (time.time() - start)


@torch.no_grad()
def without_cache(model, prompt, n):
    """What generating costs where every token is computed from all tokens before it."""
    ids = torch.tensor([prompt], device=pick_device())
    for _ in range(n):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    return ids


def speed(args):
    """Training: 4 rows in two micro-batches, LoRA and all weights in turn. Generation: with the
    cache (1 and 16 rows), without (1)."""
    found, state = {}, {}
    for name, rank in (("LoRA", args.rank), ("all weights", 0)):
        model, codec, flags = model_of(args, rank)
        reader = torch.nn.Linear(model.config.hidden_size, 1)
        optimizer = Optimizer(torch.nn.ModuleList([model, reader]), flags, 100)
        state[name] = model, reader, optimizer, codec, flags
    for step in range(args.repeats + 1):
        for name, arguments in state.items():
            rate = train_step(*arguments, step)
            if step:                            # the first is for warming up
                found.setdefault(f"training, {name}", []).append(rate)
    model, codec = state["all weights"][0].eval(), state["all weights"][3]
    new = args.new or 64
    for _ in range(args.repeats):
        for rows in (1, 16):
            start = time.time()
            prompts = [codec.prompt(i) for i in range(rows)]
            out = generate(model, prompts, new, generator=generator(0, "bench"))
            rate = sum(map(len, out)) / (time.time() - start)
            found.setdefault(f"generation, cache, {rows} rows", []).append(rate)
        start = time.time()
        without_cache(model, codec.prompt(0), new // 4)
        rate = new // 4 / (time.time() - start)
        found.setdefault("generation, no cache, 1 row", []).append(rate)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rates in found.items():
        print(f"{name:<30}{medians[name]:8.1f} tokens/s  ({min(rates):.1f} to {max(rates):.1f})")
    ratio = medians["training, LoRA"] / medians["training, all weights"]
    print(f"LoRA against all weights: {ratio:.2f}")


# --------------------------------------------------------------------------------------- memory
def iterations(args):
    """Two PPO iterations in this process (Adam's moments exist from the second step on) and the
    critic's rollout before them; prints what they took."""
    base = peak_rss_mb()
    model, codec, _ = model_of(args, args.rank)
    flags = ppo.PPOFlags(iterations=2, episodes=args.episodes, minibatch=args.minibatch,
                         accumulate=args.accumulate, ppo_epochs=1, checkpointing=args.checkpointing,
                         keep=0)
    # The reward model: a body of its own, or adapters of its own on the same base.
    judge = RewardModel(model.config, body=copy_trainable(model.model))
    stage = no_stage(lambda **row: None)
    start = time.time()
    ppo.train(model, judge, codec, list(range(100)), flags, 0, stage, pick_device())
    lora = model.model.lora
    plan = plumbing.plan.plan(model.config, flags, args.rank, lora.target_modules if lora else ())
    print("RESULT " + json.dumps({
        "base_mb": base, "peak_mb": peak_rss_mb() - base, "seconds": (time.time() - start) / 2,
        "plan_mb": plan["memory"]["peak"] / 2 ** 20, "plan": plan}))


def memory(args):
    """Every block above 64 KB is mapped by itself, and given back when it is freed: what is
    measured is what tensors take, and not the holes between them in the heap. (Many page faults, so
    it costs time. glibc before 2.38 leaves many holes: what an aligned block leaves behind is too
    small for the next one of its size, bug 14581.)"""
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"} | os.environ
    for rank in (0, args.rank):
        for checkpointing in (False, True):
            command = [sys.executable, __file__, "iterations", "--init", args.init,
                       "--rank", str(rank), "--episodes", str(args.episodes),
                       "--minibatch", str(args.minibatch), "--accumulate", str(args.accumulate)]
            done = subprocess.run(command + ["--checkpointing"] * checkpointing,
                                  capture_output=True, text=True, env=mapped)
            result = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if not result:
                sys.exit(done.stderr)
            r = json.loads(result[0].removeprefix("RESULT "))
            name = f"LoRA, rank {rank}" if rank else "all weights"
            name += ", checkpointing" if checkpointing else ""
            print(f"{name:<30} peak {r['peak_mb']:7.0f} MB above {r['base_mb']} before; plan "
                  f"{r['plan_mb']:7.0f} MB ({r['peak_mb'] / r['plan_mb'] - 1:+.0%});  "
                  f"{r['seconds']:.0f} s an iteration", flush=True)


# --------------------------------------------------------------------------------------- saving
def saving(args):
    """Each stage in turn, without saving and with a state every second, as often as `repeats`. A
    60th of what saving every second costs is what the default of 60 seconds costs."""
    found, saves, save = {}, {}, Stage.save

    def timed(stage, *more):
        start = time.time()
        save(stage, *more)
        saves.setdefault(stage.name, []).append(time.time() - start)
    Stage.save = timed
    steps = {"sft": ["--epochs", "1"], "reward": ["--steps", "100"], "ppo": ["--iterations", "3"]}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        girl.main(["data", "--people", "3000", "--held-out", "50", "--out", data])
        for repeat in range(args.repeats):
            for stage in steps:
                for every in ("1e9", "1"):
                    run = Path(folder) / f"every {every}"
                    shutil.rmtree(run / stage, ignore_errors=True)
                    done = len(saves.get(stage, []))
                    command = [stage, "--run", str(run), "--data", data, "--save-seconds", every]
                    start = time.time()
                    assert girl.main(command + steps[stage]) == 0
                    found.setdefault((stage, every), []).append(time.time() - start)
                    if every == "1e9":
                        del saves[stage][done:]         # the last step is saved always
    for stage in steps:
        quiet, saving = found[stage, "1e9"], found[stage, "1"]
        ratios = [b / a - 1 for a, b in zip(quiet, saving)]
        ms = [1000 * s for s in saves[stage]]
        print(f"{stage:<8}{statistics.median(quiet):6.1f} s; with {len(ms) // args.repeats} "
              f"states, one a second, {statistics.median(saving):6.1f} s: "
              f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%}); "
              f"a state takes {statistics.median(ms):.0f} ms ({min(ms):.0f} to {max(ms):.0f}): "
              f"every 60 seconds {statistics.median(ms) / 60_000:.2%}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"sft": fixed, "reward": fixed, "generate": fixed, "ppo": fixed, "speed": speed,
                "memory": memory, "iterations": iterations, "saving": saving}
    parser.add_argument("what", choices=commands)
    parser.add_argument("--workload", help="a folder with the fixed workload: model/, data.jsonl")
    parser.add_argument("--steps", type=int, default=1, help="steps in a window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, help="new tokens of a row")
    parser.add_argument("--init", help="a folder with a pretrained model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--minibatch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.what in ("speed", "memory", "iterations") and not arguments.init:
        parser.error("--init is missing")
    commands[arguments.what](arguments)


if __name__ == "__main__":
    main()
