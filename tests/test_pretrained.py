"""A run that begins with a pretrained model: its tokenizer and prompt, adapters through all stages,
and its way out again."""
import json
import shutil

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import girl
import plumbing.plan
import sft
from plumbing import weights
import reward
from data import ASK, Codec, load_codec, train_tokenizer
from plumbing import tokenizer as tokenizer_module
from plumbing.tokenizer import (END_OF_TURN, EOS, TURN, for_text, load_tokenizer, plain_text_only,
                                save_tokenizer)
from model import Config, LanguageModel, RewardModel
from plumbing.files import BadInput
from plumbing.stage import Stage
from plumbing.texts import normalize
from plumbing.weights import load_model, read_config, save_model

ROWS = [{"cv": f"Cook number {i} with knives", "jd": f"Wanted: cook {i} for kitchen {i % 7}",
         "no": f"Cook number {i}"} for i in range(60)]
TEXTS = sorted({t for row in ROWS for t in row.values()})


def tokenizer_of(kind):
    """As pretrained models have them: ChatML, a begin-of-text before every text, or a bare one."""
    tokenizer = train_tokenizer(TEXTS, 400)
    if kind == "chatml":
        tokenizer.add_special_tokens([TURN, END_OF_TURN])
    elif kind == "begin":
        tokenizer.add_special_tokens(["<|begin|>"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))])
    return tokenizer


def pretrained(folder, kind="chatml", **changes):
    """A tiny random Qwen2 with its tokenizer, as it would be downloaded; end-of-text is its pad
    too, as is often so."""
    tokenizer = tokenizer_of(kind)
    eos = tokenizer.token_to_id(END_OF_TURN if kind == "chatml" else EOS)
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.get_vocab_size() + 5, hidden_size=32, intermediate_size=48,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=256, eos_token_id=eos, pad_token_id=eos,
                 initializer_range=0.1)
    config = transformers.Qwen2Config(**sizes | changes)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_table(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "table.jsonl"


FAST = {"sft": ["--epochs", "2", "--batch", "4"], "reward": ["--steps", "6", "--samples", "8"],
        "ppo": ["--iterations", "2", "--episodes", "6", "--minibatch", "3", "--accumulate", "2",
                "--checkpointing"]}


@pytest.fixture(scope="module", params=["adapters", "all weights"])
def run(request, tmp_path_factory):
    """All stages, with adapters and without."""
    folder = tmp_path_factory.mktemp("pretrained")
    pretrained(folder / "base")
    assert girl.main(["data", "--from", str(write_table(folder)), "--cv", "cv", "--jd", "jd",
                      "--rejected-cv", "no", "--out", str(folder / "data")]) == 0
    common = ["--run", str(folder / "run"), "--data", str(folder / "data"), "--max-cv", "24",
              "--max-jd", "24"]
    lora = ["--lora-rank", "3"] if request.param == "adapters" else []
    assert girl.main(["sft", "--init", str(folder / "base"), *lora, *common, *FAST["sft"]]) == 0
    for command in (["reward"], ["reward", "--judge"], ["ppo"]):
        assert girl.main([*command, *common[:4], *FAST[command[0]]]) == 0
    assert girl.main(["evaluate", *common[:4], "--cvs", "4"]) == 0
    return folder, bool(lora)


def test_a_run_from_pretrained_weights_goes_through_all_stages(run):
    folder, adapters = run
    for stage in ("sft", "reward", "judge", "ppo"):
        assert (folder / "run" / stage / "adapter_config.json").exists() == adapters
        assert (folder / "run" / stage / "model.safetensors").exists() != adapters
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["sft"]["matrix_lr"] == config["reward"]["matrix_lr"] == 0
    assert config["sft"]["reading"] == 0
    assert config["sft"]["lr"] == (4e-4 if adapters else 2e-5)
    assert config["ppo"]["lr"] == (1e-4 if adapters else 1e-5)
    summary = json.loads((folder / "run" / "sft" / "summary.json").read_text())
    assert summary["valid_nll"] < summary["valid_nll_before"]
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["base"]["valid_nll"] == pytest.approx(summary["valid_nll_before"], abs=1e-5)
    assert results["sft"]["valid_nll"] == pytest.approx(summary["valid_nll"], abs=1e-5)
    assert sum(results["wins"]["girl_vs_base"]["judge"]) == pytest.approx(1)
    assert results["reward"]["pair_accuracy_ci95"] and results["reward"]["easy_pair_accuracy_ci95"]


def test_the_base_of_a_finished_run_may_move(run, tmp_path):
    folder, adapters = run
    if adapters:
        shutil.copytree(folder / "base", tmp_path / "elsewhere")
        shutil.copytree(folder / "run" / "ppo", tmp_path / "ppo")
        path = tmp_path / "ppo" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text())
                                   | {"base_model_name_or_path": str(tmp_path / "elsewhere")}))
    else:
        shutil.copytree(folder / "run" / "ppo", tmp_path / "ppo")
        shutil.move(folder / "base", folder / "gone")
    models = [load_model(where / "ppo") for where in (tmp_path, folder / "run")]
    if not adapters:
        shutil.move(folder / "gone", folder / "base")
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models)))


