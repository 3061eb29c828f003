"""DPO: its loss by hand, what a pair is, what moves and what stays. (That a run which was cut short
ends bit for bit as another: test_resume.py. Pretrained weights: test_pretrained.py.)"""
import copy
import json
import math
import shutil

import pytest
import torch

import dpo
import girl
from conftest import argv, refused
from data import Record
from dpo import DPOFlags
from model import LoRA, add_lora
from plumbing.records import half
from plumbing.stage import generator
from reward import Group

CPU = torch.device("cpu")
EOS = 1
# (prompt, accepted JD, rejected JD): of different lengths, and pad ids among the tokens.
BATCH = [([2, 3, 5, 4, 3], [10, 5, EOS], [10, 6, 8, 11, EOS]),
         ([2, 3, 6, 8, 0, 4, 3], [EOS], [10, 6, 0, EOS]),
         ([2, 3, 7, 4, 3], [10, 7, 9, 12, 0, 12, 13, 13], [10, 5, EOS])]


def log_prob_by_hand(lm, prompt, jd):
    """One row alone, token by token."""
    logp = lm(torch.tensor([prompt + jd]))[0].log_softmax(-1)                       # [T, V]
    return sum(logp[len(prompt) + k - 1, token] for k, token in enumerate(jd))


def snapshot(module):
    return {name: p.clone() for name, p in module.state_dict().items()}


def same(module, state):
    return [torch.equal(p, state[name]) for name, p in module.state_dict().items()]


def spy(monkeypatch, name, look):
    """Let `look(result, *args)` see every call of dpo.name."""
    original = getattr(dpo, name)

    def wrapped(*args):
        result = original(*args)
        look(result, *args)
        return result
    monkeypatch.setattr(dpo, name, wrapped)


# ----------------------------------------------------------------------------------------- the loss
def test_the_loss_by_hand_and_the_direction_of_its_gradient():
    logp = [torch.tensor(x, requires_grad=True) for x in ([-3.0, -5.0], [-4.0, -8.0])]
    ref = torch.tensor([-4.0, -4.0]), torch.tensor([-4.5, -5.0])
    loss = dpo.dpo_loss(*logp, *ref, beta=0.2)
    # Implicit rewards: 0.2 and 0.1; then -0.2 and -0.6.
    by_hand = [math.log(1 + math.exp(-0.1)), math.log(1 + math.exp(-0.4))]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-5)
    loss.backward()
    slopes = [0.2 / 2 / (1 + math.exp(margin)) for margin in (0.1, 0.4)]
    assert logp[0].grad.tolist() == pytest.approx([-x for x in slopes], rel=1e-5)
    assert logp[1].grad.tolist() == pytest.approx(slopes, rel=1e-5)


def test_the_loss_is_ln_2_at_the_start(policy):
    log = dpo.dpo_step(policy, copy.deepcopy(policy), BATCH, 0.3, CPU)
    assert log.pop("loss") == pytest.approx(math.log(2))
    assert log == {"accuracy": 0, "margin": 0, "chosen": 0}
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters())


def test_the_log_probability_is_that_of_the_jd_and_its_end_alone(policy):
    prompts, chosen, rejected = zip(*BATCH)
    with torch.no_grad():
        found = dpo.jd_log_probs(policy, prompts + prompts, chosen + rejected, CPU)
        by_hand = [log_prob_by_hand(policy, p, jd)
                   for jds in (chosen, rejected) for p, jd in zip(prompts, jds)]
    torch.testing.assert_close(found, torch.stack(by_hand), atol=1e-5, rtol=1e-5)


def test_a_step_by_hand(policy, reference):
    """Its log and its gradient, from rows alone."""
    margins, rewards = [], []
    for prompt, *jds in BATCH:
        chosen, rejected = (
            0.3 * (log_prob_by_hand(policy, prompt, jd)
                   - log_prob_by_hand(reference, prompt, jd).detach()) for jd in jds)
        margins.append(chosen - rejected)
        rewards.append(chosen)
    margins, rewards = torch.stack(margins), torch.stack(rewards)
    loss = (1 + (-margins).exp()).log().mean()
    loss.backward()
    by_hand = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    log = dpo.dpo_step(policy, reference, BATCH, 0.3, CPU)
    right = (margins > 0).tolist()
    assert 0 < sum(right) < len(right)
    assert log == pytest.approx({
        "loss": loss.item(), "accuracy": sum(right) / len(right), "margin": margins.mean().item(),
        "chosen": rewards.mean().item()}, rel=1e-4)
    for p, gradient in zip(policy.parameters(), by_hand):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in reference.parameters())


