"""Speed and memory of a pretrained model, with adapters and without, and what it costs to save: ratios of one run, for the README.

    python tests/bench.py speed --init DIR        tokens per second: training and generation, each way in turn
    python tests/bench.py memory --init DIR       peak memory of PPO iterations against the plan, a process each
    python tests/bench.py saving                  seconds of the three stages at their default sizes, with saving and without

Of the first two, texts are random tokens at their full budgets, so that the work is always the same; what is learned means nothing.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import girl                                                                     # noqa: E402
import ppo                                                                      # noqa: E402
import sft                                                                      # noqa: E402
from model import RewardModel, generate, twin                                   # noqa: E402
from run import Optimizer, Stage, generator, peak_rss_mb, pick_device           # noqa: E402
from weights import load_pretrained                                             # noqa: E402

MAX_CV, MAX_JD = 160, 240


def model_of(args, rank):
    """The pretrained model, and a codec whose texts are token rows already. Nothing ends a JD: each is of full length."""
    flags = sft.SFTFlags(init=args.init, lora_rank=rank, max_cv=MAX_CV, max_jd=MAX_JD, reading=0.0, matrix_lr=0.0, lr=1e-5)
    codec = sft.new_codec([], flags)
    model = load_pretrained(flags, codec, 0, pick_device())
    model.config = model.model.config = replace(model.config, eos_token_id=-1)

    def row(n, seed):
        return torch.randint(codec.tokenizer.get_vocab_size(), (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    stub = SimpleNamespace(max_jd=MAX_JD, eos=-1, prompt=lambda i: row(MAX_CV + ppo.TEMPLATE, i), jd=lambda i: row(MAX_JD, -i), text=str)
    return model, stub, flags


# ----------------------------------------------------------------------------------------------------------- speed
def train_step(model, reader, optimizer, codec, flags, step):
    batch = [sft.Example(codec.prompt(4 * step + i), codec.jd(4 * step + i + 1), True, False) for i in range(4)]
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
    """Training: 4 rows in two micro-batches, LoRA and all weights in turn. Generation: with the cache (1 and 16 rows), without (1)."""
    found, state = {}, {}
    for name, rank in (("LoRA", args.rank), ("all weights", 0)):
        model, codec, flags = model_of(args, rank)
        reader = torch.nn.Linear(model.config.hidden_size, 1)
        state[name] = model, reader, Optimizer(torch.nn.ModuleList([model, reader]), flags, 100), codec, flags
    for step in range(args.repeats + 1):
        for name, arguments in state.items():
            rate = train_step(*arguments, step)
            if step:                            # the first is for warming up
                found.setdefault(f"training, {name}", []).append(rate)
    model, codec = state["all weights"][0].eval(), state["all weights"][3]
    for _ in range(args.repeats):
        for rows in (1, 16):
            start = time.time()
            out = generate(model, [codec.prompt(i) for i in range(rows)], args.new, generator=generator(0, "bench"))
            found.setdefault(f"generation, cache, {rows} rows", []).append(sum(map(len, out)) / (time.time() - start))
        start = time.time()
        without_cache(model, codec.prompt(0), args.new // 4)
        found.setdefault("generation, no cache, 1 row", []).append(args.new // 4 / (time.time() - start))
    for name, rates in found.items():
        print(f"{name:<30}{statistics.median(rates):8.1f} tokens/s  ({min(rates):.1f} to {max(rates):.1f})")
    print(f"LoRA against all weights: {statistics.median(found['training, LoRA']) / statistics.median(found['training, all weights']):.2f}")


# ---------------------------------------------------------------------------------------------------------- memory
def iterations(args):
    """Two PPO iterations in this process (Adam's moments exist from the second step on) and the critic's rollout before them;
    prints what they took."""
    base = peak_rss_mb()
    model, codec, _ = model_of(args, args.rank)
    flags = ppo.PPOFlags(iterations=2, episodes=args.episodes, minibatch=args.minibatch, accumulate=args.accumulate, ppo_epochs=1,
                         checkpointing=args.checkpointing)
    # The reward model: a body of its own, or adapters of its own on the same base.
    judge = RewardModel(model.config, body=twin(model.model))
    stage = SimpleNamespace(step=0, total=lambda n: n, log=lambda **row: None, say=print, resume=lambda modules, optimizers: {},
                            safe=lambda step, tensors=None, **numbers: None)
    start = time.time()
    ppo.train(model, judge, codec, list(range(100)), flags, 0, stage, pick_device())
    lora = model.model.lora
    plan = ppo.plan(model.config, flags, args.rank, lora.target_modules if lora else ())
    print("RESULT " + json.dumps({"base_mb": base, "peak_mb": peak_rss_mb() - base, "plan_mb": plan["memory"]["peak"] / 2 ** 20,
                                  "seconds": (time.time() - start) / 2, "plan": plan}))


def memory(args):
    """Every block above 64 KB is mapped by itself, and given back when it is freed: what is measured is what tensors take, and not
    the holes between them in the heap. (Many page faults, so it costs time. glibc before 2.38 leaves many holes: what an aligned
    block leaves behind is too small for the next one of its size, bug 14581.)"""
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536"} | os.environ
    for rank in (0, args.rank):
        for checkpointing in (False, True):
            command = [sys.executable, __file__, "iterations", "--init", args.init, "--rank", str(rank), "--episodes",
                       str(args.episodes), "--minibatch", str(args.minibatch), "--accumulate", str(args.accumulate)]
            done = subprocess.run(command + ["--checkpointing"] * checkpointing, capture_output=True, text=True, env=mapped)
            result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not result:
                sys.exit(done.stderr)
            r = json.loads(result[0].removeprefix("RESULT "))
            name = (f"LoRA, rank {rank}" if rank else "all weights") + (", checkpointing" if checkpointing else "")
            print(f"{name:<30} peak {r['peak_mb']:7.0f} MB above {r['base_mb']} before; plan {r['plan_mb']:7.0f} MB "
                  f"({r['peak_mb'] / r['plan_mb'] - 1:+.0%});  {r['seconds']:.0f} s an iteration", flush=True)


# ---------------------------------------------------------------------------------------------------------- saving
def saving(args):
    """Each stage in turn, without saving and with a state every second, as often as `repeats`. What saving every second costs, a
    60th of it is what the default of 60 seconds costs."""
    found, saves, save = {}, {}, Stage.save

    def timed(stage, *more):
        start = time.time()
        save(stage, *more)
        saves.setdefault(stage.name, []).append(time.time() - start)
    Stage.save = timed
    steps = {"sft": ["--warm-steps", "50", "--epochs", "1"], "reward": ["--steps", "100"], "ppo": ["--iterations", "3"]}
    with tempfile.TemporaryDirectory() as folder:
        girl.main(["data", "--people", "3000", "--held-out", "50", "--out", f"{folder}/data"])
        for repeat in range(args.repeats):
            for stage in steps:
                for every in ("1e9", "1"):
                    run = Path(folder) / f"every {every}"
                    shutil.rmtree(run / stage, ignore_errors=True)
                    done = len(saves.get(stage, []))
                    start = time.time()
                    assert girl.main([stage, "--run", str(run), "--data", f"{folder}/data", "--save-seconds", every, *steps[stage]]) == 0
                    found.setdefault((stage, every), []).append(time.time() - start)
                    if every == "1e9":
                        del saves[stage][done:]         # the last step is saved always
    for stage in steps:
        without, every_second = (statistics.median(found[stage, every]) for every in ("1e9", "1"))
        ratios = [b / a - 1 for a, b in zip(found[stage, "1e9"], found[stage, "1"])]
        ms = [1000 * s for s in saves[stage]]
        print(f"{stage:<8}{without:6.1f} s; with {len(ms) // args.repeats} states, one a second, {every_second:6.1f} s: {statistics.median(ratios):+.1%} "
              f"({min(ratios):+.1%} to {max(ratios):+.1%}); a state takes {statistics.median(ms):.0f} ms ({min(ms):.0f} to {max(ms):.0f}): every "
              f"60 seconds {statistics.median(ms) / 60_000:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "iterations", "saving"))
    parser.add_argument("--init", help="a folder with a pretrained model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--minibatch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.what != "saving" and not arguments.init:
        parser.error("--init is missing")
    {"speed": speed, "memory": memory, "iterations": iterations, "saving": saving}[arguments.what](arguments)
