"""Weights of others in, ours out, and adapters: transformers and peft must compute what we
compute."""
import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import (AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig,
                  get_peft_model)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import girl
import plumbing.plan
import ppo
from aids import jd_states
from data import Codec, train_tokenizer
from plumbing.tokenizer import plain_text_only, save_tokenizer
from model import (Config, LanguageModel, LoRA, RewardModel, add_lora, copy_trainable, generate,
                   is_target, merge_lora)
from conftest import NotedCritic
from plumbing.files import BadInput
from plumbing.weights import is_reward, load_model, read_config, save_model
from test_model import random_ids, saved, tiny

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=0.2, eos_token_id=1, pad_token_id=0, bos_token_id=2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
OTHERS = {
    "Llama, as many heads": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "Llama, shared heads, tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "Llama 3.1, stretched": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama, heads of another size": ("Llama", {"head_dim": 16}),
    "Mistral": ("Mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                            "sliding_window": None}),
    "Mistral, within its window": ("Mistral", {"sliding_window": 24}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3, heads of the usual size": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 4,
                                                 "tie_word_embeddings": False}),
}


def other(name):
    """A random model of transformers; every gain and bias is random too, so that one that is not
    used shows."""
    family, changes = OTHERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, family + "ForCausalLM")(
        getattr(transformers, family + "Config")(**SIZES | changes)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                p.normal_(std=0.5)
    return model


# --------------------------------------------------------------------------------------- weights in
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_transformers_gives_its_own_logits_here(name, tmp_path):
    theirs = other(name)
    theirs.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path).eval(), random_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_greedy_text_of_a_left_padded_batch_is_theirs(name, tmp_path):
    theirs = other(name)
    theirs.save_pretrained(tmp_path)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 9, 6, 1)]
    ours = generate(load_model(tmp_path).eval(), prompts, 14, temperature=0)
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 9 - len(prompt):], mask[b, 9 - len(prompt):] = torch.tensor(prompt), 1
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=14,
                          do_sample=False)[:, 9:].tolist()
    assert ours == [row[:row.index(1) + 1] if 1 in row else row for row in out]
    assert len({tuple(row) for row in ours}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_float32(dtype, tmp_path):
    other("Qwen2").to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = random_ids(2, 20)
    ours = load_model(tmp_path).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_shards_are_put_together(tmp_path):
    theirs, ids = other("Llama, as many heads"), random_ids(2, 20)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).eval()(ids), theirs(ids).logits,
                                   atol=1e-5, rtol=0)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(next(tmp_path.glob("*-00001-*.safetensors")),
                tmp_path.parent / "outside.safetensors")
    for bad in ("../outside.safetensors", str(tmp_path.parent / "outside.safetensors"),
                "model.bin", "..", ""):
        some = dict.fromkeys(list(index["weight_map"])[:1], bad)
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | some}))
        with pytest.raises(BadInput, match="index.json: a shard must be a .safetensors file of the "
                                           "same folder"):
            load_model(tmp_path)
    for content in ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "{"):
        path.write_text(content)
        with pytest.raises(BadInput, match="index.json"):
            load_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    other("Llama, as many heads").save_pretrained(tmp_path, max_shard_size="20KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last)
    with pytest.raises(BadInput, match=f"{last.name}: {name} is in another shard too"):
        load_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    other("Llama, as many heads").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BadInput, match=gone.name):
        load_model(tmp_path)


