"""GIRL, generative job recommendation: a language model reads a CV and writes the job description (JD) that fits it.

    bash train.sh                                    all of it, from an empty folder
    python girl.py COMMAND --help                    one stage, or one use, at a time

This file holds the command line: what a command reads and refuses, which stage comes after which, and generating for a CV.
"""
import argparse
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

if __name__ == "__main__":              # Ctrl-C while torch is being imported: end, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# On Linux a thread of torch that waits for the other one spins, and beside other programs it takes the time that the other one
# needs. With at most 5,000 turns a step of stage 1 took 0.28 s instead of 0.63 at a load of 3 (one measurement); on a quiet
# machine three measurements showed no difference.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

import market
import ppo
import reward
import sft
from data import load_codec, read_half, read_records
from measure import demo, evaluate, recommend
from model import LINEAR, LanguageModel, RewardModel, generate, is_target, merge_lora
from plumbing import table
from plumbing.files import (BadInput, checksum, checksums, locked, read_json, sha256, with_checksum,
                            write_json)
from plumbing.inputs import (BEFORE, DATA, check_rules, code_of, init_of, models_before, need,
                             what_it_learns_from)
from plumbing.plan import print_plan
from plumbing.records import SPLITS, files_of
from plumbing.stage import (Stage, autocast, check_same, differences, finished, flag, generator,
                            peak_rss_mb, pick_device, read_summary)
from plumbing.texts import is_utf16, normalize
from plumbing.tokenizer import save_tokenizer
from plumbing.weights import StartFlags, is_reward, load_model, read_config, read_lora, save_model


@dataclass
class DataFlags:
    people: int = flag(60000, "job seekers in train")
    held_out: int = flag(1000, "job seekers in valid, and in test")
    jobs: int = flag(60000, "jobs on offer in each split")
    applications: int = flag(6, "jobs that each of them applies for, about", least=4)
    fields: int = flag(8, "fields of work, the first ones of market.OCCUPATIONS", least=2, most=len(market.OCCUPATIONS))


# ------------------------------------------------------------------------------------------ the stages and their models
# ------------------------------------------------------------------------------------------------- uses of a run
def read_text(path):
    """The text of a file. Its contacts stay until the model is known: see as_trained."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = normalize(raw.decode("utf-8"), False)
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {e.start}); save the file as UTF-8")
    except (OSError, ValueError, AttributeError) as e:      # the last two where standard input is closed
        raise BadInput(f"{path}: {getattr(e, 'strerror', None) or 'cannot be read'}; give a text file, or - for standard input")
    if is_utf16(raw):
        raise BadInput(f"{path}: every other byte is 0, as in UTF-16; save the file as UTF-8")
    if not text:
        raise BadInput(f"{path}: empty; put the text of one CV or JD into it")
    return text


def as_trained(text, model):
    """A text as this model's training data had it."""
    return normalize(text, not model.config.keep_contacts)


def write_for(args, device):
    """`generate`: JDs for one CV, the best score first where a reward model is given."""
    temperature = 0.0 if args.greedy else args.temperature
    if not ((temperature == 0 or 0.01 <= temperature <= 100) and 0 < args.top_p <= 1):
        raise BadInput(f"generate: --temperature {temperature} must be 0 or from 0.01 to 100, --top-p {args.top_p} above 0 and "
                       "at most 1")
    cv = read_text(args.cv)
    model = load_model(args.model, LanguageModel, device).eval()
    codec = load_codec(args.model, model.config)
    prompts = [codec.prompt(as_trained(cv, model))] * args.number
    with torch.no_grad(), autocast(device):
        out = generate(model, prompts, codec.max_jd, temperature, args.top_p, generator(args.seed, "generate", device=device))
    texts = [codec.text(o) for o in out]
    say_what_was_cut(args, codec)
    if args.reward:
        reward_model = load_model(args.reward, RewardModel, device).eval()
        reward_codec = load_codec(args.reward, reward_model.config)
        pairs = [(as_trained(cv, reward_model), as_trained(text, reward_model)) for text in texts]
        scores = reward.score_texts(reward_model, reward_codec, pairs)
        texts = [f"[{s:+.3f}]\n{t}" for s, t in sorted(zip(scores, texts), key=lambda st: -st[0])]
    print("\n\n".join(texts), flush=True)
    if unfinished := sum(o[-1] != codec.eos for o in out):
        print(f"{unfinished} of {len(out)} JDs did not end within {codec.max_jd} tokens", file=sys.stderr)