# ---------------------------------------------------------------------------------------- the pairs
RECORDS = [Record("nurse", "wanted nurse", True), Record("nurse", "wanted nurse now", True),
           Record("nurse", "wanted cook", False), Record("nurse", "wanted driver", False),
           Record("cook", "wanted cook", True), Record("cook", "wanted nurse night", False),
           Record("driver", "wanted driver", True),         # a pair only with the nurse's
           Record("driver", "wanted nurse", True)]


def test_every_comparison_of_a_group_is_drawn():
    group = Group([("p", jd) for jd in "abcd"], [True, False, True, False])
    drawn = {dpo.draw_pair(group, generator(k)) for k in range(50)}
    assert drawn == {("p", "a", "b"), ("p", "a", "d"), ("p", "c", "b"), ("p", "c", "d")}


def test_a_pair_is_an_accepted_and_a_rejected_jd_of_one_cv(policy, codec, stage, monkeypatch):
    batches = []
    spy(monkeypatch, "dpo_step", lambda log, policy, reference, batch, *rest: batches.append(batch))
    dpo.train(policy, codec, RECORDS, DPOFlags(steps=40, pairs=2), 0, stage, CPU)
    texts = {"nurse": (["wanted nurse", "wanted nurse now"], ["wanted cook", "wanted driver"]),
             "cook": (["wanted cook"], ["wanted nurse night"])}
    pairs = {str((codec.prompt(cv), codec.jd(yes), codec.jd(no)))
             for cv, (chosen, rejected) in texts.items() for yes in chosen for no in rejected}
    assert {str(pair) for batch in batches for pair in batch} == pairs
    assert all(len({str(prompt) for prompt, _, _ in batch}) == 2 for batch in batches)
    batches.clear()
    for seed in range(8):               # too few steps for all CVs: the seed decides which are used
        dpo.train(policy, codec, RECORDS, DPOFlags(steps=1, pairs=1), seed, stage, CPU)
    assert {str(prompt) for (prompt, _, _), in batches} == {str(codec.prompt(cv)) for cv in texts}


def test_it_learns_from_half_a_and_its_hard_negatives(whole, monkeypatch):
    seen = {}

    class Halt(Exception):
        pass

    def train(policy, codec, records, *rest):
        seen.update(records=records, keep_contacts=policy.config.keep_contacts)
        raise Halt
    monkeypatch.setattr(dpo, "train", train)
    monkeypatch.setattr(dpo, "keeps_contacts", lambda folder: folder == whole / "data")
    with pytest.raises(Halt):
        dpo.run(None, whole / "run", whole / "data", DPOFlags(), 0, CPU)
    made = [r for name in ("train", "probes")
            for r in girl.read_records(whole / "data" / f"{name}.jsonl")]
    assert seen["records"] == [r for r in made if half(r.cv) == "A"] and seen["keep_contacts"]


# ------------------------------------------------------------------------------------- the training
def test_the_margin_grows_and_the_reference_stays(policy, codec, stage, monkeypatch):
    references, betas, rates, norms = [], [], [], []

    def look(log, policy, reference, batch, beta, device):
        references.append(reference), betas.append(beta)
    spy(monkeypatch, "dpo_step", look)

    class Noted(torch.optim.Adam):
        def step(self):
            group, = self.param_groups
            rates.append(group["lr"])
            norms.append(sum(float(p.grad.square().sum()) for p in group["params"]) ** 0.5)
            super().step()
    monkeypatch.setattr(dpo.torch.optim, "Adam", Noted)
    start = snapshot(policy)
    flags = DPOFlags(steps=100, pairs=2, lr=1e-3, beta=0.4, max_grad_norm=0.3)
    dpo.train(policy, codec, RECORDS, flags, 0, stage, CPU)
    assert [row["step"] for row in stage.rows] == list(range(1, 101))
    assert stage.rows[0]["loss"] == pytest.approx(math.log(2)) and stage.rows[0]["margin"] == 0
    last = stage.rows[-1]
    assert last["accuracy"] == 1 and last["margin"] > 2 and last["loss"] < 0.2
    assert rates == pytest.approx([1e-3 * (1 - k / 100) for k in range(100)])
    assert max(norms) == pytest.approx(0.3, rel=1e-3) and set(betas) == {0.4}
    assert len({id(r) for r in references}) == 1 and all(same(references[0], start))
    assert not any(same(policy, start))
    assert "2 CVs have an accepted and a rejected JD; 2 are used" in stage.lines[0]
    assert stage.lines[-1].startswith("test  100/100  loss 0.")