def test_only_the_adapters_differ_from_the_base(run):
    folder, adapters = run
    base = load_model(folder / "base").state_dict()
    for stage, kind in (("sft", LanguageModel), ("ppo", LanguageModel), ("reward", RewardModel)):
        model = load_model(folder / "run" / stage, kind)
        mine = {n.replace(".base_layer", ""): p for n, p in model.state_dict().items()
                if "lora_" not in n and n != "score.weight"}
        same = [torch.equal(p, base[n]) for n, p in mine.items()]
        assert all(same) if adapters else not any(same)
        if adapters:
            assert all(layer.lora_B.weight.abs().sum() > 0 for layer in model.modules()
                       if hasattr(layer, "lora_B"))


def test_dpo_trains_what_stage_1_trained(run, tmp_path):
    """On data of its own: it needs CVs with an accepted and a rejected JD."""
    folder, adapters = run
    shutil.copytree(folder / "run" / "sft", tmp_path / "run" / "sft")
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"cv": f"{split} {row['cv']}", "jd": f"{split} {jd}", "accepted": jd == row["jd"]}
                for row in ROWS for jd in (row["jd"], row["no"])]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n"
                                                                  for r in rows))
    assert girl.main(["dpo", "--steps", "3", "--run", str(tmp_path / "run"),
                      "--data", str(tmp_path / "data")]) == 0
    flags = json.loads((tmp_path / "run" / "config.json").read_text())["dpo"]
    assert (flags["lr"], flags["pairs"]) == (2e-5 if adapters else 1e-6, 4)
    before, after = (load_model(tmp_path / "run" / name).state_dict() for name in ("sft", "dpo"))
    for name, p in after.items():
        trained = "lora_" in name or not adapters
        assert torch.equal(p, before[name]) != trained, name


def test_what_comes_out_loads_in_transformers_and_in_peft(run, tmp_path):
    folder, adapters = run
    ours, cv = load_model(folder / "run" / "ppo").eval(), "Cook number 3 with knives"
    codec = load_codec(folder / "run" / "ppo", ours.config)
    assert girl.main(["export", "--merge", "--model", str(folder / "run" / "ppo"),
                      "--out", str(tmp_path / "ppo")]) == 0
    assert girl.main(["export", "--merge", "--model", str(folder / "run" / "reward"),
                      "--out", str(tmp_path / "reward")]) == 0
    ids = torch.tensor([codec.prompt(cv) + codec.jd("Wanted: cook 3")])
    theirs = {"merged": AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")}
    if adapters:
        theirs["adapters"] = AutoPeftModelForCausalLM.from_pretrained(folder / "run" / "ppo")
    with torch.no_grad():
        for model in theirs.values():
            torch.testing.assert_close(model.eval()(ids).logits, ours(ids), atol=1e-5, rtol=0)
    # Adapters load as such, too: transformers finds their base.
    theirs = AutoModelForCausalLM.from_pretrained(folder / "run" / "ppo").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=0)
    # The reward model, in a padded batch; and the tokenizer, which names pad and end-of-text.
    judge = load_model(folder / "run" / "reward", RewardModel).eval()
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward",
                                                                      output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    # (AutoTokenizer cuts as Qwen's own tokenizer does wherever the model is a Qwen2, whatever is in
    # the folder.)
    writes = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ppo")
    assert (writes.apply_chat_template([{"role": "user", "content": "Cook 3"}])["input_ids"]
            == codec.prompt("Cook 3"))
    assert tokenizer.eos_token == END_OF_TURN
    assert tokenizer.pad_token_id == theirs.config.pad_token_id != theirs.config.eos_token_id
    rows = [codec.prompt(cv) + codec.jd(jd) for jd in ("Wanted", "Wanted: cook 3 for kitchen 3")]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = theirs.eval()(**batch).logits[:, 0] - judge.center
    assert found.tolist() == pytest.approx(list(reward.score_rows(judge, rows)), abs=1e-5)


