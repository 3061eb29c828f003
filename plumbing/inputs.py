"""The inputs of a stage, by checksum: data, earlier stages, pretrained model and code."""
from pathlib import Path

from plumbing.files import BadInput, checksums, read_json, sha256
from plumbing.stage import check_folder, code_checksum, finished, read_summary, source_of
from plumbing.weights import check_links, read_lora

HOME = Path(__file__).parents[1]
MARKET = HOME / "market.py"
BEFORE = {"sft": (), "reward": ("sft",), "judge": ("sft",), "dpo": ("sft",),
          "ppo": ("sft", "reward"), "recommend": ("sft", "reward", "ppo"),
          "evaluate": ("sft", "reward", "judge", "ppo")}
DATA = ("train.jsonl", "valid.jsonl", "probes.jsonl", "market.json", "import.json")


def need(run, stage):
    """The folder of a finished stage. Refused if this run's earlier stages are not those that it
    was trained with."""
    if not finished(run, stage):
        command = "reward --judge" if stage == "judge" else stage
        raise BadInput(f"{run / stage}: stage {stage} is not finished; "
                       f"run  python girl.py {command} --run {run}  first")
    inputs = read_summary(run / stage)["inputs"]
    for name, digest in models_before(run, stage).items():
        if inputs.get(name) != digest:
            raise BadInput(f"{run / stage}: was trained with a different {name}; "
                           f"delete {run / stage} and run the stage again")
    return run / stage


def init_of(run):
    """The folder of the pretrained model that a run began with, or an empty text."""
    return read_summary(Path(run) / "sft")["asked"]["init"] if finished(run, "sft") else ""


def models_before(run, name):
    """Checksums of the files of the stages before this one."""
    digests = {}
    for stage in BEFORE[name]:
        if finished(run, stage):
            for file, digest in read_summary(run / stage)["sha256"].items():
                if file != "metrics.csv":
                    digests[f"{stage}/{file}"] = digest
    return digests


def inputs_of(run, folder, name, init=""):
    """Checksums of a stage's inputs: the data, the stages before it, and the pretrained models that
    it and they began with."""
    check_folder(folder)
    check_rules(folder)
    inputs = {file: sha256(folder / file) for file in DATA if (folder / file).exists()}
    bases = {"--init": init} if init else {}
    for stage in BEFORE[name]:
        if adapters := read_lora(need(run, stage)):
            bases[stage] = adapters.base_model_name_or_path
    digests = {}
    for base in set(bases.values()):
        check_links(base)
        digests[base] = checksums(path for path in Path(base).glob("*")
                                  if path.suffix == ".safetensors"
                                  or path.name in ("config.json", "tokenizer.json"))
    for owner, base in bases.items():
        for file, digest in digests[base].items():
            inputs[f"{file} that {owner} began with"] = digest
    return inputs | models_before(run, name)


# market.py as it is -> versions before it with the same rules: without the options for experiments,
# without a progress bar, and with other imports.
SAME_RULES = {"00a91b1639b45cda2e4be1e9e90eb8da06cdbbc466ce309e8a12e1aeb2660e89":
              ("755458b125a4043b878ffb992f5b054cae3dd0aa1b6d76614f924f3ac18e8698",
               "cdc44ef5767a507a4ff985cbc15f64c9121e2b05a6dd5b5d9690d3cb6a1b9759",
               "6e0ff1db6bc481c52fdec62f56aa79cbf4559ac9763fb0229aee7b5d6d80235b")}


def check_rules(folder):
    """Refuse simulated data that were made by other rules than those that market.py has now."""
    path, rules = Path(folder) / "market.json", code_checksum(MARKET)
    # Earlier versions recorded no rules.
    same = (None, rules, *SAME_RULES.get(rules, ()))
    if path.exists() and read_json(path).get("rules") not in same:
        raise BadInput(f"{path}: market.py changed since these data were made, so their true match "
                       "would differ; restore the old market.py, or make new data in a new run:  "
                       "bash train.sh --out DIR")


def code_files(name):
    """The files whose code the result of a stage or measurement depends on. (For the rules of the
    market see check_rules.)"""
    measured = ["sft.py", "ppo.py", "measure/evaluate.py"]
    own = {"sft": ["sft.py"], "ppo": ["ppo.py"], "dpo": ["dpo.py", "ppo.py"],
           "evaluate": measured, "recommend": [*measured, "measure/recommend.py"]}
    return ["girl.py", "data.py", "model.py", "reward.py", "aids.py", "plumbing/files.py",
            "plumbing/inputs.py", "plumbing/records.py", "plumbing/stage.py", "plumbing/texts.py",
            "plumbing/tokenizer.py", "plumbing/weights.py", *own.get(name, [])]


def code_of(name):
    """The checksums of code_files(name)."""
    return {file: code_checksum(HOME / file) for file in code_files(name)}


# Read at import, while the files are the code that runs.
for name in ("sft", "dpo", "recommend"):
    for file in code_files(name):
        source_of(HOME / file)
source_of(MARKET)