@pytest.mark.parametrize("change, says", [
    ({"model_type": "gpt2"},
     "model_type must be one of llama, mistral, qwen2, qwen3, found 'gpt2'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"model_type": None}, "found None"),
    ({"attention_bias": True}, "attention_bias True"), ({"mlp_bias": True}, "mlp_bias True"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
     "rotary embedding {'rope_type': 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
    ({"hidden_size": None}, "has no hidden_size"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_interleaved": True}, "rope_interleaved True"),
    ({"is_causal": False}, "is_causal False"),
    ({"layer_types": ["full_attention", "linear_attention"]},
     "layer_types ['full_attention', 'linear"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types ['sliding_attention'"),
    ({"layer_types": "x"}, "layer_types 'x'"),
    ({"rope_parameters": "x"}, "rope_parameters and rope_scaling must be objects"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}},
     "has rope_parameters and another rope_scaling; keep the one"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
     "must be objects that hold for all layers"),
    ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
     "two different original_max_position_embeddings"),
    ({"rope_theta": "x"}, "rope_theta cannot be 'x'"),
    ({"rope_parameters": LLAMA3 | {"factor": 0}}, "is not supported"),
    ({"rope_parameters": None, "rope_theta": 0}, "rope_theta cannot be 0"),
    ({"rms_norm_eps": "1"}, "rms_norm_eps cannot be '1'"),
    ({"eos_token_id": "x"}, "eos_token_id cannot be 'x'"),
    ({"eos_token_id": [-1]}, "eos_token_id cannot be -1"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings cannot be 1"),
    ({"model_type": "mistral", "sliding_window": "x"}, "whole numbers"),
    ({"max_position_embeddings": "x"}, "whole numbers"),
    ({"vocab_size": 0}, "vocab_size cannot be 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers cannot be True"),
    ({"num_attention_heads": 5}, "5 must divide hidden_size"),
    ({"hidden_size": "32"}, "config.json: "), ({"head_dim": 7}, "must be even")])
def test_what_this_transformer_cannot_be_is_refused(change, says, tmp_path):
    other("Llama, shared heads, tied").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    changed = json.loads(path.read_text()) | change
    if "rope_theta" in change and "rope_parameters" not in change:
        changed.pop("rope_parameters")
    path.write_text(json.dumps(changed))
    with pytest.raises(BadInput) as e:
        load_model(tmp_path)
    assert says in str(e.value) and "config.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, says", [
    (lambda w: w.pop("model.norm.weight"), "missing model.norm.weight"),
    (lambda w: w.update(odd=torch.zeros(2)), "unexpected odd"),
    (lambda w: [w.pop(k) for k in list(w) if "mlp" in k], "and more"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
     r"model.norm.weight is \[31\], expected \[32\]"),
    (lambda w: w.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
     "torch.int8; only float32")])
def test_missing_extra_and_odd_tensors_are_refused(change, says, tmp_path):
    weights = load_file(saved(tmp_path) / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="model.safetensors: does not fit its config as a "
                                       f"LanguageModel: .*{says}"):
        load_model(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(BadInput,
                       match="pytorch_model.bin: a pickle can run any code and is not opened"):
        load_model(tmp_path)


def test_a_window_limits_the_context(tmp_path):
    other("Mistral, within its window").save_pretrained(tmp_path)
    assert read_config(tmp_path)[0].max_position_embeddings == 24
    raw = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 9000}
    # As Hugging Face reads null, and no entry.
    for window, limit in ((None, 9000), ("missing", 4096)):
        (tmp_path / "config.json").write_text(json.dumps(
            {k: v for k, v in (raw | {"sliding_window": window}).items() if v != "missing"}))
        assert read_config(tmp_path)[0].max_position_embeddings == limit


def test_old_files_may_hold_more_than_the_weights(tmp_path):
    """A tied head once more, tables of the rotary embedding, and null for as many key heads as
    query heads."""
    model = tiny(num_key_value_heads=4)
    weights = load_file(saved(tmp_path, model) / "model.safetensors")
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert torch.equal(load_model(tmp_path)(random_ids(2, 5)), model(random_ids(2, 5)))


def with_another_head(folder, name="Qwen2, tied", dtype=torch.float32):
    """A file that holds a head of its own, though its config says that head and embedding are
    one."""
    other(name).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    stored["lm_head.weight"] = (0.3 * torch.randn(40, 32)).to(dtype)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["Qwen2, tied", "Qwen3", "Llama, shared heads, tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_head_is_used_whatever_the_config_says_of_it(name, dtype, tmp_path):
    folder, ids = with_another_head(tmp_path / "in", name, dtype), random_ids(2, 20)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder).eval()
    # And it is not lost on the way out.
    again = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "out", ours)).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_a_stored_head_stays_under_adapters_and_in_what_is_merged(tmp_path):
    base, ids = with_another_head(tmp_path / "base"), random_ids(2, 9)
    model = load_model(base)
    add_lora(model, LoRA(str(base), 3, 12.0, ["q_proj"]))
    shake(model, 1)
    save_model(tmp_path / "adapters", model)
    # girl.json as an earlier version wrote it, which knew only the base's config
    path = tmp_path / "adapters" / "girl.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    again = load_model(tmp_path / "adapters")
    with torch.no_grad():
        before = model(ids)
        assert torch.equal(again(ids), before)
        merge_lora(again)
        torch.testing.assert_close(load_model(saved(tmp_path / "merged", again))(ids), before,
                                   atol=1e-5, rtol=0)


