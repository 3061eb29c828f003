"""GIRL, generative job recommendation: a language model reads a CV and generates a job description
(JD) that fits it.

    bash train.sh                                    everything, from an empty folder
    python girl.py COMMAND --help                    one stage, or one use, at a time

This file holds the command line: the flags and inputs of each command, the order of the stages, and
generation for a CV.
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

if __name__ == "__main__":              # Ctrl-C during the import of torch: end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# On Linux a torch thread that waits for another one spins. If other programs run too, it takes CPU
# time that the other thread needs. With at most 5,000 spins a step of stage 1 took 0.28 s instead
# of 0.63 s at a load of 3 (one measurement). On an idle machine three measurements showed no
# difference.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

import dpo
import market
import ppo
import reward
import sft
from data import load_codec, read_half, read_records
from measure import demo, evaluate, recommend, trace
from model import LINEAR, LanguageModel, RewardModel, generate, is_target, merge_lora
from plumbing import table
from plumbing.files import (BadInput, checksum, checksums, locked, read_json, sha256, with_checksum,
                            write_json)
from plumbing.inputs import (BEFORE, DATA, check_rules, code_of, init_of, inputs_of, models_before,
                             need)
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
    jobs: int = flag(60000, "jobs posted in each split")
    applications: int = flag(6, "jobs that each job seeker applies for, roughly", least=4)
    fields: int = flag(8, "fields of work: the first ones in market.OCCUPATIONS",
                       least=2, most=len(market.OCCUPATIONS))
    prejudice: float = flag(0.0, "half of the people have a gap in their CV, and the recruiter "
                                 "turns this share of their acceptances into rejections", most=1)
    no_overqualified: bool = flag(False, "no decisions on overqualified people in train")


# ------------------------------------------------------------------------------------ uses of a run
def read_text(path):
    """The text of a file, or of standard input for "-". It still holds its contacts: whether they
    are removed depends on the model, see as_trained."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = normalize(raw.decode("utf-8"), False)
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 text (byte {e.start}); save the file as UTF-8")
    except (OSError, ValueError, AttributeError) as e:      # the last two: standard input is closed
        reason = getattr(e, "strerror", None) or "cannot be read"
        raise BadInput(f"{path}: {reason}; give a text file, or - for standard input")
    if is_utf16(raw):
        raise BadInput(f"{path}: every other byte is 0, as in UTF-16; save the file as UTF-8")
    if not text:
        raise BadInput(f"{path}: empty; put the text of one CV or JD into it")
    return text


def as_trained(text, model):
    """The text in the form of this model's training data: with or without contacts."""
    return normalize(text, not model.config.keep_contacts)


def write_for(args, device):
    """`generate`: JDs for one CV; if a reward model is given, the best score first."""
    temperature = 0.0 if args.greedy else args.temperature
    if not ((temperature == 0 or 0.01 <= temperature <= 100) and 0 < args.top_p <= 1):
        raise BadInput(f"generate: --temperature {temperature} must be 0 or from 0.01 to 100, "
                       f"--top-p {args.top_p} above 0 and at most 1")
    cv = read_text(args.cv)
    model = load_model(args.model, LanguageModel, device).eval()
    codec = load_codec(args.model, model.config)
    prompts = [codec.prompt(as_trained(cv, model))] * args.number
    with torch.no_grad(), autocast(device):
        jds = generate(model, prompts, codec.max_jd, temperature, args.top_p,
                       generator(args.seed, "generate", device=device))
    texts = shown = [codec.text(jd) for jd in jds]
    report_truncated(args, codec)
    if args.reward:
        reward_model = load_model(args.reward, RewardModel, device).eval()
        reward_codec = load_codec(args.reward, reward_model.config)
        pairs = [(as_trained(cv, reward_model), as_trained(text, reward_model)) for text in texts]
        scores = reward.score_texts(reward_model, reward_codec, pairs)
        best_first = sorted(zip(scores, texts), key=lambda pair: -pair[0])
        texts = [text for _, text in best_first]
        shown = [f"[{score:+.3f}]\n{text}" for score, text in best_first]
    print("\n\n".join(shown), flush=True)
    print_true_match(cv, texts)
    if unfinished := sum(jd[-1] != codec.eos for jd in jds):
        print(f"{unfinished} of {len(jds)} JDs did not end within {codec.max_jd} tokens",
              file=sys.stderr)


def score_one(args, device):
    model = load_model(args.reward, RewardModel, device).eval()
    codec = load_codec(args.reward, model.config)
    cv, jd = (as_trained(read_text(path), model) for path in (args.cv, args.jd))
    print(f"{reward.score_texts(model, codec, [(cv, jd)])[0]:.4f}")
    print_true_match(cv, [jd])
    report_truncated(args, codec)


def print_true_match(cv, jds):
    """Say what JDs for a CV of the simulated market are truly worth. (On standard error: a script
    may read the JDs, or the score.)"""
    if market.parse_cv(cv):
        print("true match: " + ", ".join(f"{market.true_match(cv, jd):.3f}" for jd in jds),
              file=sys.stderr)