def score_one(args, device):
    model = load_model(args.reward, RewardModel, device).eval()
    codec = load_codec(args.reward, model.config)
    cv, jd = (as_trained(read_text(path), model) for path in (args.cv, args.jd))
    print(f"{reward.score_texts(model, codec, [(cv, jd)])[0]:.4f}")
    say_what_was_cut(args, codec)


def say_what_was_cut(args, codec):
    if codec.cut_cvs:
        print(f"{args.cv}: the CV was cut at {codec.max_cv} tokens", file=sys.stderr)
    if codec.cut_jds:
        print(f"{args.jd}: the JD was cut at {codec.max_jd} tokens", file=sys.stderr)


def export(args, device):
    """A generator or a reward model into a folder of its own."""
    names = ("config.json", "girl.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors",
             "tokenizer.json")
    if taken := [name for name in names if (Path(args.out) / name).exists()]:
        raise BadInput(f"{args.out}: holds a model already ({taken[0]}); choose another --out")
    model = load_model(args.model, RewardModel if is_reward(Path(args.model)) else LanguageModel)
    codec = load_codec(args.model, model.config)
    if args.merge:
        merge_lora(model)
    model.config.pad_token_id = codec.pad
    save_model(args.out, model)
    template = save_tokenizer(args.out, codec)
    kind = "adapters on " + model.model.lora.base_model_name_or_path if model.model.lora else "plain weights"
    print(f"{args.out}: {type(model).__name__}, {kind}")
    if not template:
        print(f"{args.out}: no chat template; this tokenizer cannot reproduce the prompt from text, so give other tools token ids")


# ---------------------------------------------------------------------------------------------------- commands
def data_asked(args):
    """What a data set is made of, beside a table."""
    return {"seed": args.seed, **vars(from_args(DataFlags, args))}


def make_data(args):
    flags = from_args(DataFlags, args)
    with locked(args.out):
        write_data(args, flags, time.time())


TABLE_FLAGS = ("encoding", "delimiter", "split_by", "keep_contacts")


def write_data(args, flags, start):
    named = {name: getattr(args, name) for name in ("cv", "jd", "accepted", "rejected_cv", "rejected_jd") if getattr(args, name)}
    if args.source:
        if not {"cv", "jd"} <= set(named) or len(named) > 3:
            raise BadInput("data: --from needs --cv and --jd, and at most one of --accepted, --rejected-cv, --rejected-jd")
        if len(set(named.values())) < len(named):
            raise BadInput("data: --cv, --jd and the others must name different columns")
        if args.encoding:
            table.check_encoding(args.encoding)
        if args.delimiter:
            args.delimiter = table.check_delimiter(args.delimiter)
        if os.path.dirname(os.path.realpath(args.source)) == os.path.realpath(args.out):
            raise BadInput(f"{args.source}: lies in the folder that is to be written anew; choose another --out")
        table.import_table(args.source, args.out, named, args.keep_contacts, args.seed,
                           args.encoding, args.delimiter, args.split_by or "group")
    elif named:
        raise BadInput(f"data: --{next(iter(named)).replace('_', '-')} names a column of a table; give the table with --from FILE")
    elif given := [name for name in TABLE_FLAGS if getattr(args, name)]:
        raise BadInput(f"data: --{given[0].replace('_', '-')} says how a table is read; give the "
                       "table with --from FILE")
    else:
        market.write_market(args.out, flags.people, flags.held_out, flags.jobs, flags.applications, args.seed, flags.fields)
    write_json(Path(args.out) / "summary.json", with_checksum({
        "started": round(start, 1), "seconds": round(time.time() - start, 1), "peak_rss_mb": peak_rss_mb(),
        "asked": data_asked(args), "inputs": {}, "sha256": checksums(files_of(args.out))}))