def test_the_same_head_once_more_in_another_precision_is_tied(tmp_path):
    model = tiny()
    stored = load_file(saved(tmp_path, model) / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file({n: t.bfloat16() for n, t in stored.items()}
              | {"lm_head.weight": stored["lm_head.weight"].bfloat16().float()},
              tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("family, heads",
                         [("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)])
def test_a_missing_number_of_key_heads_is_what_transformers_takes(family, heads, tmp_path):
    raw = {"model_type": family,
           **{k: SIZES[k]
              for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
           "num_attention_heads": 4 if family == "llama" else 32, "hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_key_value_heads == heads
    assert read_config(tmp_path)[0].num_key_value_heads == heads
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_key_value_heads": None}))
    assert read_config(tmp_path)[0].num_key_value_heads == raw["num_attention_heads"]


# -------------------------------------------------------------------------------------- weights out
FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True, "head_dim": 16},
            "llama 3.1": {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
                          "tie_word_embeddings": False}}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_our_logits(name, tmp_path):
    ours = tiny(initializer_range=0.1, **FAMILIES[name])
    theirs, info = AutoModelForCausalLM.from_pretrained(saved(tmp_path, ours),
                                                        output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(ours(random_ids(2, 20)), theirs.eval()(random_ids(2, 20)).logits,
                                   atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_our_rewards(name, tmp_path):
    """In a batch padded on the right, with the pad that config.json names, up to the centre;
    end-of-text ends each row."""
    ours = tiny(RewardModel, initializer_range=0.1, **FAMILIES[name])
    ours.center = 0.75
    theirs, info = AutoModelForSequenceClassification.from_pretrained(saved(tmp_path, ours),
                                                                      output_loading_info=True)
    assert not any(info.values()) and theirs.config.num_labels == 1
    ids, lengths = random_ids(2, 9), torch.tensor([9, 6])
    ids[0, 8] = ids[1, 5] = ours.config.eos_token_id
    ids[1, 6:] = ours.config.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, lengths) + 0.75, theirs.eval()(ids).logits[:, 0],
                                   atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_what_came_in_goes_out_again(name, tmp_path):
    theirs, ids = other(name), random_ids(2, 20)
    theirs.save_pretrained(tmp_path / "in")
    again = AutoModelForCausalLM.from_pretrained(
        saved(tmp_path / "out", load_model(tmp_path / "in"))).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------- adapters
def with_adapters(folder, kind=LanguageModel, targets=("q_proj", "v_proj", "down_proj"), seed=1,
                  **changes):
    """A model on a base in this folder, with adapters that do something."""
    base = load_model(saved(folder / "base", tiny(initializer_range=0.1, **changes)))
    model = base if kind is LanguageModel else RewardModel(base.config, body=base.model)
    add_lora(model, LoRA(str(folder / "base"), 3, 12.0, list(targets)))
    shake(model, seed)
    return model.eval()


def shake(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)


def test_adapters_start_as_nothing_and_compute_their_formula(tmp_path):
    base = tiny()
    ids, before = random_ids(2, 7), base(random_ids(2, 7))
    q = base.model.layers[1].self_attn.q_proj.weight.detach().clone()
    add_lora(base, LoRA("base", 3, 12.0, ["q_proj", "up_proj"]))
    assert torch.equal(base(ids), before)
    trained = {n: p for n, p in base.named_parameters() if p.requires_grad}
    assert {n.split(".", 3)[3] for n in trained} == {
        f"{m}.lora_{x}.weight" for m in ("self_attn.q_proj", "mlp.up_proj") for x in "AB"}
    shake(base, 0)
    layer, x = base.model.layers[1].self_attn.q_proj, torch.randn(5, 32)
    torch.testing.assert_close(layer(x),
                               x @ (q + 12 / 3 * layer.lora_B.weight @ layer.lora_A.weight).T)
    assert not torch.allclose(base(ids), before, atol=1e-3)
    base(ids).sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for n, p in base.named_parameters() if n not in trained)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_word_embeddings": False}])
def test_merged_adapters_are_the_same_function_in_plain_weights(changes, tmp_path):
    model, ids = with_adapters(tmp_path, **changes), random_ids(2, 9)
    with torch.no_grad():
        before = model(ids)
        merge_lora(model)
        torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)
        save_model(tmp_path / "merged", model)
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids), before, atol=1e-5, rtol=0)
    assert not list((tmp_path / "merged").glob("adapter*"))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_word_embeddings": False}])
def test_saved_adapters_load_here_and_in_peft(changes, tmp_path):
    model, ids = with_adapters(tmp_path, **changes), random_ids(2, 9)
    save_model(tmp_path / "adapters", model)
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "adapters")(ids), model(ids))
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=0)