def report_truncated(args, codec):
    if codec.cut_cvs:
        print(f"{args.cv}: the CV was truncated to {codec.max_cv} tokens", file=sys.stderr)
    if codec.cut_jds:
        print(f"{args.jd}: the JD was truncated to {codec.max_jd} tokens", file=sys.stderr)


def export(args, device):
    """`export`: write a generator or a reward model into a folder of its own."""
    model_files = ("config.json", "girl.json", "adapter_config.json", "model.safetensors",
                   "adapter_model.safetensors", "tokenizer.json")
    if existing := [name for name in model_files if (Path(args.out) / name).exists()]:
        raise BadInput(f"{args.out}: holds a model already ({existing[0]}); choose another --out")
    model = load_model(args.model, RewardModel if is_reward(Path(args.model)) else LanguageModel)
    codec = load_codec(args.model, model.config)
    if args.merge:
        merge_lora(model)
    model.config.pad_token_id = codec.pad
    save_model(args.out, model)
    template = save_tokenizer(args.out, codec)
    lora = model.model.lora
    kind = f"adapters on {lora.base_model_name_or_path}" if lora else "plain weights"
    print(f"{args.out}: {type(model).__name__}, {kind}")
    if not template:
        print(f"{args.out}: no chat template; this tokenizer cannot reproduce the prompt from "
              "text, so give other tools token ids")


# ----------------------------------------------------------------------------------------- commands
def data_asked(args):
    """The seed and the flags of a data set, but not those for a table."""
    return {"seed": args.seed, **vars(from_args(DataFlags, args))}


def make_data(args):
    flags = from_args(DataFlags, args)
    with locked(args.out):
        write_data(args, flags, time.time())


TABLE_FLAGS = ("encoding", "delimiter", "split_by", "keep_contacts")


def write_data(args, flags, start):
    roles = ("cv", "jd", "accepted", "rejected_cv", "rejected_jd")
    columns = {role: getattr(args, role) for role in roles if getattr(args, role)}
    if args.source:
        if not {"cv", "jd"} <= set(columns) or len(columns) > 3:
            raise BadInput("data: --from needs --cv and --jd, and at most one of --accepted, "
                           "--rejected-cv, --rejected-jd")
        if len(set(columns.values())) < len(columns):
            raise BadInput("data: --cv, --jd and the others must name different columns")
        if args.encoding:
            table.check_encoding(args.encoding)
        if args.delimiter:
            args.delimiter = table.check_delimiter(args.delimiter)
        if os.path.dirname(os.path.realpath(args.source)) == os.path.realpath(args.out):
            raise BadInput(f"{args.source}: lies in the folder that would be overwritten; choose "
                           "another --out")
        table.import_table(args.source, args.out, columns, args.keep_contacts, args.seed,
                           args.encoding, args.delimiter, args.split_by or "group")
    elif columns:
        flag_name = next(iter(columns)).replace("_", "-")
        raise BadInput(f"data: --{flag_name} names a column of a table; give the table with "
                       "--from FILE")
    elif table_flags := [name for name in TABLE_FLAGS if getattr(args, name)]:
        flag_name = table_flags[0].replace("_", "-")
        raise BadInput(f"data: --{flag_name} says how a table is read; give the table with "
                       "--from FILE")
    else:
        market.write_market(args.out, flags.people, flags.held_out, flags.jobs, flags.applications,
                            args.seed, flags.fields, flags.prejudice, flags.no_overqualified)
    write_json(Path(args.out) / "summary.json", with_checksum({
        "started": round(start, 1), "seconds": round(time.time() - start, 1),
        "peak_rss_mb": peak_rss_mb(), "asked": data_asked(args), "inputs": {},
        "sha256": checksums(files_of(args.out))}))


def folders(args):
    """The run's folder, its data's folder, and, if the data are simulated, the market's module."""
    run = Path(args.run)
    folder = Path(args.data or run / "data")
    return run, folder, market if (folder / "market.json").exists() else None


def run_stage(args, device):
    """Run sft, reward, judge, ppo or dpo, unless this stage is finished."""
    name = "judge" if getattr(args, "judge", False) else args.command
    run, folder, the_market = folders(args)
    if getattr(args, "plan", None) is not None:
        return show_plan(args, run)
    flags = from_args(STAGES[args.command], args)
    if getattr(flags, "lora_rank", 0) and not flags.init:
        raise BadInput(f"{args.command}: --lora-rank needs --init; adapters need pretrained "
                       "weights, so give both flags or neither")
    for split in SPLITS:
        if not (folder / f"{split}.jsonl").is_file():
            raise BadInput(f"{folder / split}.jsonl: no such file; make a data set with  "
                           f"python girl.py data --out {folder}")
    asked = {"seed": args.seed, **vars(flags)}
    asked.pop("keep", None)                     # it changes no result
    inputs = inputs_of(run, folder, name, getattr(flags, "init", ""))
    # PPO's iterations are few and long: it saves after each one.
    with Stage(run, name, 0 if name == "ppo" else args.save_seconds) as stage:
        if stage.begin(asked, inputs, code_of(name)):
            note_config(run, name, {"data": str(folder), **asked})
            if name == "ppo":
                truth = the_market and the_market.true_match
                ppo.run(stage, run, folder, flags, args.seed, device, truth)
            else:
                module = {"sft": sft, "dpo": dpo}.get(name, reward)
                module.run(stage, run, folder, flags, args.seed, device)