def folders(args):
    """The run's folder, its data, and the market's module where these are simulated."""
    run = Path(args.run)
    folder = Path(args.data or run / "data")
    return run, folder, market if (folder / "market.json").exists() else None


def run_stage(args, device):
    """One of sft, reward, judge, ppo; a stage whose result is there is not run again."""
    name = "judge" if getattr(args, "judge", False) else args.command
    run, folder, the_market = folders(args)
    if getattr(args, "plan", None) is not None:
        return show_plan(args, run)
    flags = from_args(STAGES[args.command], args)
    if getattr(flags, "lora_rank", 0) and not flags.init:
        raise BadInput(f"{args.command}: --lora-rank goes with --init; adapters need weights beside them that know something "
                       "already")
    for split in SPLITS:
        if not (folder / f"{split}.jsonl").is_file():
            raise BadInput(f"{folder / split}.jsonl: no such file; make a data set with  python girl.py data --out {folder}")
    asked, inputs = {"seed": args.seed, **vars(flags)}, what_it_learns_from(run, folder, name, getattr(flags, "init", ""))
    # PPO's iterations are few and long: each is saved.
    with Stage(run, name, 0 if name == "ppo" else args.save_seconds) as stage:
        if stage.begin(asked, inputs, code_of(name)):
            note_config(run, name, {"data": str(folder), **asked})
            if name == "ppo":
                ppo.run(stage, run, folder, flags, args.seed, device, the_market and the_market.true_match)
            else:
                (sft if name == "sft" else reward).run(stage, run, folder, flags, args.seed, device)


def show_plan(args, run):
    """`ppo --plan`: memory and work of an iteration for a model of which only the config.json is read."""
    folder = Path(args.plan or need(run, "sft"))
    config, raw = read_config(folder)
    if "max_cv_tokens" not in raw:              # a pretrained model that no stage has taken up yet
        config = replace(config, max_cv_tokens=sft.SFTFlags.max_cv, max_jd_tokens=sft.SFTFlags.max_jd)
    lora = read_lora(folder)
    rank, targets = (lora.r, lora.target_modules) if lora else (16, StartFlags.lora_targets.split(","))
    # Counted as if all blocks had the same adapters.
    targets = [name for part, names in LINEAR.items() for name in names
               if any(is_target(f"model.layers.{i}.{part}.{name}", targets) for i in range(config.num_hidden_layers))]
    print_plan(config, from_args(ppo.PPOFlags, args), rank, targets)


def note_config(run, stage, flags):
    """config.json of a run: the flags of each of its stages. Locked, since reward model and judge start together."""
    path = run / "config.json"
    with locked(run, wait=True):
        noted = read_json(path, "delete it, nothing depends on it") if path.exists() else {}
        write_json(path, dict(sorted((noted | {stage: flags}).items())))


def run_all(args, device):
    """`train`: every stage of a run, then the evaluation. What bash train.sh calls."""
    run, size = Path(args.run), size_of(args)
    common = ["--seed", str(args.seed)] + ([f"--{size}"] if size else [])
    if args.demo:
        return run_demo(args, run, common, device)
    start = [x for f in fields(StartFlags) if getattr(args, f.name) for x in flag_words(f, getattr(args, f.name))]
    check_rules(Path(args.data or run / "data"))        # before its stages do, in processes of their own
    if args.data is None:
        args.data = make_own_data(run, common, device)
    common += ["--run", args.run, "--data", args.data]
    save = ["--save-seconds", str(args.save_seconds)]
    again = save + (["--checkpointing"] if args.checkpointing else [])
    run_apart(run, {"sft": ["sft"] + common + save + start}, device)
    run_apart(run, {"reward": ["reward"] + common + again, "judge": ["reward", "--judge"] + common + again}, device)
    run_stage(parse(["ppo"] + common + again), device)
    wanted = parse(["evaluate"] + common)
    with locked(run, wait=True):         # the recommender is not added to an evaluation of others
        evaluate.forget_others(run, {"seed": wanted.seed, "split": wanted.split,
                                     "measured": what_is_measured(wanted)})
    measures = [name for name in evaluate.MEASURES if not (args.quick and name == "recommend")]
    run_apart(run, {name: [name] + common for name in measures}, device)
    if args.smoke:
        print("\nThis was a toy run: it shows that every stage runs, not that anything was learned. Its figures mean nothing; those of "
              "bash train.sh do.")


