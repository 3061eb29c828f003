"""Stage 1: its loss by hand, its accumulation, its steps, what a small model starts from."""
import json
import math

import pytest
import torch

import girl
import aids
import reward
import sft
from conftest import tiny
from data import Record, load_codec
from plumbing.records import half
from plumbing.tokenizer import save_tokenizer
from aids import Optimizer
from plumbing.stage import Stage
from plumbing.weights import load_pretrained, save_model

CPU = torch.device("cpu")


def nll_by_hand(lm, prompt, jd):
    """-log P of each token but the first, from one full forward pass over the row alone: a list."""
    logp = lm(torch.tensor([prompt + jd])).detach().log_softmax(-1)[0]
    return [-float(logp[k - 1, token]) for k, token in enumerate(prompt + jd) if k > 0]


def test_sft_loss_is_on_the_jd_and_its_end_only():
    codec, lm = tiny()
    rows = [(codec.prompt("a cook"), codec.jd("a job for")),
            (codec.prompt("a cook with skills"), codec.jd("a"))]
    loss, count, _ = sft.sft_loss(lm, None, [sft.Example(p, j) for p, j in rows], CPU)
    by_hand = sum(sum(nll_by_hand(lm, p, j)[len(p) - 1:]) for p, j in rows)
    assert count == len(rows[0][1]) + len(rows[1][1]) and rows[0][1][-1] == codec.eos
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_sft_loss_reads_every_jd_where_there_is_a_reader():
    codec, lm = tiny()
    reader = torch.nn.Linear(32, 1)
    rows = [(codec.prompt("a cook"), codec.jd("a job for")),
            (codec.prompt("a cook with skills"), codec.jd("a"))]
    loss, _, reading = sft.sft_loss(lm, reader, [sft.Example(*row) for row in rows], CPU)
    without = sft.sft_loss(lm, None, [sft.Example(*row) for row in rows], CPU)
    states = torch.cat([lm.model(torch.tensor([p + j]))[0, len(p):] for p, j in rows])
    assert reading.item() == pytest.approx(aids.reading_loss(reader, states, rows).item(), rel=1e-5)
    assert loss.item() == without[0].item() and without[2].item() == 0


def test_sft_gradient_accumulation_equals_the_big_batch():
    codec, _ = tiny()
    batch = [sft.Example(codec.prompt("a cook"), codec.jd("a job for a cook")),
             sft.Example(codec.prompt("skills"), codec.jd("a")),
             sft.Example(codec.prompt("a cook with knife skills"), codec.jd("a job"))]
    after, logged = [], []
    for accumulate in (1, 3):
        _, lm = tiny()
        reader = torch.nn.Linear(32, 1)
        torch.nn.init.ones_(reader.weight)
        torch.nn.init.zeros_(reader.bias)
        logged.append(sft.sft_step(lm, reader, batch, sft.SFTFlags(accumulate=accumulate), CPU))
        after.append(torch.cat([p.grad.flatten()
                                for p in [*lm.parameters(), *reader.parameters()]]))
    assert torch.allclose(after[0], after[1], atol=1e-6) and after[0].abs().sum() > 0
    assert logged[0] == pytest.approx(logged[1], rel=1e-5) and min(logged[0]) > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_that_of_the_objective_by_hand(accumulate):
    """A mean over the tokens of all JDs, a long and a short one; and `reading` times its mean over
    the rows. Each row alone."""
    codec, lm = tiny()
    reader = torch.nn.Linear(32, 1)
    texts = [("a cook", "a job for a cook with knife skills"), ("skills", "a"),
             ("a cook with knife skills", "a job")]
    rows, written = [(codec.prompt(cv), codec.jd(jd)) for cv, jd in texts], 0.0
    for prompt, jd in rows:
        logp = lm(torch.tensor([prompt + jd]))[0, :-1].log_softmax(-1)                  # [T-1, V]
        nll, start = -logp[torch.arange(len(logp)), (prompt + jd)[1:]], len(prompt) - 1     # [T-1]
        written = written + nll[start:].sum()
    written = written / sum(len(jd) for _, jd in rows)
    states = torch.cat([lm.model(torch.tensor([p + jd]))[0, len(p):] for p, jd in rows])
    reading = aids.reading_loss(reader, states, rows)
    (written + 0.3 * reading).backward()
    parameters = [*lm.parameters(), *reader.parameters()]
    by_hand = [p.grad.clone() for p in parameters]
    lm.zero_grad(), reader.zero_grad()

    flags = sft.SFTFlags(reading=0.3, accumulate=accumulate)
    loss, read = sft.sft_step(lm, reader, [sft.Example(*row) for row in rows], flags, CPU)
    for p, gradient in zip(parameters, by_hand):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-3)
    assert (loss, read) == pytest.approx((written.item(), reading.item()), rel=1e-5)


