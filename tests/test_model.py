"""The transformer against plain loops; the cache, padding and sampling; its own weights in and
out."""
import json
import math

import pytest
import torch

from model import (Cache, Config, LanguageModel, LoRA, RewardModel, RMSNorm, add_lora, attend_once,
                   copy_trainable, generate, merge_lora, rotary_table, rotate, rows_that_fit,
                   sample)
from plumbing.files import BadInput
from plumbing.weights import load_model, save_model


def tiny(kind=LanguageModel, seed=0, **changes):
    """A model of 2 layers whose weights are large enough that every token matters."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                 rope_theta=500.0, initializer_range=0.4)
    model = kind(Config(**sizes | changes)).eval()
    with torch.no_grad():       # a gain of all ones would hide a gain that is not used
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
    return model


def random_ids(*shape, seed=0):
    return torch.randint(2, 40, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ against plain loops
def slow_norm(x, norm, eps):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * norm.weight


def slow_rotate(x, position, theta):
    """Coordinates i and i + D/2 as one complex number, turned by position / theta^(2i/D)."""
    D = len(x)
    turned = torch.zeros(D)
    for i in range(D // 2):
        angle = position / theta ** (2 * i / D)
        z = complex(x[i], x[i + D // 2]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + D // 2] = z.real, z.imag
    return turned


def slow_attention(xs, layer, c):
    """xs: one vector per token. Each head by itself, each token looking at itself and those before
    it."""
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    q, k, v = ([p.weight @ x for x in xs] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    outputs = []
    for t in range(len(xs)):
        heads = []
        for h in range(H):
            mine = slice(h * D, (h + 1) * D)
            theirs = slice(h // (H // K) * D, (h // (H // K) + 1) * D)
            query = slow_rotate(q[t][mine], t, c.rope_theta)
            keys = [slow_rotate(k[s][theirs], s, c.rope_theta) for s in range(t + 1)]
            scores = [math.exp(float(query @ key) / math.sqrt(D)) for key in keys]
            heads.append(sum(score * v[s][theirs] for s, score in enumerate(scores)) / sum(scores))
        outputs.append(layer.o_proj.weight @ torch.cat(heads))
    return outputs


@torch.no_grad()
def slow_logits(model, ids):
    c = model.config
    xs = [model.model.embed_tokens.weight[i] for i in ids]
    for layer in model.model.layers:
        seen = slow_attention([slow_norm(x, layer.input_layernorm, c.rms_norm_eps) for x in xs],
                              layer.self_attn, c)
        xs = [x + y for x, y in zip(xs, seen)]
        for t, x in enumerate(xs):
            n = slow_norm(x, layer.post_attention_layernorm, c.rms_norm_eps)
            gate = layer.mlp.gate_proj.weight @ n
            xs[t] = x + layer.mlp.down_proj.weight @ (
                gate / (1 + (-gate).exp()) * (layer.mlp.up_proj.weight @ n))
    return torch.stack(
        [model.lm_head.weight @ slow_norm(x, model.model.norm, c.rms_norm_eps) for x in xs])


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_equals_plain_loops(K, tied):
    model = tiny(num_key_value_heads=K, tie_word_embeddings=tied)
    ids = random_ids(2, 7)
    with torch.no_grad():
        logits = model(ids)
    for b in range(2):
        torch.testing.assert_close(logits[b], slow_logits(model, ids[b].tolist()),
                                   atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_that_are_asked_for_are_those_of_the_whole_forward(checkpointing):
    """And so are their gradients."""
    model, ids, found = tiny(initializer_range=0.2), random_ids(3, 7), []
    model.model.checkpointing = checkpointing
    asked = torch.tensor([[0, 0, 1, 1, 0, 0, 1], [0] * 7, [1, 0, 0, 0, 1, 0, 0]]).bool()
    for these in (None, asked):
        model.zero_grad()
        states = model.model(ids, asked=these)
        states = states[asked] if these is None else states
        states.square().sum().backward()
        found.append((states,
                      {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0], found[1])


def test_the_last_block_computes_what_is_asked_for_and_no_more():
    model, ids, tokens = tiny(), random_ids(3, 7), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, inputs, output: tokens.append(output.shape[:-1].numel()))
    model.model(ids, asked=ids.eq(ids[0, 0]) & (torch.arange(7) == 0))
    assert tokens == [21, int((ids[:, 0] == ids[0, 0]).sum())]
    tokens.clear()
    generate(model, [[3, 4, 5], [6, 7]], 1)
    assert tokens == [6, 2]             # of the prompts, only the last tokens


def test_a_token_never_sees_what_is_behind_it():
    model, ids = tiny(), random_ids(1, 9)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 40
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert (before[0, 5:] != after[0, 5:]).any(dim=-1).all()


def test_rotary_is_complex_multiplication():
    D, positions, theta = 8, torch.tensor([0, 1, 5, 30]), 100.0
    x = torch.randn(1, 1, 4, D, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary_table(positions, D, theta))[0, 0]
    for t, position in enumerate(positions.tolist()):
        torch.testing.assert_close(turned[t], slow_rotate(x[0, 0, t], position, theta))


def test_rotary_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(at_q, at_k):
        turned_q = rotate(q, *rotary_table(torch.tensor([at_q]), 8, 100.0))
        turned_k = rotate(k, *rotary_table(torch.tensor([at_k]), 8, 100.0))
        return float((turned_q * turned_k).sum())

    assert product(7, 3) == pytest.approx(product(24, 20), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    # The root mean square of (3, 4) is sqrt(25 / 2).
    expected = torch.tensor([3 / math.sqrt(12.5), 40 / math.sqrt(12.5)])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)
    assert torch.equal(RMSNorm(2, eps=1e-5)(torch.zeros(2)), torch.zeros(2))


def test_reward_is_read_at_the_last_real_token_and_centred():
    model = tiny(RewardModel)
    ids, lengths = random_ids(3, 8), torch.tensor([8, 3, 5])
    scores = model(ids, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = model.score(model.model(ids[b:b + 1, :n]))[0, -1, 0]
        assert scores[b].item() == pytest.approx(alone.item(), abs=1e-5)
    model.center = 0.5
    torch.testing.assert_close(model(ids, lengths), scores - 0.5)


# --------------------------------------------------------------------------------------- generation
@torch.no_grad()
def slow_greedy(model, prompt, max_new):
    """Greedy text without a cache, a mask or a batch: the whole forward for each token."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt):]