def show_plan(args, run):
    """`ppo --plan`: memory and work of an iteration. Only the model's configuration is read."""
    folder = Path(args.plan or need(run, "sft"))
    config, raw = read_config(folder)
    if "max_cv_tokens" not in raw:              # a pretrained model that no stage has used yet
        config = replace(config, max_cv_tokens=sft.SFTFlags.max_cv,
                         max_jd_tokens=sft.SFTFlags.max_jd)
    rank, targets = 16, StartFlags.lora_targets.split(",")
    if lora := read_lora(folder):
        rank, targets = lora.r, lora.target_modules
    adapted = []            # layers with an adapter in some block: counted as if in all blocks
    for part, names in LINEAR.items():
        for name in names:
            layers = [f"model.layers.{i}.{part}.{name}" for i in range(config.num_hidden_layers)]
            if any(is_target(layer, targets) for layer in layers):
                adapted.append(name)
    print_plan(config, from_args(ppo.PPOFlags, args), rank, adapted)


def note_config(run, stage, flags):
    """Note a stage's flags in the run's config.json. Locked, because reward model and judge start
    together."""
    path = run / "config.json"
    with locked(run, wait=True):
        config = read_json(path, "delete it, nothing depends on it") if path.exists() else {}
        write_json(path, dict(sorted((config | {stage: flags}).items())))


def run_all(args, device):
    """`train`: every stage of a run, then the measurements. bash train.sh calls it."""
    run, size = Path(args.run), size_of(args)
    common = ["--seed", str(args.seed)] + ([f"--{size}"] if size else [])
    if args.demo:
        return run_demo(args, run, common, device)
    start_flags = []
    for f in fields(StartFlags):
        if value := getattr(args, f.name):
            start_flags += flag_words(f, value)
    check_rules(Path(args.data or run / "data"))        # before the stages' own processes do
    if args.data is None:
        args.data = make_own_data(run, common, device)
    common += ["--run", args.run, "--data", args.data]
    save = ["--save-seconds", str(args.save_seconds)]
    later = common + save + (["--checkpointing"] if args.checkpointing else [])
    run_apart(run, {"sft": ["sft"] + common + save + start_flags}, device)
    run_apart(run, {"reward": ["reward"] + later, "judge": ["reward", "--judge"] + later}, device)
    run_stage(parse(["ppo"] + later), device)
    evaluation = parse(["evaluate"] + common)
    # Remove results of other models: the recommender's would be added to them.
    with locked(run, wait=True):
        evaluate.forget_others(run, {"seed": evaluation.seed, "split": evaluation.split,
                                     "measured": measured_checksums(evaluation)})
    measures = [name for name in evaluate.MEASURES if not (args.quick and name == "recommend")]
    run_apart(run, {name: [name] + common for name in measures}, device)
    run_apart(run, {"report": ["report", "--run", args.run, "--data", args.data]}, device)
    if args.smoke:
        print("\nThis was a toy run: it shows that every stage runs, not that anything was "
              "learned. Its figures mean nothing; those of bash train.sh do.")


def make_own_data(run, common, device):
    """Make the data set of this run, unless it is there already; returns its folder."""
    folder = str(run / "data")
    command = ["data", "--out", folder] + common
    if finished(run, "data"):
        check_same(run / "data", "made", read_summary(run / "data"), data_asked(parse(command)), {})
    elif all((run / "data" / f"{split}.jsonl").exists() for split in SPLITS):
        print(f"data: {folder} has no summary.json to check its files against; "
              "they are used as they are")
    else:
        run_apart(run, {"data": command}, device)
    return folder


def run_demo(args, run, common, device):
    """`train --demo`: PPO on the models that come with the project, and a verdict on it. Returns
    the exit code."""
    if args.data or args.init:
        raise BadInput("train: --demo has its own models and data; leave out --data and --init")
    make_own_data(run, common, device)
    demo.put_models(run)
    save = ["--save-seconds", str(args.save_seconds)]
    run_stage(parse(["ppo", "--run", str(run), *save, *common]), device)
    return 0 if demo.judge(run) else 1


def flag_words(f, value):
    """A field and its value as words of a command line."""
    name = "--" + f.name.replace("_", "-")
    return [name] if value is True else [name, str(value)]