def test_a_reward_model_of_adapters_loads_here_and_in_peft(tmp_path):
    model = with_adapters(tmp_path, RewardModel)
    model.center = 0.5
    save_model(tmp_path / "adapters", model)
    ids, lengths = random_ids(2, 9), torch.tensor([9, 6])
    ids[1, 6:] = model.config.pad_token_id
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapters",
                                                                    num_labels=1).eval()
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "adapters", RewardModel)(ids, lengths),
                           model(ids, lengths))
        torch.testing.assert_close(theirs(ids).logits[:, 0], model(ids, lengths) + 0.5,
                                   atol=1e-5, rtol=0)


PEFT = {"names": ["k_proj", "gate_proj"], "all-linear": "all-linear",
        "regular expression": r".*\.1\..*(q_proj|down_proj)",
        "ends of names": ["layers.0.self_attn.q_proj", "mlp.up_proj"],
        "whole names": ["model.layers.1.self_attn.v_proj"]}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
@pytest.mark.parametrize("targets", PEFT)
def test_adapters_of_peft_load_here(targets, kind, beside, tmp_path):
    """As peft saves them: without a config.json, with a second head in modules_to_save; and saved
    by us, for peft again."""
    base, scores = saved(tmp_path / "base", tiny(initializer_range=0.1)), kind is RewardModel
    model = (AutoModelForSequenceClassification.from_pretrained(base, num_labels=1) if scores
             else AutoModelForCausalLM.from_pretrained(base))
    model.config.pad_token_id = 0
    theirs = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules=PEFT[targets], init_lora_weights=False,
                          task_type="SEQ_CLS" if scores else "CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    if beside:
        shutil.copy(base / "config.json", tmp_path / "adapters")
    ids, ours = random_ids(2, 9), load_model(tmp_path / "adapters", kind).eval()
    save_model(tmp_path / "again", ours)
    again = AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM
    again = again.from_pretrained(tmp_path / "again", **{"num_labels": 1} if scores else {}).eval()
    with torch.no_grad():
        here = ours(ids, torch.tensor([9, 9]))[:, None] if scores else ours(ids)
        torch.testing.assert_close(here, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits,
                                   atol=1e-5, rtol=0)