def test_cached_greedy_equals_recomputing_everything():
    model = tiny()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 9, 5, 1)]
    texts = generate(model, prompts, 20, temperature=0)
    assert texts == [slow_greedy(model, p, 20) for p in prompts]
    assert len({tuple(t) for t in texts}) == 4      # they do depend on the prompt


class Recorder:
    """Stands in for `sample`: records the logits of each step, then picks greedily."""

    def __init__(self):
        self.steps = []

    def __call__(self, logits, *settings):
        self.steps.append(logits.clone())
        return logits.argmax(-1)


def test_cached_logits_equal_the_full_forward(monkeypatch):
    model = tiny()
    model.config.eos_token_id = -1                  # nobody stops
    recorder = Recorder()
    monkeypatch.setattr("model.sample", recorder)
    prompts = [random_ids(6, seed=1).tolist(), random_ids(4, seed=2).tolist()]
    texts = generate(model, prompts, 8)
    for b, (prompt, text) in enumerate(zip(prompts, texts)):
        with torch.no_grad():
            full = model(torch.tensor([prompt + text]))[0, len(prompt) - 1:-1]
        cached = torch.stack([step[b] for step in recorder.steps])
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
def test_attention_of_one_query_is_that_of_the_library(H, K):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, n, 8, generator=draw) for heads, n in ((H, 1), (K, 6), (K, 6)))
    visible = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1],
                            [0, 0, 0, 0, 0, 1]]).bool()[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    torch.testing.assert_close(attend_once(q, k, v, visible), expected)


def test_a_cache_gives_back_what_was_put_in_and_drops_rows():
    c = Config(40, 32, num_attention_heads=4, num_key_value_heads=2)
    draw = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 7, 8, generator=draw)
    cache = Cache(3, c, 9, "cpu", torch.float32)
    cache.append(k[:, :, :4], v[:, :, :4])
    cache.append(k[:, :, 4:6], v[:, :, 4:6])
    cache.keep(torch.tensor([2, 0]))
    found = cache.append(k[[2, 0], :, 6:], v[[2, 0], :, 6:])
    assert torch.equal(found[0], k[[2, 0]]) and torch.equal(found[1], v[[2, 0]])


def test_left_padding_changes_no_logits():
    model, ids = tiny(), random_ids(1, 5)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = torch.tensor([[False] * 4 + [True] * 5])
    with torch.no_grad():
        logits = model(padded, mask)
        torch.testing.assert_close(logits[:, 4:], model(ids), atol=1e-5, rtol=1e-4)
    assert logits.isfinite().all()              # at the pads too: a NaN would spread in training


def test_a_gigabyte_of_rows_fits():
    assert rows_that_fit(10, 2 ** 27) == 2
    assert rows_that_fit(1, 2 ** 27) == 1 and rows_that_fit(10, 2 ** 40) == 1