def run_apart(run, commands, device):
    """Run stages or measurements that do not need each other, each in its own process.

    A process frees its memory when it ends. The processes share the threads: for small models two
    processes with one thread each are faster than one process with two."""
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // len(commands)))}
    children = []
    try:
        for name, command in commands.items():
            if not is_done(run, name, command, device):
                argv = [sys.executable, str(Path(__file__).resolve()), *command]
                children.append(subprocess.Popen(argv, env=env))
        codes = [child.wait() for child in children]
    finally:
        for child in children:              # some still run only after an interrupt
            child.terminate()
        for child in children:
            child.wait()
    names = " or ".join(commands)
    if min(codes, default=0) < 0:
        raise BadInput(f"{run}: {names} was killed (signal {-min(codes)}); out of memory? Run the "
                       "same command again to resume")
    if any(codes):
        raise BadInput(f"{run}: {names} failed; see the error above")


def is_done(run, name, command, device):
    """Is this stage, measurement or report finished? Says so of the first two. Refuses a stage that
    was finished with other flags."""
    if name in evaluate.MEASURES:
        return is_measured(run, parse(command))
    if name == "report":
        page, results = run / "report.html", run / "results.json"
        return (page.exists() and results.exists()
                and page.stat().st_mtime > results.stat().st_mtime)
    if finished(run, name):
        run_stage(parse(command), device)
    return finished(run, name)


def measured_checksums(args):
    """Checksums of the models, of the data, of all flags and inputs of `evaluate` or `recommend`,
    and of its code. (Not of --full, which adds measurements but changes none.)"""
    run, folder, _ = folders(args)
    without_effect = ("run", "data", "export_pairs", "verdicts", "full")
    flags = {name: value for name, value in vars(args).items() if name not in without_effect}
    inputs = inputs_of(run, folder, args.command)
    inputs["split"] = sha256(folder / f"{args.split}.jsonl")
    return {"models": checksum(models_before(run, "evaluate")),
            "data": checksum({file: inputs[file] for file in (*DATA, "split") if file in inputs}),
            args.command: checksum(flags | inputs),
            f"{args.command} code": code_of(args.command)}


def is_measured(run, args):
    """Does results.json hold this measurement, for these models and flags? Says so if it does, and
    which code changed since."""
    try:
        noted, now = evaluate.read_results(run)["measured"], measured_checksums(args)
    except BadInput:                    # missing or damaged: measure again
        return False
    code = now.pop(f"{args.command} code")
    del now["data"]     # an earlier version did not note it; the inputs hold it anyway
    if not noted.items() >= now.items():
        return False
    print(f"{args.command}: finished already, see {run / 'results.json'}")
    if changed := [name for name, *_ in differences(noted.get(f"{args.command} code", code), code)]:
        size = size_of(args)
        more = f" --{size}" if size else ""
        more += f" --seed {args.seed}" if args.seed else ""
        more += f" --data {args.data}" if args.data else ""
        print(f"{args.command}: {', '.join(changed)} changed since; to measure again:  "
              f"python girl.py {args.command} --run {run}{more}")
    sys.stdout.flush()
    return True


def evaluate_run(args, device):
    run, folder, truth = folders(args)
    if args.verdicts:
        evaluate.read_results(run)          # refuses if there is no run to lock
        with locked(run / "evaluate"):
            return evaluate.add_verdicts(run, args.verdicts)
    if args.export_pairs and Path(args.export_pairs).exists():
        raise BadInput(f"{args.export_pairs}: exists already; choose another file")
    measured = measured_checksums(args)
    with locked(run / "evaluate"):
        evaluate.evaluate(run, folder, args.split, args.cvs, args.seed, device, truth, init_of(run),
                          args.export_pairs, measured)


def show_run(args, _):
    evaluate.show_answers(Path(args.run), args.number)


def trace_run(args, device):
    """`trace`: PPO under the lens, token by token."""
    run, folder, the_market = folders(args)
    replay, cv = trace.Replay(run, folder, device, the_market and the_market.true_match), None
    if args.cv:
        cv = as_trained(read_text(args.cv), replay.policy)
        if the_market and not the_market.parse_cv(cv):
            replay.true_match = None
    iteration = args.iteration or replay.kept[0]
    trace.show(replay.trace(iteration, args.episode, cv), cv)
    if cv in replay.codec.cut_cvs:
        print(f"{args.cv}: the CV was truncated to {replay.codec.max_cv} tokens", file=sys.stderr)


def report_run(args, device):
    """`report`: one HTML file about one run, or several."""
    try:
        from measure.report import write_picture, write_report      # here: they import matplotlib
    except ImportError as e:
        raise BadInput(f"report: {e.name} is not installed; run  pip install -r requirements.txt")
    args.run, runs = args.run[0], list(map(Path, args.run))
    run, folder, the_market = folders(args)
    path = Path(args.picture or args.file or run / "report.html")
    if path.suffix != (".svg" if args.picture else ".html") or path.is_dir():
        raise BadInput(f"{path}: must be the name of an .html file, or with --picture of an .svg "
                       "file")
    if args.picture:
        return write_picture(runs[0], path)
    write_report(runs, folder, path, device, the_market and the_market.true_match)