def test_target_modules_are_read_as_peft_reads_them():
    name = "model.layers.1.self_attn.q_proj"
    assert all(is_target(name, t) for t in (["q_proj"], ["x", "self_attn.q_proj"], [name],
                                            "all-linear", r".*\.1\..*q_proj"))
    # An end of a name begins at a dot, and a regular expression is for the whole name.
    assert not any(is_target(name, t)
                   for t in (["proj"], ["self_attn"], ["ayers.1.self_attn.q_proj"], [], r"q_proj",
                             r"model\.layers", "q_proj"))


def test_every_key_that_peft_may_set_is_known_or_refused(tmp_path):
    """Whatever is not its default is refused by name, but for the few that change nothing in what
    is computed."""
    save_model(tmp_path / "adapters", with_adapters(tmp_path))
    path = tmp_path / "adapters" / "adapter_config.json"
    raw = json.loads(path.read_text())
    defaults = LoraConfig(r=3, target_modules=["q_proj"]).to_dict()
    path.write_text(json.dumps(defaults | raw, default=str))
    load_model(tmp_path / "adapters")
    neutral = {"bias": None, "modules_to_save": ["score", "classifier", "score"],
               "peft_version": "9", "revision": "x", "lora_dropout": 0.1, "inference_mode": False,
               "task_type": None, "auto_mapping": {"x": "y"}, "runtime_config": {"x": 1},
               "megatron_core": "x", "qalora_group_size": 8}
    path.write_text(json.dumps(raw | neutral))
    load_model(tmp_path / "adapters")
    others = set(defaults) - set(neutral) - {f.name for f in fields(LoRA)}
    assert len(others) > 25
    for name in (*others, "invented_tomorrow"):
        for value in ("x", [1], {"a": 1}, 7):
            path.write_text(json.dumps(raw | {name: value}))
            with pytest.raises(BadInput, match=f"adapter_config.json: {name} .* is not supported"):
                load_model(tmp_path / "adapters")


@pytest.mark.parametrize("name, value",
                         [("rope_theta", 900.0), ("rms_norm_eps", 1e-2), ("model_type", "qwen3")])
def test_a_config_beside_adapters_does_not_overrule_that_of_their_base(name, value, tmp_path):
    save_model(tmp_path / "adapters", with_adapters(tmp_path))
    (tmp_path / "adapters" / "girl.json").unlink()
    raw = json.loads((tmp_path / "base" / "config.json").read_text()) | {
        name: value, "qk_norm": name == "model_type"}
    (tmp_path / "adapters" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="adapters/config.json: (qk_norm|rope_theta|rms_norm_eps) is "
                                       ".*, but .* in its base"):
        load_model(tmp_path / "adapters")


def test_what_else_adapters_come_with_is_named(tmp_path):
    save_model(tmp_path / "adapters", with_adapters(tmp_path))
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    stored = load_file(path)
    save_file(stored | {"base_model.model.lm_head.weight": torch.zeros(41, 32)}, path)
    with pytest.raises(BadInput,
                       match="also holds lm_head.weight, .* merge the adapters with peft first"):
        load_model(tmp_path / "adapters")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(BadInput,
                       match="adapter_model.bin: a pickle can run any code and is not opened"):
        load_model(tmp_path / "adapters")


def test_the_body_alone_is_read_where_the_head_is_tied(tmp_path):
    base = saved(tmp_path / "base", tiny(initializer_range=0.1))
    transformers.AutoModel.from_pretrained(base).save_pretrained(tmp_path / "body")
    assert "embed_tokens.weight" in load_file(tmp_path / "body" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "body")(random_ids(2, 9)),
                           load_model(base)(random_ids(2, 9)))


def test_what_wrapped_a_model_is_named(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    save_file({f"_orig_mod.{name}": t for name, t in load_file(path).items()}, path)
    with pytest.raises(BadInput, match="its names begin with _orig_mod.; save the unwrapped model"):
        load_model(tmp_path)


@pytest.mark.parametrize("changes, scores", [
    ({"architectures": ["LlamaForSequenceClassification"], "num_labels": ...}, True),
    ({"architectures": ["LlamaForCausalLM"], "num_labels": 2}, False),
    ({"architectures": 5}, False), ({"architectures": "LlamaForSequenceClassification"}, True),
    ({"architectures": None}, True), ({"architectures": None, "num_labels": ...}, False)])
def test_what_a_folder_holds_is_known_by_its_architecture(changes, scores, tmp_path):
    saved(tmp_path, tiny(RewardModel))
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if v is not ...}))
    assert is_reward(tmp_path) == scores