def test_adapters_alone_are_trained_and_the_base_is_shared(policy, codec, stage, monkeypatch):
    references = []
    spy(monkeypatch, "dpo_step", lambda log, policy, reference, *rest: references.append(reference))
    add_lora(policy, LoRA("base", 2, 4.0, ["q_proj", "v_proj"]))
    start = snapshot(policy)
    dpo.train(policy, codec, RECORDS, DPOFlags(steps=3, pairs=2, lr=1e-2), 0, stage, CPU)
    assert all(same(references[0], start))
    other = dict(references[0].named_parameters())
    for name, p in policy.named_parameters():
        is_adapter = "lora_" in name
        assert torch.equal(p, start[name]) != is_adapter, name
        assert (p.data_ptr() == other[name].data_ptr()) != is_adapter, name


def test_what_it_saves_is_a_generator(whole, tmp_path, capsys):
    folder = whole / "run" / "dpo"
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                     "metrics.csv", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 10 and {"loss", "accuracy", "margin", "chosen"} <= set(summary)
    (tmp_path / "cv.txt").write_text(girl.read_records(whole / "data" / "valid.jsonl")[0].cv)
    capsys.readouterr()
    assert girl.main(["generate", "--model", str(folder), "--cv", str(tmp_path / "cv.txt")]) == 0
    assert capsys.readouterr().out.strip()


# ---------------------------------------------------------------------------------------- bad input
def test_decisions_without_a_pair_are_refused(whole, tmp_path, capsys):
    """Each CV has accepted JDs or rejected ones; some JDs have both."""
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        records = girl.read_records(whole / "data" / f"{split}.jsonl")
        kept = [r for r in records if r.accepted == (half(r.cv + "x") == "A")]
        (tmp_path / "data" / f"{split}.jsonl").write_text(
            "".join(json.dumps(r._asdict()) + "\n" for r in kept))
    shutil.copytree(whole / "run" / "sft", tmp_path / "run" / "sft")
    refused(capsys, argv("dpo", tmp_path / "run", tmp_path / "data"),
            "dpo: no CV with both an accepted and a rejected JD, 0 rejected ones dropped: nothing "
            "to compare; give more decisions on the same CVs, or raise --max-cv")
    shutil.rmtree(tmp_path / "run")
    refused(capsys, argv("dpo", tmp_path / "run", whole / "data"), "stage sft is not finished")


def test_a_folder_that_was_taken_away_after_the_last_step_is_not_written_into(
        whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole / "run" / "sft", tmp_path / "run" / "sft")
    folder = tmp_path / "run" / "dpo"
    monkeypatch.setattr(dpo, "train", lambda *args: shutil.rmtree(folder) or folder.mkdir())
    refused(capsys, argv("dpo", tmp_path / "run", whole / "data"), "run/dpo: was deleted or moved")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_names_step_and_cvs(whole, tmp_path, monkeypatch,
                                                                 capsys, where):
    shutil.copytree(whole / "run" / "sft", tmp_path / "run" / "sft")
    batches = []

    def spoil(log, policy, reference, batch, *rest):
        batches.append(batch)
        if len(batches) == 3 and where == "loss":
            log["loss"] = math.nan
        elif len(batches) == 3:
            policy.lm_head.weight.grad[0] = math.inf
    spy(monkeypatch, "dpo_step", spoil)
    line = refused(capsys, argv("dpo", tmp_path / "run", whole / "data"),
                   "dpo: the loss or its gradient is not finite at step 3, on the records ",
                   "; lower --lr, and delete ")
    cvs = {r.cv for r in girl.read_records(whole / "data" / "train.jsonl")}
    assert sum(repr(cv[:40]) in line for cv in cvs) >= 8 and len(batches) == 3