def exercise(args, _):
    from learn.copies import make_exercises         # here: no other command needs it
    make_exercises(args.folder)


def bughunt(args, _):
    from learn.bughunt import make_case             # here: no other command needs it
    make_case(args.folder, args.case)


def recommend_run(args, device):
    """`recommend`: find jobs of a pool for one CV, or measure how much the generated JDs help."""
    run, folder, truth = folders(args)
    if bool(args.cv) != bool(args.pool):
        raise BadInput("recommend: --cv and --pool belong together; give both, to find jobs of the "
                       "pool for the CV")
    for stage in BEFORE["recommend"]:
        need(run, stage)
    models, train = recommend.load_run(run, device, args.seed), read_records(folder / "train.jsonl")
    if args.cv:
        cv = as_trained(read_text(args.cv), models.girl)
        pool = recommend.read_pool(args.pool, not models.girl.config.keep_contacts)
        recommend.find_jobs(models, cv, pool, args.top, train, truth)
        if cv in models.codec.cut_cvs:
            print(f"{args.cv}: the CV was truncated to {models.codec.max_cv} tokens",
                  file=sys.stderr)
    else:
        flags, measured = from_args(recommend.RecommendFlags, args), measured_checksums(args)
        labels, held_out = read_half(folder, "B"), read_records(folder / f"{args.split}.jsonl")
        recommend.measure(run, folder, models, train, labels, held_out, args.split, flags,
                          args.full, truth, measured)


# --------------------------------------------------------------------------------- the command line
STAGES = {"sft": sft.SFTFlags, "reward": reward.RewardFlags, "ppo": ppo.PPOFlags,
          "dpo": dpo.DPOFlags}
# Runs of other sizes, each in its own folder runs/NAME, and the defaults that they change.
# smoke: every stage at toy size, to see that all of it runs. quick: a smaller market and smaller
# models, for a classroom. demo: only PPO, on the quick models that come with the project (see
# measure/demo.py), and with the beta that its stored healthy runs had.
SIZES = {
    "smoke": {
        "data": {"people": 300, "held_out": 60, "jobs": 600},
        "sft": {"epochs": 1, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 4, "vocab": 600,
                "save_seconds": 2.0},
        "reward": {"steps": 20, "samples": 32, "save_seconds": 2.0},
        "ppo": {"iterations": 3, "episodes": 16, "minibatch": 8, "save_seconds": 2.0},
        "dpo": {"steps": 10, "save_seconds": 2.0},
        "evaluate": {"cvs": 24},
        "recommend": {"people": 40, "seeds": 2, "steps": 20, "cvs": 10},
        "train": {"save_seconds": 2.0}},
    "quick": {
        "data": {"people": 24000, "held_out": 400, "jobs": 12000, "fields": 2},
        "sft": {"epochs": 2, "hidden": 64, "layers": 3, "heads": 2, "kv_heads": 2,
                "vocab": 1024},
        "reward": {"steps": 850},
        "ppo": {"iterations": 28, "episodes": 128, "lr": 8e-4, "kl_coef": 0.1, "keep": 3},
        "evaluate": {"cvs": 200}},
    "demo": {
        "data": {"people": 600, "held_out": 50, "jobs": 2000, "fields": 2},
        "ppo": {"iterations": 12, "episodes": 128, "minibatch": 32, "lr": 4e-4,
                "kl_coef": 0.05}},
}
# Defaults that change if a run begins with a pretrained model. It can read and write already, so it
# needs small steps, and none of the aids that teach a small model to copy. Adapters need larger
# steps than the weights themselves. These are usual values. Only those of LORA were tried, in one
# run of a model with 135M parameters (without dpo).
PRETRAINED = {
    "sft": {"epochs": 2, "batch": 8, "accumulate": 4, "lr": 2e-5, "matrix_lr": 0.0, "warmup": 10,
            "reading": 0.0},
    "reward": {"steps": 120, "accumulate": 4, "lr": 2e-5, "matrix_lr": 0.0, "warmup": 10,
               "reading": 0.0, "samples": 32},
    "ppo": {"iterations": 20, "episodes": 32, "minibatch": 16, "accumulate": 4, "lr": 1e-5,
            "keep": 0},                         # a state of all weights takes 12 bytes for each
    "dpo": {"steps": 400, "pairs": 4, "lr": 1e-6}}
LORA = {"sft": {"lr": 4e-4}, "reward": {"lr": 4e-4}, "ppo": {"lr": 1e-4, "keep": 5},
        "dpo": {"lr": 2e-5}}