def test_export_knows_a_reward_model_that_peft_saved(tmp_path, capsys):
    base = saved(tmp_path / "base", tiny(initializer_range=0.1, vocab_size=300))
    tokenizer = train_tokenizer(["a cook"], 290)
    tokenizer.add_special_tokens(["<|free|>"])
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][1:]               # token 0 is any other
    codec = Codec(plain_text_only(Tokenizer.from_str(json.dumps(raw))), 20, 20)
    save_tokenizer(base, codec)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"],
                                              init_lora_weights=False, task_type="SEQ_CLS")).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    assert girl.main(["export", "--merge", "--model", str(tmp_path / "adapters"),
                      "--out", str(tmp_path / "plain")]) == 0
    assert "RewardModel, plain weights" in capsys.readouterr().out
    # A base without a pad gets one that no text has: transformers looks for the last token by it.
    assert (json.loads((tmp_path / "plain" / "config.json").read_text())["pad_token_id"]
            == codec.pad == tokenizer.token_to_id("<|free|>"))
    ids = torch.tensor([codec.prompt("a cook") + codec.jd("a")])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, theirs(input_ids=ids).logits,
                                   atol=1e-5, rtol=0)


def frozen_tensors(model):
    return {p.data_ptr() for p in model.parameters() if not p.requires_grad}


def test_policy_reference_and_reward_model_share_one_base_and_train_apart(tmp_path):
    save_model(tmp_path / "sft", with_adapters(tmp_path))
    save_model(tmp_path / "reward", with_adapters(tmp_path, RewardModel, ["k_proj"], seed=2))
    policy = load_model(tmp_path / "sft")
    judge = load_model(tmp_path / "reward", RewardModel, share_base_with=policy)
    reference = copy_trainable(policy)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert len(frozen_tensors(policy)) == len(base)
    assert frozen_tensors(reference) == frozen_tensors(policy) >= frozen_tensors(judge)
    assert len(frozen_tensors(judge)) == len(base)
    mine = [{p.data_ptr() for p in m.parameters() if p.requires_grad}
            for m in (policy, reference, judge)]
    assert all(mine) and not mine[0] & mine[1] and not (mine[0] | mine[1]) & mine[2]
    # Each computes what it computed alone; and a step of the policy moves nobody else.
    ids, lengths = random_ids(2, 9), torch.tensor([9, 6])
    alone = load_model(tmp_path / "reward", RewardModel)
    before = policy(ids).detach()
    assert torch.equal(judge(ids, lengths), alone(ids, lengths))
    assert torch.equal(reference(ids), before)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy(ids).logsumexp(-1).sum().backward()
    optimizer.step()
    assert not torch.allclose(policy(ids), before)
    assert torch.equal(judge(ids, lengths), alone(ids, lengths))
    assert torch.equal(reference(ids), before)