def test_a_row_is_the_same_alone_and_in_a_padded_batch():
    model = tiny(seed=3)
    prompts = [random_ids(n, seed=n).tolist() for n in (12, 2, 7)]
    alone = [generate(model, [p], 15, temperature=0)[0] for p in prompts]
    assert generate(model, prompts, 15, temperature=0) == alone


def test_finished_rows_leave_the_batch_and_the_others_do_not_notice():
    model = tiny()
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 9, 5, 4)]
    model.config.eos_token_id = -1
    endless = generate(model, prompts, 12, temperature=0)
    # Let the third token of row 1 be the end; cut by hand what each row says up to there.
    end = model.config.eos_token_id = endless[1][2]
    expected = [t[:t.index(end) + 1] if end in t else t for t in endless]
    lengths = [len(t) for t in expected]
    # The example is one: some stop early, some never.
    assert min(lengths) <= 3 and max(lengths) == 12

    rows = []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output)))
    assert generate(model, prompts, 12, temperature=0) == expected
    hook.remove()
    assert rows == [sum(n > t for n in lengths) for t in range(12)]


def test_generation_stops_when_all_have_finished():
    model, calls = tiny(), []
    prompt = random_ids(4).tolist()
    model.config.eos_token_id = generate(model, [prompt], 1, temperature=0)[0][0]
    model.model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, [prompt, prompt], 30, temperature=0) == [[model.config.eos_token_id]] * 2
    assert len(calls) == 1


def test_pad_and_eos_ids_inside_a_prompt_are_real_tokens():
    model = tiny(seed=5)
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    prompts = [[pad, 7, 8], [7, 8], [eos, 7, 8], [7, pad, eos, 8], [9] * 6]
    texts = generate(model, prompts, 10, temperature=0)
    assert texts == [slow_greedy(model, p, 10) for p in prompts]
    assert len({tuple(t) for t in texts[:4]}) == 4


def test_prompts_that_do_not_fit_at_once_are_continued_in_parts(monkeypatch):
    model, prompts = tiny(), [random_ids(n, seed=n).tolist() for n in (3, 9, 6, 1, 4)]
    at_once, widths = generate(model, prompts, 10, temperature=0), []
    monkeypatch.setattr("model.rows_that_fit",
                        lambda most, numbers: widths.append((most, numbers)) or min(most, 2))
    assert generate(model, prompts, 10, temperature=0) == at_once
    # 2 layers, 2 key heads of 8 numbers, keys and values, 19 tokens; then each part of at most 2
    # prompts is asked again.
    assert widths == [(5, 2 * 2 * 2 * 8 * 19), (2, 2 * 2 * 2 * 8 * 19), (2, 2 * 2 * 2 * 8 * 16),
                      (1, 2 * 2 * 2 * 8 * 14)]


def test_parts_are_sampled_with_the_same_settings(monkeypatch):
    model, asked, draw = tiny(), set(), torch.Generator()
    monkeypatch.setattr("model.rows_that_fit", lambda most, numbers: min(most, 2))
    monkeypatch.setattr("model.sample",
                        lambda logits, *settings: asked.add(settings) or logits.argmax(-1))
    generate(model, [[3], [4, 5], [6]], 4, 0.7, 0.8, draw)
    assert asked == {(0.7, 0.8, draw)}


def test_generation_repeats_with_the_same_generator():
    model, prompts = tiny(initializer_range=0.1), [[3, 4], [5, 6, 7]]
    one, two, other = (generate(model, prompts, 10, generator=torch.Generator().manual_seed(s))
                       for s in (1, 1, 2))
    assert one == two != other


def test_temperature_0_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.9]])
    for seed in range(20):
        assert sample(logits, temperature=0,
                      generator=torch.Generator().manual_seed(seed)).tolist() == [1, 0]


def frequencies(logits, n=20000, **settings):
    drawn = sample(logits.expand(n, -1), generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature):
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0])
    weights = torch.tensor([math.exp(v / temperature) for v in logits.tolist()])
    torch.testing.assert_close(frequencies(logits, temperature=temperature),
                               weights / weights.sum(), atol=0.012, rtol=0)


@pytest.mark.parametrize("top_p, kept", [(0.01, {2}), (0.4, {2}), (0.6, {2, 0}), (0.9, {2, 0, 3}),
                                         (0.97, {2, 0, 3, 1}), (1.0, {2, 0, 3, 1})])