HELP = {
    "data": "make a data set: of the simulated job market, or of a table of your own CVs and JDs",
    "sft": "stage 1: learn to generate JDs from accepted pairs of a CV and a JD",
    "reward": "stage 2: learn to judge as the recruiter does",
    "ppo": "stage 3: learn to generate JDs that the reward model scores high",
    "dpo": "instead of stages 2 and 3: learn from the decisions themselves, without a reward "
           "model; not part of train",
    "trace": "do a kept iteration of PPO again, and show one of its texts token by token: KL, "
             "reward, value, advantage, ratio",
    "report": "write an HTML page about one run or several: texts, curves, tables, the trace",
    "show": "print a held-out CV and everything that was written for it",
    "generate": "generate JDs for a CV",
    "score": "score one JD for one CV",
    "exercise": "copy the project into a folder, without the functions that you then write",
    "bughunt": "copy the project into a folder, with one planted fault to find",
    "export": "write a generator or a reward model into a folder of its own, with --merge as plain "
              "weights",
    "evaluate": "measure a run on held-out CVs, write results.json",
    "recommend": "measure how much the generated JDs help a recommender, and how well they find "
                 "posted jobs; or find jobs for one CV",
    "train": "all stages, the evaluation, the recommender and the report"}


def size_of(args):
    """The name of the size that was asked for, or ""."""
    return next((size for size in SIZES if getattr(args, size, False)), "")


def recipe(args):
    """{flag: default} of the size that was asked for; empty for the usual size."""
    if not (size := size_of(args)):
        return {}
    folder = {"out": f"runs/{size}/data"} if args.command == "data" else {"run": f"runs/{size}"}
    return folder | SIZES[size].get(args.command, {})


def add_flags(parser, cls):
    """A flag for each field of the dataclass `cls`."""
    for f in fields(cls):
        name, switch = "--" + f.name.replace("_", "-"), isinstance(f.default, bool)
        how = {"type": type(f.default), "metavar": f.name[0].upper()}
        if f.metadata["choices"]:
            how = {"choices": f.metadata["choices"]}
        if switch:
            how = {"action": "store_true"}
        shown = "off" if switch else "%(default)s" if f.default != "" else "none"
        text = f"{f.metadata['help']} (default {shown})"
        parser.add_argument(name, default=f.default, help=text, **how)


def from_args(cls, args):
    """The dataclass `cls` with the values of its flags. Refuses values out of range."""
    flags = cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
    for f in fields(cls):
        least, most, value = f.metadata["least"], f.metadata["most"], getattr(flags, f.name)
        if least is not None and not least <= value <= most:
            name = f.name.replace("_", "-")
            limit = "" if value <= most else f" and at most {most:g}"
            raise BadInput(f"{args.command}: --{name} {value}: must be at least {least}{limit}")
    return flags


def build_parser():
    """(the parser of the command line, {command: its own parser})"""
    top = Parser(prog="girl.py",
                 description="Generative job recommendation: SFT, reward model, PPO.",
                 epilog="The order of a run: data, sft, reward, reward --judge, ppo, evaluate, "
                        "recommend, report; or all of it: train. dpo comes after sft. CUDA or MPS "
                        "is used if available; set GIRL_DEVICE=cpu in the environment to stay on "
                        "the CPU.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {}
    for name, text in HELP.items():
        parsers[name] = commands.add_parser(name, help=text, description=text)
        add_common_flags(parsers[name], name)
    add_data_flags(parsers["data"])
    add_stage_flags(parsers)
    add_evaluate_flags(parsers["evaluate"])
    add_recommend_flags(parsers["recommend"])
    add_trace_flags(parsers["trace"])
    add_report_flags(parsers["report"])
    parsers["show"].add_argument("--cv", type=number(int, 0), default=0, metavar="N",
                                 dest="number", help="which CV, counted from 0 (default 0)")
    for name in ("exercise", "bughunt"):
        parsers[name].add_argument("folder", metavar="DIR", help="a folder that does not exist yet")
    parsers["bughunt"].add_argument("--case", type=number(int, 1), metavar="K",
                                    help="which fault, counted from 1 (default: a random one)")
    add_generate_flags(parsers["generate"])
    add_score_flags(parsers["score"])
    add_export_flags(parsers["export"])
    return top, parsers


def add_common_flags(parser, name):
    """The flags that the command `name` shares with others."""
    look = ("trace", "show", "report", "exercise", "bughunt")
    if name not in look:
        parser.add_argument("--seed", type=number(int, 0), default=0,
                            help="the same seed gives the same result on the same machine "
                                 "(default 0)")
    if name not in ("generate", "score", "export", *look):
        add_size_flags(parser, name)
    if name in (*STAGES, "evaluate", "recommend", "train", "trace", "show"):
        parser.add_argument("--run", "--out", default="runs/default", metavar="DIR",
                            help="the run's folder (default %(default)s)")
        parser.add_argument("--data", metavar="DIR",
                            help="folder of train.jsonl, valid.jsonl, test.jsonl "
                                 "(default RUN/data)")
    if name in STAGES:
        add_flags(parser, STAGES[name])
    if name in (*STAGES, "train"):
        parser.add_argument("--save-seconds", type=number(float, 0), default=60.0, metavar="S",
                            help="seconds between saves of the state from which the same command "
                                 "resumes after an interruption; PPO saves it after every "
                                 "iteration (default %(default)s)")


def add_size_flags(parser, name):
    """--smoke, --quick and --demo: at most one of them."""
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--smoke", action="store_true",
                       help="toy size: shows that it runs, not that it learns")
    without = "; the recommender is left out" if name == "train" else ""
    sizes.add_argument("--quick", action="store_true",
                       help=f"a smaller market and smaller models: learns in minutes{without}")
    if name in ("data", "ppo", "train"):
        verdict = "; runs RUN/ppo anew, and ends with a verdict" if name == "train" else ""
        sizes.add_argument("--demo", action="store_true",
                           help=f"only PPO, on small models that come with the project{verdict}")