def make_own_data(run, common, device):
    """The data set of this run, made where it is not there yet; returns its folder."""
    folder = str(run / "data")
    command = ["data", "--out", folder] + common
    if finished(run, "data"):
        check_same(run / "data", "made", read_summary(run / "data"), data_asked(parse(command)), {})
    elif all((run / "data" / f"{split}.jsonl").exists() for split in SPLITS):
        print(f"data: nothing vouches for those in {folder}; they are used as they are")
    else:
        run_apart(run, {"data": command}, device)
    return folder


def run_demo(args, run, common, device):
    """`train --demo`: PPO of the models that come with the project, and a verdict on it. Returns the exit code."""
    if args.data or args.init:
        raise BadInput("train: --demo brings models and data of its own; leave --data and --init out")
    make_own_data(run, common, device)
    demo.put_models(run)
    run_stage(parse(["ppo", "--run", str(run), "--save-seconds", str(args.save_seconds), *common]), device)
    return 0 if demo.judge(run) else 1


def flag_words(f, value):
    """A field's flag as it is written on the command line."""
    name = "--" + f.name.replace("_", "-")
    return [name] if value is True else [name, str(value)]


def run_apart(run, commands, device):
    """Stages or measurements that do not need each other, each in a process of its own, which gives
    its memory back at the end, with its share of the threads: on small models two processes of one
    thread get more done than one process of two."""
    share, children = str(max(1, torch.get_num_threads() // len(commands))), []
    try:
        for name, command in commands.items():
            if not is_done(run, name, command, device):
                children.append(subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *command],
                                                 env=os.environ | {"OMP_NUM_THREADS": share}))
        codes = [child.wait() for child in children]
    finally:
        for child in children:              # only after an interrupt is one of them still at work
            child.terminate()
        for child in children:
            child.wait()
    if min(codes, default=0) < 0:
        raise BadInput(f"{run}: {' or '.join(commands)} was killed (signal {-min(codes)}), for want of memory perhaps; the same "
                       "command goes on")
    if any(codes):
        raise BadInput(f"{run}: {' or '.join(commands)} failed; what went wrong stands above")


def is_done(run, name, command, device):
    """Is nothing left to do? Says so; or refuses, where a stage was finished with other flags."""
    if name in evaluate.MEASURES:
        return is_measured(run, parse(command))
    if finished(run, name):
        run_stage(parse(command), device)
    return finished(run, name)


def what_is_measured(args):
    """Checksums of the models, of the data, of all that `evaluate` or `recommend` depends on (flags
    too), and of its code. (With --full it measures more, but the same.)"""
    run, folder, _ = folders(args)
    flags = {k: v for k, v in vars(args).items() if k not in ("run", "data", "export_pairs", "verdicts", "full")}
    inputs = what_it_learns_from(run, folder, args.command) | {"split": sha256(folder / f"{args.split}.jsonl")}
    return {"models": checksum(models_before(run, "evaluate")),
            "data": checksum({file: inputs[file] for file in (*DATA, "split") if file in inputs}),
            args.command: checksum(flags | inputs), f"{args.command} code": code_of(args.command)}