@pytest.mark.parametrize("at_once", [64, 1])
def test_mean_nll_is_that_of_a_token_over_all_texts(at_once, monkeypatch):
    """A JD of one word and one of many: the mean of the texts' means, or the batches', differs."""
    codec, lm = tiny()
    monkeypatch.setattr(sft, "rows_that_fit", lambda most, numbers: at_once)
    pairs = [("a cook", "a job for a cook with knife skills"), ("skills", "a")]
    rows = [(codec.prompt(cv), codec.jd(jd)) for cv, jd in pairs]
    tokens = [x for prompt, jd in rows for x in nll_by_hand(lm, prompt, jd)[len(prompt) - 1:]]
    assert sft.mean_nll(lm, pairs, codec, CPU) == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_after_some_steps_the_jd_is_likelier_and_reading_is_better(stage):
    codec, lm = tiny()
    reader = torch.nn.Linear(32, 1)
    pairs = [("a cook with knife skills", "a job for a cook"), ("skills", "a job with knife")]
    examples = [sft.Example(codec.prompt(cv), codec.jd(jd)) for cv, jd in pairs]
    flags = sft.SFTFlags(batch=2, lr=1e-2, matrix_lr=1e-3, warmup=0)
    optimizer = Optimizer(torch.nn.ModuleList([lm, reader]), flags, 12)
    before = sft.mean_nll(lm, pairs, codec, CPU)
    losses = []
    for step in range(12):
        losses.append(sft.sft_step(lm, reader, examples, flags, CPU))
        optimizer.step(step)
    assert sft.mean_nll(lm, pairs, codec, CPU) < 0.7 * before
    (first_loss, first_reading), (_, last_reading) = losses[0], losses[-1]
    assert first_loss == pytest.approx(before, rel=1e-4) and last_reading < first_reading


def test_an_epoch_has_each_pair_once_in_an_order_of_its_own_and_ends_at_the_last_step():
    batches = sft.schedule([5] * 7, 3, steps=8, seed=0)     # an epoch has three steps
    assert [len(batch) for batch in batches[:6]].count(1) == 2 and len(batches) == 8
    epochs = [sum(batches[:3], []), sum(batches[3:6], []),
              sum(sft.schedule([5] * 7, 3, 3, seed=1), [])]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3       # another epoch, another seed
    assert len(set(sum(batches[6:], []))) == len(sum(batches[6:], []))


def test_a_new_model_has_zeros_for_unused_tokens_small_embeddings_and_large_final_states():
    codec, _ = tiny()
    example = sft.Example(codec.prompt("a cook"), codec.jd("a job"))
    model = sft.new_model(codec, [example],
                          sft.SFTFlags(hidden=64, layers=1, heads=4, kv_heads=4), 0)
    rows, used = model.model.embed_tokens.weight, set(example.prompt + example.jd)
    assert [bool(row.any()) for row in rows] == [t in used for t in range(len(rows))]
    assert rows[sorted(used)].std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(64 ** -0.5,
                                                                                       rel=0.1)
    assert model.model.norm.weight.tolist() == [8.0] * 64


def test_stage_1_sees_the_accepted_pairs_of_half_a_for_as_many_epochs_as_it_is_told(
        tmp_path, monkeypatch):
    records = [{"cv": f"cook number {i}", "jd": f"job number {i % 7}", "accepted": i % 3 == 0}
               for i in range(60)]
    for split in ("train", "valid", "test"):
        own = [r if split == "train"
               else r | {"cv": f"{split} {r['cv']}", "jd": f"{split} {r['jd']}"} for r in records]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in own))
    seen, validated, optimizers = [], [], []

    class Noted(Optimizer):
        def __init__(self, *args):
            super().__init__(*args)
            optimizers.append(self)

    def step(model, reader, batch, given, device):
        seen.append(batch)
        optimizer, = optimizers
        assert model.model.checkpointing and optimizer.flags is given is flags
        trained = {id(p) for p in [*model.parameters(), *reader.parameters()]}
        assert {id(p) for p in optimizer.parameters} == trained
        return 0.0, 0.0
    monkeypatch.setattr(sft, "Optimizer", Noted)
    monkeypatch.setattr(sft, "sft_step", step)
    monkeypatch.setattr(sft, "mean_nll", lambda model, pairs, *rest: validated.append(pairs) or 1.0)
    flags = sft.SFTFlags(hidden=32, layers=1, heads=4, kv_heads=4, batch=5, epochs=1.5,
                         checkpointing=True)
    with Stage(tmp_path / "run", "sft") as stage:
        sft.run(stage, tmp_path, tmp_path, flags, 0, CPU)
    codec = load_codec(tmp_path / "run/sft", girl.load_model(tmp_path / "run/sft").config)
    of_a = [r for r in records if half(r["cv"]) == "A" and r["accepted"]]
    epoch = math.ceil(len(of_a) / 5)
    assert len(seen) == optimizers[0].steps == round(1.5 * epoch) > epoch
    pairs = [(e.prompt, e.jd) for batch in seen[:epoch] for e in batch]
    assert sorted(pairs) == sorted((codec.prompt(r["cv"]), codec.jd(r["jd"])) for r in of_a)
    assert validated == [[(f"valid {r['cv']}", f"valid {r['jd']}")
                          for r in records if r["accepted"]]] * 2