def test_export_without_merging_keeps_what_there_is(run, tmp_path, capsys):
    folder, adapters = run
    assert girl.main(["export", "--model", str(folder / "run" / "sft"),
                      "--out", str(tmp_path / "out")]) == 0
    assert ("adapters on" in capsys.readouterr().out) == adapters == (
        tmp_path / "out" / "adapter_config.json").exists()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(load_model(tmp_path / "out")(ids), load_model(folder / "run" / "sft")(ids))


def test_export_says_so_if_other_tools_cannot_write_the_prompt(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    argv = ["export", "--model", str(folder / "run" / "sft"), "--out"]
    assert girl.main([*argv, str(tmp_path / "a")]) == 0
    assert "chat template" not in capsys.readouterr().out
    monkeypatch.setattr(tokenizer_module, "for_text", lambda codec: (codec.tokenizer, ""))
    assert girl.main([*argv, str(tmp_path / "b")]) == 0
    assert ("no chat template; this tokenizer cannot reproduce the prompt from text"
            in capsys.readouterr().out)


def test_ppo_and_evaluate_hold_one_base_for_all(run, tmp_path, monkeypatch):
    """What ppo.train is handed: with adapters, each frozen weight of the reward model is one of the
    policy's; without, none."""
    folder, adapters = run
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ppo")
    handed, loaded = [], []

    def train(policy, judge, *rest):
        handed.append((policy, judge))
        rest[4].rows.append({"x": 0})
        return None, girl.ppo.Critic(judge.config.hidden_size)
    monkeypatch.setattr(girl.ppo, "train", train)
    assert girl.main(["ppo", "--run", str(tmp_path / "run"), "--data", str(folder / "data")]) == 0
    assert handed
    monkeypatch.setattr(girl.evaluate, "load_model",
                        lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1])
    shutil.rmtree(tmp_path / "run" / "ppo")
    shutil.copytree(folder / "run" / "ppo", tmp_path / "run" / "ppo")
    assert girl.main(["evaluate", "--run", str(tmp_path / "run"), "--data", str(folder / "data"),
                      "--cvs", "2"]) == 0
    for lm, *others in (handed[0], loaded[:4]):
        mine = {p.data_ptr() for p in lm.parameters()}
        for model in others:
            frozen, trained = ({p.data_ptr() for p in model.parameters()
                                if p.requires_grad == trains} for trains in (False, True))
            assert trained and not trained & mine
            assert frozen <= mine and (len(frozen) > 20 if adapters else not frozen)


def test_generate_and_score_work_on_it(run, tmp_path, capsys):
    folder, _ = run
    (tmp_path / "cv.txt").write_text("Cook number 3 with knives")
    argv = ["generate", "--model", str(folder / "run" / "ppo"),
            "--reward", str(folder / "run" / "reward"), "--cv", str(tmp_path / "cv.txt")]
    assert girl.main(argv) == 0 and capsys.readouterr().out.strip()


def test_a_reward_model_may_start_from_the_pretrained_model(run, tmp_path):
    folder, adapters = run
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reward")
    argv = ["reward", "--init", str(folder / "base"), "--run", str(tmp_path / "run"),
            "--data", str(folder / "data"), *FAST["reward"]]
    assert girl.main(argv + ["--lora-rank", "2", "--lora-targets", "q_proj,v_proj"] * adapters) == 0
    judge = load_model(tmp_path / "run" / "reward", RewardModel)
    if adapters:
        assert judge.model.lora.r == 2 and judge.model.lora.target_modules == ["q_proj", "v_proj"]
    shutil.rmtree(tmp_path / "run" / "ppo")
    assert girl.main(["ppo", "--run", str(tmp_path / "run"), "--data", str(folder / "data"),
                      *FAST["ppo"], "--iterations", "1"]) == 0
    assert (tmp_path / "run" / "ppo" / "summary.json").exists()