def is_measured(run, args):
    """Is this in results.json already, of these models and by these flags? Says so, and which code changed since."""
    try:
        noted, now = evaluate.read_results(run)["measured"], what_is_measured(args)
    except BadInput:                    # not there, or damaged: it is measured anew
        return False
    code = now.pop(f"{args.command} code")
    del now["data"]     # an earlier version did not note them; they are among the inputs anyway
    if not noted.items() >= now.items():
        return False
    print(f"{args.command}: finished already, see {run / 'results.json'}")
    if changed := [name for name, *_ in differences(noted.get(f"{args.command} code", code), code)]:
        size = size_of(args)
        more = (f" --{size}" if size else "") + (f" --seed {args.seed}" if args.seed else "") + (f" --data {args.data}" if args.data else "")
        print(f"{args.command}: {', '.join(changed)} changed since; to measure anew:  python girl.py {args.command} --run {run}{more}")
    sys.stdout.flush()
    return True


def evaluate_run(args, device):
    run, folder, truth = folders(args)
    if args.verdicts:
        evaluate.read_results(run)          # or there is no run to lock
        with locked(run / "evaluate"):
            return evaluate.add_verdicts(run, args.verdicts)
    if args.export_pairs and Path(args.export_pairs).exists():
        raise BadInput(f"{args.export_pairs}: exists already; choose another file")
    measured = what_is_measured(args)
    with locked(run / "evaluate"):
        evaluate.evaluate(run, folder, args.split, args.cvs, args.seed, device, truth, init_of(run), args.export_pairs, measured)


def recommend_run(args, device):
    """`recommend`: jobs of a pool for one CV, or what the written JDs are worth, measured."""
    run, folder, truth = folders(args)
    if bool(args.cv) != bool(args.pool):
        raise BadInput("recommend: --cv and --pool belong together: real jobs of the pool for this CV")
    for stage in BEFORE["recommend"]:
        need(run, stage)
    models, train = recommend.load_run(run, device, args.seed), read_records(folder / "train.jsonl")
    if args.cv:
        cv = as_trained(read_text(args.cv), models.girl)
        pool = recommend.read_pool(args.pool, not models.girl.config.keep_contacts)
        recommend.find_jobs(models, cv, pool, args.top, train, truth)
        if cv in models.codec.cut_cvs:
            print(f"{args.cv}: the CV was cut at {models.codec.max_cv} tokens", file=sys.stderr)
    else:
        flags, measured = from_args(recommend.RecommendFlags, args), what_is_measured(args)
        labels, held_out = read_half(folder, "B"), read_records(folder / f"{args.split}.jsonl")
        recommend.measure(run, folder, models, train, labels, held_out, args.split, flags,
                          args.full, truth, measured)


STAGES = {"sft": sft.SFTFlags, "reward": reward.RewardFlags, "ppo": ppo.PPOFlags}
# Runs of other sizes, each in a folder of its own, runs/NAME, and the defaults that they change. smoke: every stage at toy
# size, to see that all of it runs. quick: a smaller market and smaller models, for a classroom. demo: PPO alone, of the quick
# models that come with the project (see demo.py).
SIZES = {
    "smoke": {"data": {"people": 300, "held_out": 60, "jobs": 600},
              "sft": {"epochs": 1, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 4, "vocab": 600, "save_seconds": 2.0},
              "reward": {"steps": 20, "samples": 32, "save_seconds": 2.0},
              "ppo": {"iterations": 3, "episodes": 16, "minibatch": 8, "save_seconds": 2.0},
              "evaluate": {"cvs": 24}, "recommend": {"people": 40, "seeds": 2, "steps": 20, "cvs": 10},
              "train": {"save_seconds": 2.0}},
    "quick": {"data": {"people": 24000, "held_out": 400, "jobs": 12000, "fields": 2},
              "sft": {"epochs": 2, "hidden": 64, "layers": 3, "heads": 2, "kv_heads": 2, "vocab": 1024},
              "reward": {"steps": 1000}, "ppo": {"iterations": 28, "episodes": 128, "lr": 8e-4}, "evaluate": {"cvs": 200}},
    "demo": {"data": {"people": 600, "held_out": 50, "jobs": 2000, "fields": 2},
             "ppo": {"iterations": 12, "episodes": 128, "minibatch": 32, "lr": 4e-4}},
}
# What changes where a run begins with a pretrained model: it can read and write already, so it needs gentle steps and none of
# what helps a small model to learn to copy; and adapters need larger steps than the weights themselves. Usual values, of
# which only those of LORA were tried, in one run of a model of 135M.
PRETRAINED = {"sft": {"epochs": 2, "batch": 8, "accumulate": 4, "lr": 2e-5, "matrix_lr": 0.0, "warmup": 10, "reading": 0.0},
              "reward": {"steps": 120, "accumulate": 4, "lr": 2e-5, "matrix_lr": 0.0, "warmup": 10, "samples": 32},
              "ppo": {"iterations": 20, "episodes": 32, "minibatch": 16, "accumulate": 4, "lr": 1e-5}}