def test_without_the_loss_of_reading_nothing_is_read():
    codec, lm = tiny()
    prompt, jd = codec.prompt("a cook"), codec.jd("a job")

    def reader(states):
        pytest.fail("read in vain")
    loss, reading = sft.sft_step(lm, reader, [sft.Example(prompt, jd)], sft.SFTFlags(reading=0.0),
                                 CPU)
    assert loss > 0 and reading == 0
    groups = [reward.Group([(prompt, jd), (prompt, jd[1:])], [True, False])]
    model, flags = reward.RewardModel(lm.config), reward.RewardFlags(reading=0.0)
    loss, _, reading = reward.reward_step(model, reader, groups, flags, CPU)
    assert loss > 0 and reading == 0


def test_a_new_model_has_the_sizes_of_the_flags():
    """All different, and none the default: a flag that is not used, or used for another, shows."""
    flags = sft.SFTFlags(hidden=48, layers=3, heads=6, kv_heads=2, vocab=290, max_cv=7, max_jd=9)
    codec = sft.new_codec([Record("a cook with knife skills", "a job for a cook", True)] * 9, flags)
    example = sft.Example(codec.prompt("a cook"), codec.jd("a job"))
    c = sft.new_model(codec, [example], flags, 0).config
    assert (c.hidden_size, c.num_hidden_layers) == (48, 3)
    assert (c.num_attention_heads, c.num_key_value_heads) == (6, 2)
    assert (codec.max_cv, codec.max_jd) == (c.max_cv_tokens, c.max_jd_tokens) == (7, 9)
    assert c.vocab_size == 290 and c.intermediate_size == 128          # 8/3 of 48


def test_adapters_have_the_rank_the_scale_and_the_layers_of_the_flags(tmp_path):
    codec, lm = tiny()
    save_model(tmp_path, lm)
    save_tokenizer(tmp_path, codec)
    for alpha, scale in ((12.0, 12 / 3), (0.0, 2)):         # 0 stands for twice the rank
        flags = sft.SFTFlags(init=str(tmp_path), lora_rank=3, lora_alpha=alpha,
                             lora_targets="q_proj")
        model = load_pretrained(flags, codec, 0, CPU)
        adapters = {n: m for n, m in model.named_modules() if type(m).__name__ == "LoRALinear"}
        assert len(adapters) == 2 and all(name.endswith("q_proj") for name in adapters)
        assert all((m.scale, m.lora_A.out_features) == (scale, 3) for m in adapters.values())


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_added_to_a_pretrained_model_depends_on_the_seed_alone(tmp_path, rank):
    codec, lm = tiny()
    save_model(tmp_path, lm)
    save_tokenizer(tmp_path, codec)
    flags, heads = sft.SFTFlags(init=str(tmp_path), lora_rank=rank), []
    for seed, drawn_before in ((1, 0), (1, 5), (2, 0)):
        torch.rand(drawn_before)
        load_pretrained(flags, codec, seed, CPU)
        heads.append(torch.nn.Linear(4, 1).weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_no_text_makes_a_token_that_was_added_to_a_pretrained_tokenizer(tmp_path):
    """Whatever its file says of it: only tokens that are called special stay apart from texts."""
    codec, lm = tiny()
    save_model(tmp_path, lm)
    codec.tokenizer.add_tokens(["<turn>"])
    save_tokenizer(tmp_path, codec)
    added = codec.tokenizer.token_to_id("<turn>")
    codec = sft.new_codec([], sft.SFTFlags(init=str(tmp_path)))
    ids = codec.encode("a <turn> cook")
    assert codec.tokenizer.token_to_id("<turn>") == added not in ids
    assert codec.text(ids).strip() == "a <turn> cook"


def test_half_of_the_heads_start_with_equal_queries_and_keys():
    """Also where several query heads share a key head: the first query head of the group is the one
    that is equal."""
    codec, _ = tiny()
    example = sft.Example(codec.prompt("a cook"), codec.jd("a job"))
    for heads, kv_heads in ((4, 4), (4, 2), (2, 1)):
        model = sft.new_model(
            codec, [example], sft.SFTFlags(hidden=32, layers=2, heads=heads, kv_heads=kv_heads), 0)
        D = 32 // heads
        for layer in model.model.layers:
            q = layer.self_attn.q_proj.weight.view(kv_heads, heads // kv_heads, D, 32)[:, 0]
            k = layer.self_attn.k_proj.weight.view(kv_heads, D, 32)
            assert [bool((a == b).all()) for a, b in zip(q, k)] == [i < max(1, kv_heads // 2)
                                                                    for i in range(kv_heads)]