def test_top_p_keeps_the_smallest_nucleus(top_p, kept):
    probs = torch.tensor([0.3, 0.05, 0.5, 0.15])
    found = frequencies(probs.log(), top_p=top_p)
    expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
    torch.testing.assert_close(found, expected / expected.sum(), atol=0.012, rtol=0)
    assert set(found.nonzero().flatten().tolist()) == kept


def test_top_p_is_per_row():
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.3, 0.6]]).log()
    drawn = {tuple(sample(logits, top_p=0.8, generator=torch.Generator().manual_seed(s)).tolist())
             for s in range(50)}
    assert drawn == {(0, 1), (0, 2)}


@pytest.mark.parametrize("rand, drawn", [(0.0, 3), (1 - 2 ** -24, 1), (0.5, 3), (0.75, 1)])
def test_the_ends_of_the_uniform_draw_no_impossible_token(rand, drawn, monkeypatch):
    """Tokens 0, 2 and 4 have probability 0; u = 1 - rand goes from almost 0 to 1."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, rand))
    logits = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]]).log()
    assert sample(logits).tolist() == [drawn]


# ---------------------------------------------------------------------------------------- adapters
@torch.no_grad()
def test_fresh_adapters_change_nothing_and_merging_changes_nothing():
    model, ids = tiny(), random_ids(2, 6)
    plain = model(ids)
    add_lora(model, LoRA("", 2, 6.0, ["q_proj", "down_proj"]))
    assert torch.equal(model(ids), plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all(".lora_" in name for name in trained)      # A and B
    for p in trained.values():
        p.normal_(std=0.1)
    adapted = model(ids)
    merge_lora(model)
    torch.testing.assert_close(model(ids), adapted, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert (adapted - plain).abs().max() > 0.1


@torch.no_grad()
def test_merging_leaves_a_model_with_the_same_base_as_it_was():
    model, ids = tiny(), random_ids(2, 6)
    add_lora(model, LoRA("", 2, 6.0, ["q_proj", "down_proj"]))
    for p in model.parameters():
        if p.requires_grad:
            p.normal_(std=0.1)
    reference = copy_trainable(model)
    before = reference(ids)
    merge_lora(model)
    assert torch.equal(reference(ids), before)


def test_under_autocast_the_cache_holds_what_attention_computes_with(monkeypatch):
    kinds, real = [], Cache.__init__

    def noted(self, B, c, capacity, device, dtype):
        kinds.append(dtype)
        real(self, B, c, capacity, device, dtype)
    monkeypatch.setattr(Cache, "__init__", noted)
    generate(tiny(), [[5, 6]], 3)
    with torch.autocast("cpu", torch.bfloat16):
        generate(tiny(), [[5, 6]], 3)
    assert kinds == [torch.float32] * 2 + [torch.bfloat16] * 2


# ------------------------------------------------------------------------------- weights in and out
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_a_language_model(tmp_path, tied):
    model = tiny(tie_word_embeddings=tied)
    save_model(tmp_path / "new" / "folder", model)
    again = load_model(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    ids = random_ids(2, 6)
    assert torch.equal(model(ids), again(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_a_reward_model(tmp_path, tied):
    model = tiny(RewardModel, tie_word_embeddings=tied)
    model.center = -1.25
    save_model(tmp_path, model)
    again = load_model(tmp_path, RewardModel)
    ids, lengths = random_ids(2, 6), torch.tensor([6, 4])
    assert again.center == -1.25
    assert torch.equal(model(ids, lengths), again(ids, lengths))


def saved(folder, model=None):
    save_model(folder, model or tiny())
    return folder


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_missing_weights_are_refused(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_refused(tmp_path, size):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match="model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("change",
                         [{"vocab_size": 41}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3},
                          {"intermediate_size": 50}, {"tie_word_embeddings": False}])
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, change):
    path = saved(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match="does not fit"):
        load_model(tmp_path)


def test_a_reward_model_is_no_language_model(tmp_path):
    with pytest.raises(BadInput, match="LanguageModel"):
        load_model(saved(tmp_path, tiny(RewardModel)))


@pytest.mark.parametrize("content", [b"", b"not json", b"[1, 2]", b"null", b"{}", b"\xff\xfe",
                                     b'{"vocab_size": 40, "hidden_size": "big"}'])
def test_a_garbage_config_is_refused(tmp_path, content):
    (saved(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match="config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 30}, {"num_key_value_heads": 3}, {"num_key_value_heads": 8},
              {"hidden_size": 12}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}])
def test_sizes_that_do_not_divide_are_refused(sizes):
    good = dict(vocab_size=40, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    Config(**good)
    with pytest.raises(BadInput, match="num_attention_heads"):
        Config(**good | sizes)