def add_data_flags(parser):
    parser.add_argument("--out", default="runs/default/data", metavar="DIR",
                        help="where to write it (default %(default)s)")
    add_flags(parser, DataFlags)
    own = parser.add_argument_group(
        "a table of your own", "a .csv, .tsv or .jsonl file; each row holds a CV and a JD that "
        "belong together")
    own.add_argument("--from", dest="source", metavar="FILE",
                     help="make the data set from this table, not from the simulated market")
    for name, text in {"cv": "of the CVs", "jd": "of the JDs", "accepted": "that says yes or no",
                       "rejected-cv": "of CVs that were rejected for the JD",
                       "rejected-jd": "of JDs that were rejected for the CV"}.items():
        own.add_argument(f"--{name}", metavar="COLUMN", help=f"the column {text}")
    own.add_argument("--encoding", metavar="NAME",
                     help="the file's encoding, as Python names it: cp1252, gbk, shift_jis, ... "
                          "(default: UTF-8, unless its first bytes say otherwise)")
    own.add_argument("--delimiter", metavar="C",
                     help="the character between two cells, or the word tab (default: detected "
                          "from the header)")
    own.add_argument("--split-by", choices=("group", "cv"),
                     help="group: decisions that share a CV or a JD stay in one split; cv: CVs and "
                          "JDs are split separately, and decisions between two splits are dropped "
                          "(default group)")
    own.add_argument("--keep-contacts", action="store_true",
                     help="leave e-mail addresses, phone numbers and links as they are")


def add_stage_flags(parsers):
    """The pretrained model's flags for `train`, --judge for `reward`, --plan for `ppo`."""
    add_flags(parsers["train"], StartFlags)
    parsers["reward"].add_argument(
        "--judge", action="store_true", help="train the independent judge instead, on half B")
    parsers["ppo"].add_argument(
        "--plan", nargs="?", const="", metavar="DIR",
        help="only print the memory and the work of an iteration, for the model in RUN/sft, or in "
             "any folder with a config.json")


def add_split_flag(parser):
    parser.add_argument("--split", choices=("valid", "test"), default="test",
                        help="tune on valid only; results.json holds one split at a time "
                             "(default test)")


def add_evaluate_flags(parser):
    add_split_flag(parser)
    parser.add_argument("--cvs", type=number(int, 1), default=400, metavar="N",
                        help="how many CVs of the split are used (default 400)")
    parser.add_argument("--export-pairs", metavar="FILE",
                        help="also write pairs of JDs with a question, for an outside judge "
                             "(JSON lines)")
    parser.add_argument("--verdicts", metavar="FILE",
                        help="only read an outside judge's answers into results.json, and print "
                             "the table")


def add_recommend_flags(parser):
    add_split_flag(parser)
    parser.add_argument("--full", action="store_true",
                        help="the whole grid: more labels, settings, numbers of JDs (takes much "
                             "longer)")
    parser.add_argument("--cv", metavar="FILE",
                        help="find jobs for this CV instead (a text file, - for standard input)")
    parser.add_argument("--pool", metavar="FILE",
                        help='posted JDs to choose from: lines like {"jd": "..."}')
    parser.add_argument("--top", type=number(int, 1), default=5, metavar="N",
                        help="how many jobs are shown (default 5)")
    add_flags(parser, recommend.RecommendFlags)


def add_trace_flags(parser):
    parser.add_argument("--iteration", type=number(int, 1), metavar="N",
                        help="a kept iteration, counted from 1 (default: the first that was kept)")
    parser.add_argument("--episode", type=number(int, 0), default=0, metavar="K",
                        help="which text of its rollout, counted from 0 (default 0)")
    parser.add_argument("--cv", metavar="FILE",
                        help="a text file, - for standard input, whose CV takes the place of the "
                             "episode's")


def add_report_flags(parser):
    parser.add_argument("--run", nargs="+", default=["runs/default"], metavar="RUN",
                        help="the folders of one or several runs (default runs/default)")
    parser.add_argument("--data", metavar="DIR",
                        help="folder of the first run's data (default RUN/data)")
    parser.add_argument("--file", metavar="FILE",
                        help="where to write it (default RUN/report.html, of the first run)")
    parser.add_argument("--picture", metavar="FILE.svg",
                        help="only draw one picture of the first run")