def test_the_critic_reads_the_states_of_the_reward_model_s_adapters_not_of_the_policy_s(tmp_path):
    save_model(tmp_path / "sft", with_adapters(tmp_path))
    save_model(tmp_path / "reward", with_adapters(tmp_path, RewardModel, ["k_proj"], seed=2))
    policy = load_model(tmp_path / "sft")
    judge = load_model(tmp_path / "reward", RewardModel, share_base_with=policy)
    alone = load_model(tmp_path / "reward", RewardModel)
    reference, prompts = copy_trainable(policy), random_ids(6, 5).tolist()
    codec = SimpleNamespace(max_jd=4, eos=policy.config.eos_token_id)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for seed in range(2):                   # before a step of the policy's adapters, and after it
        critic = NotedCritic(policy.config.hidden_size)
        draw, cpu = torch.Generator().manual_seed(seed), torch.device("cpu")
        e, _ = ppo.roll_out(policy, reference, judge, critic, prompts, codec, ppo.PPOFlags(),
                            0.05, draw, cpu)
        for found, prompt, tokens, mask in zip(critic.states, prompts, e.tokens, e.mask):
            row = torch.tensor([prompt + tokens[mask].tolist()])
            start, found = len(prompt) - 1, found[mask]
            torch.testing.assert_close(found, alone.model(row)[0, start:-1].cumsum(0),
                                       atol=1e-4, rtol=1e-5)
            assert not torch.allclose(found, policy.model(row)[0, start:-1], atol=1e-2)
        ppo.update(policy, optimizer, e, ppo.PPOFlags(), draw, cpu)
    assert all(p.grad is None for p in judge.parameters())


@pytest.mark.parametrize("change, says", [
    ({"r": 0}, "r must be a whole number of at least 1, found 0"),
    ({"target_modules": ["c_attn"]}, "some of q_proj,k_proj"),
    ({"target_modules": []}, "LoRA of rank"), ({"r": "3"}, "not a valid LoRA config"),
    ({"r": 4}, "expected"), ({"use_dora": True}, "use_dora True is not supported"),
    ({"bias": "all"}, "bias 'all'"), ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"target_modules": ["q_proj"]}, "unexpected"),
    ({"target_modules": ["layers.9.self_attn.q_proj", "v_proj"]}, "the layers some of"),
    ({"target_modules": ".*c_attn"}, "on .*c_attn"),
    ({"target_modules": "(" }, "not a valid LoRA config"), ({"target_modules": None}, "found None"),
    ({"target_modules": ["lm_head"]}, "['lm_head']"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules ['q_proj'] is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"alora_invocation_tokens": [0, 0]}, "alora_invocation_tokens [0, 0] is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
    ({"modules_to_save": "score"}, "modules_to_save 'score'"),
    ({"modules_to_save": 5}, "modules_to_save 5"),
    ({"base_model_name_or_path": None}, "must name the folder of its base model"),
    ({"lora_alpha": "8"}, "lora_alpha must be a number above 0, found '8'"),
    ({"r": ...}, "it has no r"),
    ({"base_model_name_or_path": "/nowhere"}, "its base model /nowhere is missing"),
    ({"base_model_name_or_path": "{self}"}, "or not a whole model"),
    ({"lora_alpha": None}, "not a valid LoRA config")])
def test_adapters_that_cannot_be_ours_are_refused(change, says, tmp_path):
    save_model(tmp_path / "adapters", with_adapters(tmp_path))
    path = tmp_path / "adapters" / "adapter_config.json"
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "adapters")
    change = {k: str(tmp_path / "adapters") if v == "{self}" else v for k, v in change.items()}
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items()
                                if v is not ...}))
    with pytest.raises(BadInput) as e:
        load_model(tmp_path / "adapters")
    assert says in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------ checkpointing
def gradients(model, loss):
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_gradient_and_keeps_less():
    kept = []

    def plain(model):
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(x.numel()) or x, lambda x: x):
            return model(random_ids(3, 12)).logsumexp(-1).square().sum()
    model, counts = tiny(initializer_range=0.1), []
    found = []
    for model.model.checkpointing in (False, True):
        kept.clear()
        found.append(gradients(model, plain))
        counts.append(sum(kept))
    torch.testing.assert_close(found[0], found[1])
    assert counts[1] < 0.5 * counts[0]


def test_checkpointing_knows_shared_prompts():
    """The prompts are read in one pass and continued in a second: computing the first again must
    not look like the second."""
    model = tiny(RewardModel, initializer_range=0.1)
    rows = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11, 12], [13, 14, 15])]

    def shared(model):
        last, earlier, in_jd = jd_states(model.model, rows, torch.device("cpu"))
        return model.head(last).square().sum() + (earlier * in_jd[..., None]).square().sum()
    found = [gradients(model, shared) for model.model.checkpointing in (False, True)]
    torch.testing.assert_close(found[0], found[1])