LORA = {"sft": {"lr": 4e-4}, "reward": {"lr": 4e-4}, "ppo": {"lr": 1e-4}}
HELP = {"data": "make a data set: of the simulated job market, or of a table of your own CVs and JDs",
        "sft": "stage 1: learn to write the JDs that were accepted",
        "reward": "stage 2: learn to judge as the recruiter does", "ppo": "stage 3: learn to write what is accepted",
        "generate": "write JDs for a CV", "score": "score one JD for one CV",
        "export": "write a generator or a reward model into a folder of its own, with --merge as plain weights",
        "evaluate": "measure a run on held-out CVs, write results.json",
        "recommend": "measure what the written JDs are worth to a recommender and in finding real jobs; or find jobs for one CV",
        "train": "all stages, the evaluation and the recommender"}


def size_of(args):
    """The name of the size that was asked for, or an empty text."""
    return next((size for size in SIZES if getattr(args, size, False)), "")


def recipe(args):
    """{flag: default} where another size was asked for."""
    if not (size := size_of(args)):
        return {}
    folder = {"out": f"runs/{size}/data"} if args.command == "data" else {"run": f"runs/{size}"}
    return folder | SIZES[size].get(args.command, {})


def add_flags(parser, cls):
    for f in fields(cls):
        name, switch = "--" + f.name.replace("_", "-"), isinstance(f.default, bool)
        how = {"action": "store_true"} if switch else {"type": type(f.default), "metavar": f.name[0].upper()}
        shown = "off" if switch else "%(default)s" if f.default != "" else "none"
        parser.add_argument(name, default=f.default, help=f"{f.metadata['help']} (default {shown})", **how)


def from_args(cls, args):
    flags = cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
    for f in fields(cls):
        least, most, value = f.metadata["least"], f.metadata["most"], getattr(flags, f.name)
        if least is not None and not least <= value <= most:
            beyond = "" if value <= most else f" and at most {most:g}"
            raise BadInput(f"{args.command}: --{f.name.replace('_', '-')} {value}: must be at least {least}{beyond}")
    return flags