def test_all_stages_run_with_a_base_in_bf16(run, tmp_path, monkeypatch):
    """What CUDA does, as far as a CPU can show it: the frozen base in bf16, adapters and heads in
    float32, bf16 autocast."""
    folder, adapters = run
    monkeypatch.setattr(weights, "frozen_dtype", lambda device: torch.bfloat16)
    for module in (girl, girl.sft, girl.reward, girl.ppo, girl.evaluate):
        monkeypatch.setattr(module, "autocast",
                            lambda device: torch.autocast("cpu", torch.bfloat16))
    common = ["--run", str(tmp_path / "run"), "--data", str(folder / "data")]
    assert girl.main(["sft", "--init", str(folder / "base"), "--lora-rank", "3", "--max-cv", "24",
                      "--max-jd", "24", *common, *FAST["sft"]]) == 0
    for command in (["reward"], ["reward", "--judge"], ["ppo"]):
        assert girl.main([*command, *common, *FAST[command[0]]]) == 0
    assert girl.main(["evaluate", *common, "--cvs", "3"]) == 0
    for stage, kind in (("ppo", LanguageModel), ("reward", RewardModel)):
        model = load_model(tmp_path / "run" / stage, kind)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {
            torch.bfloat16}
        assert {p.dtype for n, p in model.named_parameters() if n in trained} == {torch.float32}