def add_generate_flags(parser):
    parser.add_argument("--model", required=True, metavar="RUN/ppo",
                        help="folder of a generator: RUN/ppo or RUN/sft")
    parser.add_argument("--number", type=number(int, 1, 1000), default=1, metavar="N",
                        help="how many JDs (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="below 1: safer; above 1: bolder (default 1)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample from the most likely tokens, which together have probability "
                             "P (default 1: all)")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    add_cv_and_reward(parser, reward_required=False)


def add_score_flags(parser):
    add_cv_and_reward(parser, reward_required=True)
    parser.add_argument("--jd", required=True, metavar="FILE", help="text file with one JD")


def add_cv_and_reward(parser, reward_required):
    parser.add_argument("--cv", required=True, metavar="FILE",
                        help="text file with one CV, - for standard input")
    parser.add_argument("--reward", required=reward_required, metavar="RUN/reward",
                        help="folder of a reward model")


def add_export_flags(parser):
    parser.add_argument("--model", required=True, metavar="RUN/ppo",
                        help="folder of a generator or of a reward model")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write it")
    parser.add_argument("--merge", action="store_true",
                        help="add the adapters to the base weights")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see  python {self.prog} --help")


def number(kind, least, most=1e9):
    """A type for argparse: an int or a float between `least` and `most`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {expected} of at least {least} "
                                             f"and at most {most:g}")
        return value
    return convert


def parse(argv):
    """The arguments of a command. A size or a pretrained model changes defaults: then the command
    line is parsed again with the new defaults, so that its own values stay."""
    top, parsers = build_parser()
    args = top.parse_args(argv)
    for name in ("run", "data", "out", "source", "model", "reward", "cv", "jd", "pool", "verdicts",
                 "export_pairs", "encoding", "delimiter", "file", "picture", "folder"):
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and (not value or "\0" in value):
                flag_name = name.replace("_", "-").replace("source", "from")
                raise BadInput(f"{args.command}: --{flag_name} must name something, found "
                               f"{value!r}")
    of_size = recipe(args)
    parsers[args.command].set_defaults(**of_size)
    args = top.parse_args(argv)
    init = getattr(args, "init", "")
    base = args.command in ("reward", "ppo", "dpo") and init_of(args.run)
    if args.command in PRETRAINED and (init or base or getattr(args, "plan", None)):
        has_adapters = (args.lora_rank if init
                        else (Path(args.run) / "sft" / "adapter_config.json").exists())
        of_lora = LORA[args.command] if has_adapters else {}
        parsers[args.command].set_defaults(**PRETRAINED[args.command] | of_lora | of_size)
        args = top.parse_args(argv)
    return args


def one_line(error):
    """An error as one printable line. File names and texts in it may hold control characters, or be
    very long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    return text if len(text) < 4000 else f"{text[:2000]} [...] {text[-2000:]}"


def no_more_output():
    """Discard what could not be printed: at exit Python would try again, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop_once(*_):
    """Ctrl-C or SIGTERM outside of a stage's steps: end, and ignore further signals while stages in
    other processes save."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_command(args):
    """Run the command that was asked for; returns the exit code."""
    device = pick_device()
    if args.command == "data":
        make_data(args)
        return 0
    if args.command in STAGES:
        run_stage(args, device)
        return 0
    command = {"generate": write_for, "score": score_one, "export": export,
               "evaluate": evaluate_run, "recommend": recommend_run, "train": run_all,
               "report": report_run, "trace": trace_run, "show": show_run,
               "exercise": exercise, "bughunt": bughunt}[args.command]
    return command(args, device) or 0


def main(argv=None):
    """Parse and run; every expected error becomes one line and an exit code."""
    old_handlers = {signum: signal.signal(signum, stop_once)
                    for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        exit_code = run_command(parse(argv))
        sys.stdout.flush()
        return exit_code
    except BadInput as e:
        print(f"girl.py: {one_line(e)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        if (not isinstance(e, (MemoryError, torch.OutOfMemoryError))
                and "DefaultCPUAllocator" not in str(e)):
            raise
        print(f"girl.py: out of memory ({one_line(e)}); delete the unfinished stage's folder, and "
              "lower --batch, --groups, --minibatch or --pairs, raise --accumulate, or use "
              "--checkpointing", file=sys.stderr)
        return 2
    except BrokenPipeError:             # the reader of our output has closed it
        no_more_output()
        return 1
    except OSError as e:                # errors with a better remedy are caught where they happen
        if not e.filename:
            no_more_output()
        message = (f"{e.filename}: {e.strerror}" if e.filename
                   else f"cannot read or write ({e.strerror or e})")
        print(f"girl.py: {one_line(message)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("girl.py: interrupted; run the same command again to resume, or to start anew if "
              "nothing was saved", file=sys.stderr)
        return 130
    finally:
        for signum, handler in old_handlers.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):       # may be closed, or unable to show every character
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.exit(main())