def build_parser():
    top = Parser(prog="girl.py", description="Generative job recommendation: SFT, reward model, PPO.",
                 epilog="The order of a run: data, sft, reward, reward --judge, ppo, evaluate, recommend; or all of it: train. "
                        "CUDA or MPS is used where there is one; GIRL_DEVICE=cpu in the environment keeps it on the CPU.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    for name, p in parsers.items():
        p.add_argument("--seed", type=number(int, 0), default=0, help="one seed gives one result on one machine (default 0)")
        if name not in ("generate", "score", "export"):
            sizes = p.add_mutually_exclusive_group()
            sizes.add_argument("--smoke", action="store_true", help="toy size: shows that it runs, not that it learns")
            sizes.add_argument("--quick", action="store_true", help="a smaller market and smaller models: learns in minutes"
                               + ("; the recommender is left out" if name == "train" else ""))
            if name in ("data", "ppo", "train"):
                sizes.add_argument("--demo", action="store_true", help="PPO alone, of small models that come with the project"
                                   + ("; makes RUN/ppo anew, and ends in a verdict" if name == "train" else ""))
        if name in (*STAGES, "evaluate", "recommend", "train"):
            p.add_argument("--run", "--out", default="runs/default", metavar="DIR", help="the run's folder (default %(default)s)")
            p.add_argument("--data", metavar="DIR", help="folder of train.jsonl, valid.jsonl, test.jsonl (default RUN/data)")
        if name in STAGES:
            add_flags(p, STAGES[name])
        if name in (*STAGES, "train"):
            p.add_argument("--save-seconds", type=number(float, 0), default=60.0, metavar="S", help="save the state, from which "
                           "the same command goes on after an interruption, after so many seconds; PPO saves it after every iteration "
                           "(default %(default)s)")
    parsers["data"].add_argument("--out", default="runs/default/data", metavar="DIR",
                                 help="where to write it (default %(default)s)")
    add_flags(parsers["data"], DataFlags)
    d = parsers["data"].add_argument_group("a table of your own", "a .csv, .tsv or .jsonl file; each row is a CV and a JD that "
                                           "go together")
    d.add_argument("--from", dest="source", metavar="FILE", help="make the data set of this table, not of the simulated market")
    for name, text in {"cv": "of the CVs", "jd": "of the JDs", "accepted": "that says yes or no",
                       "rejected-cv": "of CVs that were turned down for the JD",
                       "rejected-jd": "of JDs that were turned down for the CV"}.items():
        d.add_argument(f"--{name}", metavar="COLUMN", help=f"the column {text}")
    d.add_argument("--encoding", metavar="NAME", help="the file's encoding, as Python names it: "
                   "cp1252, gbk, shift_jis, ... (default: UTF-8, or what its first bytes say)")
    d.add_argument("--delimiter", metavar="C", help="what separates the cells: one character, "
                   "or tab (default: found by the header)")
    d.add_argument("--split-by", choices=("group", "cv"),
                   help="group: decisions that share a CV or a JD stay in one split; cv: CVs and "
                   "JDs are split separately, and decisions between two splits are dropped "
                   "(default group)")
    d.add_argument("--keep-contacts", action="store_true", help="leave e-mail addresses, phone numbers and links as they are")
    add_flags(parsers["train"], StartFlags)
    parsers["reward"].add_argument("--judge", action="store_true", help="train the independent judge instead, from half B")
    parsers["ppo"].add_argument("--plan", nargs="?", const="", metavar="DIR", help="only print the memory and the work of an "
                                "iteration, for the model of RUN/sft, or of any folder with a config.json")
    e, r = parsers["evaluate"], parsers["recommend"]
    for p in (e, r):
        p.add_argument("--split", choices=("valid", "test"), default="test",
                       help="tune on valid only; results.json holds one split at a time (default test)")
    e.add_argument("--cvs", type=number(int, 1), default=400, metavar="N", help="how many CVs of the split are used (default 400)")
    e.add_argument("--export-pairs", metavar="FILE", help="also write pairs of JDs with a question, for an outside judge (JSON "
                   "lines)")
    e.add_argument("--verdicts", metavar="FILE", help="only read an outside judge's answers into results.json, and print the table")
    r.add_argument("--full", action="store_true", help="the whole grid: more labels, settings, numbers of JDs (takes much "
                   "longer)")
    r.add_argument("--cv", metavar="FILE", help="find jobs for this CV instead (a text file, - for standard input)")
    r.add_argument("--pool", metavar="FILE", help='real JDs to choose from: lines like {"jd": "..."}')
    r.add_argument("--top", type=number(int, 1), default=5, metavar="N", help="how many jobs are shown (default 5)")
    add_flags(r, recommend.RecommendFlags)
    g, s, x = parsers["generate"], parsers["score"], parsers["export"]
    g.add_argument("--model", required=True, metavar="RUN/ppo", help="folder of a generator: RUN/ppo or RUN/sft")
    x.add_argument("--model", required=True, metavar="RUN/ppo", help="folder of a generator or of a reward model")
    x.add_argument("--out", required=True, metavar="DIR", help="where to write it")
    x.add_argument("--merge", action="store_true", help="add the adapters to the weights beside them")
    g.add_argument("--number", type=number(int, 1, 1000), default=1, metavar="N", help="how many JDs (default 1)")
    g.add_argument("--temperature", type=float, default=1.0, metavar="T", help="below 1: safer, above: bolder (default 1)")
    g.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that make up P "
                   "(default 1: all)")
    g.add_argument("--greedy", action="store_true", help="always the likeliest token")
    for p in (g, s):
        p.add_argument("--cv", required=True, metavar="FILE", help="text file with one CV, - for standard input")
        p.add_argument("--reward", required=p is s, metavar="RUN/reward", help="folder of a reward model")
    s.add_argument("--jd", required=True, metavar="FILE", help="text file with one JD")
    return top, parsers


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see  python {self.prog} --help")


