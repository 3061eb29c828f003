"""What a stage learns from: its data, the stages before it, the pretrained model, and the code. All by their checksums."""
from pathlib import Path

from plumbing.files import BadInput, checksums, read_json, sha256
from plumbing.stage import check_folder, code_checksum, finished, read_summary
from plumbing.weights import check_links, read_lora

HOME = Path(__file__).parents[1]
MARKET = HOME / "market.py"
BEFORE = {"sft": (), "reward": ("sft",), "judge": ("sft",), "ppo": ("sft", "reward"), "recommend": ("sft", "reward", "ppo"),
          "evaluate": ("sft", "reward", "judge", "ppo")}
DATA = ("train.jsonl", "valid.jsonl", "probes.jsonl", "market.json", "import.json")


def need(run, stage):
    """The folder of a finished stage, which learned from the stages that stand before it in this run."""
    if not finished(run, stage):
        command = "reward --judge" if stage == "judge" else stage
        raise BadInput(f"{run / stage}: stage {stage} is not finished; run  python girl.py {command} --run {run}  first")
    inputs = read_summary(run / stage)["inputs"]
    for name, digest in models_before(run, stage).items():
        if inputs.get(name) != digest:
            raise BadInput(f"{run / stage}: learned from another model than the one that is here, {name} is not the same; delete "
                           f"{run / stage} and run the stage again")
    return run / stage


def init_of(run):
    """The folder of the pretrained model that a run began with, or nothing."""
    return read_summary(Path(run) / "sft")["asked"]["init"] if finished(run, "sft") else ""


def models_before(run, name):
    """Checksums of the files of the stages before this one."""
    return {f"{stage}/{f}": digest for stage in BEFORE[name] if finished(run, stage)
            for f, digest in read_summary(run / stage)["sha256"].items() if f != "metrics.csv"}


def what_it_learns_from(run, folder, name, init=""):
    """Checksums of a stage's data, of the stages before it, and of the pretrained models that it and they began with."""
    check_folder(folder)
    check_rules(folder)
    found = {f: sha256(folder / f) for f in DATA if (folder / f).exists()}
    bases = {"--init": init} if init else {}
    for stage in BEFORE[name]:
        if adapters := read_lora(need(run, stage)):
            bases[stage] = adapters.base_model_name_or_path
    digests = {}
    for base in set(bases.values()):
        check_links(base)
        digests[base] = checksums(path for path in Path(base).glob("*")
                                  if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"))
    found |= {f"{file} that {of} began with": digest for of, base in bases.items() for file, digest in digests[base].items()}
    return found | models_before(run, name)


def check_rules(folder):
    """Refuse simulated data that were made by other rules than market.py has now: their true match would be another."""
    path, rules = Path(folder) / "market.json", code_checksum(MARKET)
    if path.exists() and read_json(path).get("rules", rules) != rules:      # an earlier version noted none
        raise BadInput(f"{path}: market.py changed since these data were made, so their true match would differ; restore the old "
                       "market.py, or make new data in a new run:  bash train.sh --out DIR")


def code_of(name):
    """Checksums of the files whose code the result of a stage or a measurement depends on. (Of the market's rules see check_rules.)"""
    measures = ["sft.py", "ppo.py", "measure/evaluate.py"]
    own = {"sft": ["sft.py"], "ppo": ["ppo.py"], "evaluate": measures, "recommend": [*measures, "measure/recommend.py"]}
    files = ["girl.py", "data.py", "model.py", "reward.py", "aids.py", "plumbing/files.py", "plumbing/stage.py",
             "plumbing/texts.py", "plumbing/weights.py", *own.get(name, [])]
    return {file: code_checksum(HOME / file) for file in files}


for each in ("sft", "ppo", "recommend"):
    code_of(each)                       # now, while the files are the code that was imported
code_checksum(MARKET)