# ----------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_word_embeddings": False},
                                     {"qk_norm": True, "head_dim": 16}])
def test_the_plan_counts_the_parameters_there_are(changes, rank):
    targets = ["q_proj", "o_proj", "up_proj"]
    policy = tiny(**changes)
    judge = RewardModel(policy.config)
    plan = plumbing.plan.plan(policy.config, ppo.PPOFlags(), rank, targets)
    assert plan["parameters"] == sum(p.numel() for p in policy.parameters())
    if rank:
        add_lora(policy, LoRA("base", rank, 8.0, targets))
    assert plan["trained"] == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if not rank:
        weights = 2 * sum(p.numel() for p in policy.parameters()) + sum(
            p.numel() for p in judge.model.parameters())
        assert plan["memory"]["weights"] == 4 * weights


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("rank, targets", [(0, ALL), (4, ALL), (4, ["q_proj", "v_proj"]),
                                           (4, ["o_proj", "down_proj"])])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "head_dim": 32}, {"qkv_bias": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_counts_what_autograd_keeps(rank, targets, changes, checkpointing):
    """Every tensor that is kept for the backward pass of the blocks, each storage once, without the
    parameters."""
    config = Config(vocab_size=40, hidden_size=64, intermediate_size=160, num_hidden_layers=8,
                    num_attention_heads=4, num_key_value_heads=2,
                    max_cv_tokens=20, max_jd_tokens=48, **changes)
    lm = LanguageModel(config)
    flags = ppo.PPOFlags(minibatch=4, accumulate=2, checkpointing=checkpointing)
    if rank:
        add_lora(lm, LoRA("base", rank, 8.0, targets))
    lm.model.checkpointing, kept = checkpointing, {}
    parameters = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        lm.model(random_ids(2, 100))
    found = sum(size for _, size in kept.values())
    plan = plumbing.plan.plan(config, flags, rank, targets)["memory"]["activations"]
    # Computed again in the backward pass, one at a time.
    one_block = plan - 4 * 200 * 8 * 64 if checkpointing else 0
    assert plan - one_block == pytest.approx(found, rel=0.05 if not checkpointing else 0.35)


def test_checkpointing_and_adapters_save_what_the_plan_says_and_flops_add_up():
    config, flags = Config(vocab_size=1000, hidden_size=64), ppo.PPOFlags()
    full, lora = plumbing.plan.plan(config, flags), plumbing.plan.plan(config, flags, 4, ["q_proj"])
    less = plumbing.plan.plan(config, replace(flags, checkpointing=True))
    assert lora["memory"]["peak"] < full["memory"]["peak"]
    assert less["memory"]["activations"] < full["memory"]["activations"]
    assert less["flops"]["update"] > full["flops"]["update"] > lora["flops"]["update"]
    assert full["flops"]["iteration"] == sum(full["flops"][k]
                                             for k in ("rollout", "scoring", "update"))
    # By hand: three matrix products for each weight and token, 2 operations each; attention over
    # half the context on average.
    T, R = 96 + 96 + plumbing.plan.TEMPLATE, 96
    weights, attention = 4 * (4 * 64 * 64 + 3 * 64 * 344), 2 * T * T * 64 * 4
    assert full["flops"]["update"] == 2 * 256 * 3 * (
        2 * T * weights + attention + 2 * R * 1000 * 64)
    assert (plumbing.plan.plan(config, flags, 4, ["q_proj"], frozen_bytes=2)["memory"]["weights"]
            < lora["memory"]["weights"])
    # The critic's sums of states are beside the cache (of all rows: they fit), and five times in
    # the fit, which is more in a wide model.
    states, wide = 256 * R * 64, replace(config, hidden_size=4096, head_dim=None)
    assert full["memory"]["rollout"] == 4 * (256 * 2 * 4 * 64 * T + states)
    assert plumbing.plan.plan(wide, flags)["memory"]["rollout"] == 4 * 5 * 64 * states