def number(kind, least, most=1e9):
    """A type of argparse: an int or a float between `least` and `most`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what} of at least {least} and at most {most:g}")
        return value
    return convert


def parse(argv):
    """Arguments of a command. Where another recipe is asked for, they are parsed again with its values as defaults, so that
    what was set on the command line stays."""
    top, parsers = build_parser()
    args = top.parse_args(argv)
    for name in ("run", "data", "out", "source", "model", "reward", "cv", "jd", "pool", "verdicts",
                 "export_pairs", "encoding", "delimiter"):
        value = getattr(args, name, None)
        if value is not None and (not value or "\0" in value):
            flag_name = name.replace("_", "-").replace("source", "from")
            raise BadInput(f"{args.command}: --{flag_name} must name something, found {value!r}")
    other = recipe(args)
    parsers[args.command].set_defaults(**other)
    args = top.parse_args(argv)
    init = getattr(args, "init", "")
    began = args.command in ("reward", "ppo") and init_of(args.run)
    if args.command in PRETRAINED and (init or began or getattr(args, "plan", None)):
        adapters = args.lora_rank if init else (Path(args.run) / "sft" / "adapter_config.json").exists()
        parsers[args.command].set_defaults(**PRETRAINED[args.command] | (LORA[args.command] if adapters else {}) | other)
        args = top.parse_args(argv)
    return args


def one_line(error):
    """A file's name or a text may hold what would move the cursor or end the line; or be endless."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    return text if len(text) < 4000 else f"{text[:2000]} [...] {text[-2000:]}"


def no_more_output():
    """What could not be printed would be tried again at the exit, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop_once(*_):
    """Ctrl-C, SIGTERM, outside of a stage's steps: end, and be left alone while stages in other processes save."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv=None):
    before = {s: signal.signal(s, stop_once) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        args = parse(argv)
        device, code = pick_device(), 0
        if args.command == "data":
            make_data(args)
        elif args.command in STAGES:
            run_stage(args, device)
        else:
            code = {"generate": write_for, "score": score_one, "export": export, "evaluate": evaluate_run,
                    "recommend": recommend_run, "train": run_all}[args.command](args, device) or 0
        sys.stdout.flush()
        return code
    except BadInput as e:
        print(f"girl.py: {one_line(e)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        print(f"girl.py: out of memory ({one_line(e)}); delete what the stage has begun, and lower --batch, --groups or "
              "--minibatch, raise --accumulate, or use --checkpointing", file=sys.stderr)
        return 2
    except BrokenPipeError:             # who reads what is printed has seen enough
        no_more_output()
        return 1
    except OSError as e:                # what has a better remedy is caught where it happens
        if not e.filename:
            no_more_output()
        what = f"{e.filename}: {e.strerror}" if e.filename else f"cannot read or write ({e.strerror or e})"
        print(f"girl.py: {one_line(what)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("girl.py: interrupted; the same command begins, or goes on from what was saved", file=sys.stderr)
        return 130
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):       # closed ones, and those that cannot show every character
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.exit(main())