def test_train_hands_the_start_on_to_its_stages(tmp_path, capsys):
    """`bash train.sh --init`: one command, adapters in every stage, and flags that only --init can
    have."""
    pretrained(tmp_path / "base")
    assert girl.main(["data", "--from", str(write_table(tmp_path)), "--cv", "cv", "--jd", "jd",
                      "--out", str(tmp_path / "data")]) == 0
    argv = ["train", "--smoke", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert girl.main(argv + ["--init", str(tmp_path / "base"), "--lora-rank", "2",
                             "--lora-targets", "q_proj,up_proj", "--checkpointing"]) == 0
    for stage in ("sft", "reward", "judge", "ppo"):
        raw = json.loads((tmp_path / "run" / stage / "adapter_config.json").read_text())
        assert raw["r"] == 2
        assert raw["lora_alpha"] == 4 and raw["target_modules"] == ["q_proj", "up_proj"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert all(config[stage]["checkpointing"] for stage in ("sft", "reward", "judge", "ppo"))
    capsys.readouterr()
    assert girl.main(["sft", "--lora-rank", "2", "--run", str(tmp_path / "new"),
                      "--data", str(tmp_path / "data")]) == 2
    assert "--lora-rank needs --init" in capsys.readouterr().err


def test_a_failed_start_leaves_no_recipe_behind(tmp_path):
    """A run whose first `sft --init` failed is begun anew without it: with the recipe for random
    weights."""
    (tmp_path / "config.json").write_text(json.dumps({"sft": {"init": "/nowhere"}}))
    args = girl.parse(["sft", "--run", str(tmp_path)])
    assert (args.lr, args.reading) == (sft.SFTFlags.lr, sft.SFTFlags.reading)
    with Stage(tmp_path, "sft") as stage:   # a stage 1 that did begin with it, and came to its end
        stage.begin({"init": "/nowhere"}, {})
        stage.log(step=1)
        stage.finish()
    assert (girl.parse(["ppo", "--run", str(tmp_path)]).episodes
            == girl.PRETRAINED["ppo"]["episodes"])


def test_the_plan_needs_only_a_config(tmp_path, capsys):
    pretrained(tmp_path / "base")
    for path in tmp_path.glob("base/*"):
        if path.name != "config.json":
            path.unlink()
    assert girl.main(["ppo", "--plan", str(tmp_path / "base"), "--minibatch", "6",
                      "--accumulate", "3"]) == 0
    out = capsys.readouterr().out
    assert f"32 episodes of {512 + 512 + plumbing.plan.TEMPLATE} tokens" in out
    assert "micro-batches of 2" in out
    assert "LoRA, rank 16" in out and "base in bf16" in out
    assert "memory, peak" in out and "flops, iteration" in out
    assert girl.main(["ppo", "--plan", str(tmp_path / "nothing")]) == 2


# ----------------------------------------------------------------------------- prompt and tokenizer
def test_chatml_where_the_model_ends_its_turns_so(tmp_path):
    tokenizer = load_tokenizer(pretrained(tmp_path / "base"))
    codec = sft.new_codec([], sft.SFTFlags(init=str(tmp_path / "base"), max_cv=50, max_jd=50))
    prompt, jd = codec.prompt("Cook number 3"), codec.jd("Wanted: cook")
    decoded = tokenizer.decode(prompt + jd, skip_special_tokens=False)
    assert decoded == (f"{TURN}user\nWrite the job description of a job that fits this CV.\n\n"
                       f"Cook number 3{END_OF_TURN}\n"
                       f"{TURN}assistant\nWanted: cook{END_OF_TURN}")
    assert codec.eos == tokenizer.token_to_id(END_OF_TURN) and codec.text(jd) == "Wanted: cook"


def changed(folder, file="config.json", **changes):
    """Write a JSON file anew with these keys; a key of None says null, one of ... is taken out."""
    path = folder / file
    raw = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return folder


def test_chatml_only_where_the_model_learned_to_end_a_turn(tmp_path):
    """A base model's vocabulary may have ChatML's tokens though it never saw them: its own
    end-of-text decides."""
    folder = pretrained(tmp_path / "base")
    ids = {name: load_tokenizer(folder).token_to_id(name) for name in (END_OF_TURN, EOS)}
    for named, eos in ((ids[EOS], EOS), ([ids[EOS]], EOS), (ids[END_OF_TURN], END_OF_TURN),
                       ([ids[EOS], ids[END_OF_TURN]], END_OF_TURN)):
        codec = sft.new_codec([], sft.SFTFlags(init=str(changed(folder, eos_token_id=named))))
        prompt = codec.tokenizer.decode(codec.prompt("Cook"), skip_special_tokens=False)
        assert codec.eos == ids[eos] and prompt.startswith("CV: Cook" if eos == EOS else TURN)
        config = read_config(folder)[0]
        # `generate` with the same folder.
        assert config.eos_token_id == load_codec(folder, config).eos == ids[eos]


def test_it_is_said_where_no_jd_ends(run, tmp_path, capsys, monkeypatch):
    """By stage 1 of its sample, by stage 2 of the samples that it sets its scale by, by PPO of a
    rollout, and by generate."""
    folder, adapters = run
    shutil.copytree(folder / "run", tmp_path / "run")
    common = ["--run", str(tmp_path / "run"), "--data", str(folder / "data")]
    lora = ["--lora-rank", "3"] if adapters else []
    stages = {"sft": ["sft", "--init", str(folder / "base"), "--max-cv", "24", "--max-jd", "24",
                      *lora, *FAST["sft"]],
              "reward": ["reward", *FAST["reward"]], "ppo": ["ppo", *FAST["ppo"]]}
    says = {"sft": "sft: this sample did not end within",
            "reward": "reward: none of 8 samples of stage 1 ended within",
            "ppo": "ppo: no JD in this rollout ended"}

    def endless(model, prompts, *rest, **more):
        return [[5, 6, 7] for _ in prompts]
    for name, command in stages.items():
        shutil.rmtree(tmp_path / "run" / name)
        with monkeypatch.context() as patch:
            patch.setattr(getattr(girl, name), "generate", endless)
            assert girl.main(command + common) == 0
        assert says[name] in capsys.readouterr().out
    (tmp_path / "cv.txt").write_text("Cook")
    monkeypatch.setattr(girl, "generate", endless)
    assert girl.main(["generate", "--model", str(folder / "run" / "ppo"),
                      "--cv", str(tmp_path / "cv.txt"), "--number", "2"]) == 0
    assert "2 of 2 JDs did not end within" in capsys.readouterr().err
    monkeypatch.setattr(girl, "generate",
                        lambda model, prompts, *rest: [[5, model.config.eos_token_id]])
    assert girl.main(["generate", "--model", str(folder / "run" / "ppo"),
                      "--cv", str(tmp_path / "cv.txt")]) == 0
    assert "did not end" not in capsys.readouterr().err


@pytest.mark.parametrize("named", [None, [], ...])
def test_where_the_config_names_no_end_the_tokenizer_does(named, tmp_path):
    folder = changed(pretrained(tmp_path / "base", "begin"), eos_token_id=named)
    flags = sft.SFTFlags(init=str(folder), max_cv=20, max_jd=20)
    for token in ("<|pad|>", {"content": "<|begin|>"}):
        changed(folder, "tokenizer_config.json", eos_token=token)
        assert sft.new_codec([], flags).eos == tokenizer_of("begin").token_to_id(
            token if isinstance(token, str) else token["content"])
    (folder / "tokenizer_config.json").unlink()
    codec = sft.new_codec([], flags)
    assert codec.eos == tokenizer_of("begin").token_to_id(EOS)
    assert weights.load_pretrained(flags, codec, 0, "cpu").config.eos_token_id == codec.eos
    # `generate` with the same folder.
    assert load_codec(folder, read_config(folder)[0]).eos == codec.eos
    (folder / "tokenizer.json").write_text(tokenizer_of("begin").to_str().replace(EOS, "<|other|>"))
    with pytest.raises(BadInput, match="has no eos_token_id"):
        load_codec(folder, read_config(folder)[0])


@pytest.mark.parametrize("pad", [-1, None, ...])
def test_a_model_without_a_pad_is_a_start(pad, tmp_path):
    folder = changed(pretrained(tmp_path / "base", "bare"), pad_token_id=pad)
    codec = sft.new_codec([], sft.SFTFlags(init=str(folder)))
    assert codec.pad == tokenizer_of("bare").token_to_id("<|pad|>")


# How pretrained tokenizers cut a text before they look for merges: as GPT-2 does (SmolLM2 too), or
# with line ends kept together.
CUTS = {
    "gpt-2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "qwen": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                                   r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "ours": None}


def bpe_like(cut, kind):
    """A tokenizer that cuts like this, of texts with many line ends, so that there are merges
    across them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS[cut], decoders.ByteLevel()
    texts = [t.replace(" ", "\n\n").replace("with", "with.\n") for t in TEXTS]
    texts += TEXTS + [f"{ASK}\n\n{t}\n" for t in TEXTS]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", EOS], show_progress=False))
    if kind == "chatml":
        tokenizer.add_special_tokens([TURN, END_OF_TURN])
    if kind == "begin":
        tokenizer.add_special_tokens(["<|begin|>"])
        begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A",
                                                                 special_tokens=[begin])
    return tokenizer


@pytest.mark.parametrize("kind", ["chatml", "begin", "bare"])
@pytest.mark.parametrize("cut", CUTS)
def test_other_tools_write_the_prompt_that_was_trained_on(cut, kind, tmp_path):
    """As `vllm serve` and AutoTokenizer do: by the chat template, or with the prompt as one
    text."""
    tokenizer = tokenizer_of(kind) if cut == "ours" else bpe_like(cut, kind)
    codec = Codec(plain_text_only(tokenizer), 500, 500)
    save_model(tmp_path, LanguageModel(Config(tokenizer.get_vocab_size(), 8, 8, 1, 1, 1)))
    save_tokenizer(tmp_path, codec)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for cv in ("Cook number 3 with knives", "Profile: cook, 9 years.",
               "Koch\n- Köln (2019-2021)!\n\n- 3 x 4", "42", "料理人"):
        message = {"role": "user", "content": cv}
        for more in ({}, {"add_generation_prompt": True}):
            assert theirs.apply_chat_template([message], **more)["input_ids"] == codec.prompt(cv)
        for odd in (f"\u200b {cv}\u2060", f"\n {cv} ".replace("\n", "\r\n"), cv.replace("\n", "\r"),
                    "\ufeff" + cv.replace(" ", "\u00a0")):
            assert normalize(odd, False) == cv
            assert (theirs.apply_chat_template([message | {"content": odd}])["input_ids"]
                    == codec.prompt(cv))
        text = codec.tokenizer.decode(codec.prompt(cv), skip_special_tokens=False)
        assert theirs(text, add_special_tokens=False).input_ids == codec.prompt(cv)
        answer = codec.jd("Wanted: cook 3") if kind != "bare" else codec.jd("Wanted: cook 3")[:-1]
        pair = [message, {"role": "assistant", "content": "Wanted: cook 3"}]
        assert theirs.apply_chat_template(pair)["input_ids"] == codec.prompt(cv) + answer
    with pytest.raises(Exception, match="the roles are user, for a CV, and assistant, for a JD"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])
    # Saved and read again, it is the same tokenizer; and nothing is added a second time.
    again = Codec(load_tokenizer(tmp_path), 500, 500)
    assert again.prompt("Cook. 9") == codec.prompt("Cook. 9")
    assert again.jd("a cook\n\n- x") == codec.jd("a cook\n\n- x")
    assert for_text(again)[0].to_str() == again.tokenizer.to_str()


def test_gpt_2s_cut_is_the_one_that_needs_help():
    """Without it the test above would show nothing: two line ends are one token at the end of a
    text, and two inside."""
    codec = Codec(plain_text_only(bpe_like("gpt-2", "chatml")), 500, 500)
    text = codec.tokenizer.decode(codec.prompt("Cook"), skip_special_tokens=False)
    plain = Tokenizer.from_str(codec.tokenizer.to_str())
    assert plain.encode(text, add_special_tokens=False).ids != codec.prompt("Cook")
    assert for_text(codec)[0].encode(text, add_special_tokens=False).ids == codec.prompt("Cook")


def test_a_tokenizer_that_would_join_the_cv_and_the_plain_template_is_made_to_split_them():
    """A full stop and a line end are one token of Qwen's cut: here the CV's last character and the
    template's first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS["qwen"], decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [f"CV: Cook, {n} years.\nJD: cook" for n in range(50)],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            special_tokens=["<|pad|>", EOS], show_progress=False))
    codec = Codec(plain_text_only(tokenizer), 500, 500)
    text = codec.tokenizer.decode(codec.prompt("Cook, 9 years."), skip_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False).ids != codec.prompt("Cook, 9 years.")
    splitting, template = for_text(codec)
    assert template
    assert splitting.encode(text, add_special_tokens=False).ids == codec.prompt("Cook, 9 years.")


def test_no_token_of_the_chat_template_fills_rows_up():
    """Of the special tokens the first that the template does not use."""
    words = ["[UNK]", "user", "assistant", "<|spare|>", TURN, END_OF_TURN]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[1:])
    codec = Codec(tokenizer, 9, 9)
    assert codec.chatml
    assert codec.pad == words.index("<|spare|>") and codec.pad not in codec.before + codec.after


def test_a_tokenizer_that_cannot_write_the_prompt_as_text_gets_no_template(tmp_path):
    tokenizer = Tokenizer(models.BPE({"\u2581": 0, "a": 1, "<unk>": 2}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", EOS])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                 normalizers.Replace(" ", "\u2581")])
    codec = Codec(plain_text_only(tokenizer), 9, 9)
    assert for_text(codec)[1] == "" and for_text(codec)[0].to_str() == tokenizer.to_str()
    codec.pad = 2
    save_tokenizer(tmp_path, codec)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", ["begin", "bare"])
def test_the_plain_template_elsewhere_with_begin_of_text_once(kind, tmp_path):
    tokenizer = load_tokenizer(pretrained(tmp_path / "base", kind))
    codec = sft.new_codec([], sft.SFTFlags(init=str(tmp_path / "base")))
    decoded = tokenizer.decode(codec.prompt("Cook number 3") + codec.jd("Wanted: cook"),
                               skip_special_tokens=False)
    assert (decoded == ("<|begin|>" if kind == "begin" else "")
            + f"CV: Cook number 3\nJD: Wanted: cook{EOS}")
    assert codec.eos == tokenizer.token_to_id(EOS)
    assert codec.text(codec.jd("Wanted: cook")) == "Wanted: cook"


@pytest.mark.parametrize("kind", ["chatml", "begin", "bare"])
def test_no_text_makes_a_special_token(kind, tmp_path):
    """What a CV says cannot end its turn, begin another, or end the JD; and no text holds the
    pad."""
    codec = sft.new_codec([], sft.SFTFlags(init=str(pretrained(tmp_path / "base", kind))))
    special = set(codec.tokenizer.get_added_tokens_decoder())
    text = f"{END_OF_TURN}\n{TURN}assistant\n{EOS}<|pad|><|begin|>"
    inside = codec.prompt(text)[len(codec.before):-len(codec.after)]
    assert len(inside) > 10 and not special & set(inside) and not special & set(codec.jd(text)[:-1])
    assert codec.pad in special and codec.pad not in {codec.eos, *codec.before, *codec.after}


def test_odd_tokenizer_files_change_no_row(tmp_path):
    """Some add end-of-text behind every text, pad, truncate, or have control tokens that are not
    called special."""
    tokenizer = tokenizer_of("bare")
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = Codec(load_tokenizer(tmp_path), 50, 50)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}",
                                                             special_tokens=[(EOS, 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    odd = Codec(load_tokenizer(tmp_path), 50, 50)
    cv = "Cook number 3 with knives <think>"
    assert odd.prompt(cv) == plain.prompt(cv) and odd.jd(cv) == plain.jd(cv)
    assert tokenizer.token_to_id("<think>") not in plain.prompt(cv)


def test_what_ends_a_jd_may_be_one_of_several(tmp_path):
    folder = pretrained(tmp_path / "base", "bare")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    assert sft.new_codec([], sft.SFTFlags(init=str(folder))).eos == 1


def test_a_tokenizer_that_puts_the_space_itself_gets_no_second_one():
    words = ["\u2581", "a", "\u2581a", "C", "V", ":", "J", "D", "<unk>"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("\u2581", "a")],
                                     unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                 normalizers.Replace(" ", "\u2581")])
    assert Codec(tokenizer, 9, 9, eos=8).encode("a") == [2]


@pytest.mark.parametrize("changes, says", [
    (["--max-cv", "200", "--max-jd", "200"],
     "more than the 77 that this model reads; lower --max-cv or --max-jd"),
    (["--lora-rank", "-1"], "--lora-rank -1: must be at least 0"),
    (["--lora-rank", "2", "--lora-targets", "q_proj,c_attn"],
     "the layers some of down_proj, gate_proj"),
    (["--init", "/nowhere"], "/nowhere")])
def test_flags_that_do_not_fit_are_refused(changes, says, tmp_path, capsys):
    pretrained(tmp_path / "base", max_position_embeddings=77)
    table = write_table(tmp_path)
    assert girl.main(["data", "--from", str(table), "--cv", "cv", "--jd", "jd",
                      "--out", str(tmp_path / "data")]) == 0
    argv = ["sft", "--init", str(tmp_path / "base"), "--run", str(tmp_path / "run"),
            "--data", str(tmp_path / "data"), "--max-cv", "3", "--max-jd", "3"]
    assert girl.main(argv + changes) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_folders_that_cannot_be_a_start_are_refused(run, tmp_path):
    folder, adapters = run
    flags = sft.SFTFlags(init=str(folder / "run" / "sft"), max_cv=8, max_jd=8)
    codec = sft.new_codec([], flags)
    if adapters:
        with pytest.raises(BadInput, match="holds adapters; merge them first"):
            weights.load_pretrained(flags, codec, 0, torch.device("cpu"))
    small = pretrained(tmp_path / "base", vocab_size=100, pad_token_id=0, eos_token_id=1)
    with pytest.raises(BadInput, match="its model has 100"):
        weights.load_pretrained(sft.SFTFlags(init=str(small)), codec, 0, torch.device("cpu"))
    bare = pretrained(tmp_path / "bare", "bare")
    config = json.loads((bare / "config.json").read_text()) | {"eos_token_id": None}
    (bare / "config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_of("bare").to_str().replace(EOS, "<unk>").replace("<|pad|>", "<s>")
    (bare / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(BadInput, match="nothing says which token ends a text; name it as "
                                       "eos_token_id in its config.json"):
        sft.new_codec([], sft.SFTFlags(init=str(bare)))


def test_a_reward_model_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    folder, _ = run
    other = pretrained(tmp_path / "other", "begin")
    argv = ["reward", "--judge", "--init", str(other), "--run", str(tmp_path / "run"),
            "--data", str(folder / "data")]
    shutil.copytree(folder / "run" / "sft", tmp_path / "run" / "sft")
    assert girl.main(argv) == 2
    assert "its tokenizer is not the one of" in capsys.readouterr().err
