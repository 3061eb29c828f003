"""Weights in and out: models in the Hugging Face layout, and adapters in that of PEFT.

    load_model(folder)       one that `save_model` wrote, or a pretrained Llama, Mistral, Qwen2 or Qwen3
    save_model(folder, m)    read by transformers (AutoModelForCausalLM, AutoModelForSequenceClassification) and by peft

Nothing is unpickled. Activations, biases, rotary embeddings, quantization and adapters that this transformer does not compute
are refused by name. Other keys of a `config.json` that we do not know are ignored, as transformers ignores them; in an
`adapter_config.json` they are refused.
"""
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from plumbing.tokenizer import END_OF_TURN, EOS, load_tokenizer, number_of_ids
from model import LINEAR, Config, LanguageModel, LoRA, RewardModel, add_lora, twin
from plumbing.files import BadInput, load_tensors, read_json, save_tensors, write_json
from plumbing.stage import check_folder, flag, frozen_dtype

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MOST = {"num_hidden_layers": 256, "max_cv_tokens": 2 ** 16, "max_jd_tokens": 2 ** 16, "rope_theta": 1e12}


def save_model(folder, model):
    """`config.json` and `model.safetensors` in the Hugging Face layout. Of a model with adapters these alone, in the layout of
    PEFT, and the config as `girl.json`: other tools take a folder with a config.json for a whole model. The tokenizer is
    saved beside them by data.py."""
    folder, c, lora = Path(folder), model.config, model.model.lora
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    config = asdict(c) | {"model_type": family, "architectures": [family.capitalize() + model.architecture],
                          "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": None}
    scores = isinstance(model, RewardModel)
    if scores:
        config |= {"num_labels": 1, "center": model.center}
    weights = {n: p.detach().float().cpu().contiguous() for n, p in model.state_dict().items() if lora is None or is_adapter(n)}
    if c.tie_word_embeddings:
        weights.pop("lm_head.weight", None)                 # the same tensor as embed_tokens: stored once
    write_json(folder / ("girl.json" if lora else "config.json"), config)
    if lora is None:
        save_tensors(folder / "model.safetensors", weights)
    else:
        save_tensors(folder / "adapter_model.safetensors", {f"base_model.model.{n}": p for n, p in weights.items()})
        write_json(folder / "adapter_config.json", asdict(lora) | {
            "peft_type": "LORA", "task_type": "SEQ_CLS" if scores else "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
            "modules_to_save": ["score"] if scores else None, "inference_mode": True})


def is_adapter(name):
    return ".lora_" in name or name == "score.weight"


def read_config(folder):
    """(Config, everything) of a folder's `config.json`, our own or of one of the families that this transformer covers."""
    check_links(folder)
    path = config_file(Path(folder))
    if not path.exists():
        raise BadInput(f"{folder}: not a model's folder, it has no config.json; give one that `sft`, `reward` or `ppo` wrote, or a "
                       "pretrained model in the Hugging Face layout")
    raw = read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise BadInput(f"{path}: not the config of a model that GIRL can be: model_type must be one of {', '.join(FAMILIES)}, "
                       f"found {raw.get('model_type')!r}")
    for name, unknown in {
            "hidden_act": raw.get("hidden_act", "silu") != "silu", "attention_bias": raw.get("attention_bias"),
            "mlp_bias": raw.get("mlp_bias"), "quantization_config": raw.get("quantization_config"),
            "partial_rotary_factor": raw.get("partial_rotary_factor", 1) not in (1, None),
            "rope_interleaved": raw.get("rope_interleaved"), "layer_types": has_other_layers(raw),
            "is_causal": raw.get("is_causal", True) is not True}.items():
        if unknown:
            raise BadInput(f"{path}: {name} {repr(raw[name])[:80]} is not supported")
    if missing := [name for name in SIZES if raw.get(name) is None]:
        raise BadInput(f"{path}: has no {', '.join(missing)}")
    known = with_defaults(raw, path)
    found = {f.name: known[f.name] for f in fields(Config) if known.get(f.name) is not None}
    for name, value in found.items():
        check_size(name, value, path)
    if not isinstance(raw.get("eos_token_id"), int):        # none, or several
        found["eos_token_id"] = end_of_text(path.parent, raw)
    try:
        return Config(**found), raw
    except (TypeError, BadInput) as e:
        raise BadInput(f"{path}: not a model's config ({e})")


def config_file(folder):
    """Our adapters have a `girl.json`, a whole model a `config.json`; adapters saved by peft have neither: their base's is used."""
    for name in ("girl.json", "config.json"):
        if (folder / name).exists():
            return folder / name
    lora = read_lora(folder)
    return Path(lora.base_model_name_or_path if lora else folder) / "config.json"


def check_links(folder):
    """Refuse a folder with a link out of it: what is read is to be what was given."""
    for path in sorted(Path(folder).glob("*")):
        if path.is_symlink() and Path(os.path.realpath(folder)) not in Path(os.path.realpath(path)).parents:
            raise BadInput(f"{path}: a link that leaves its folder is not followed; copy the folder with  cp -rL {folder} COPY  and "
                           "give the copy")


def has_other_layers(raw):
    """Does a config ask for layers that are not plain attention? (Sliding windows are dealt with in with_defaults.)"""
    plain = {"full_attention", "sliding_attention"} if sliding_window(raw) else {"full_attention"}
    types = raw.get("layer_types") or []
    return not isinstance(types, list) or not all(isinstance(t, str) and t in plain for t in types)


def sliding_window(raw):
    """How far a token sees, or nothing where it sees all; a Mistral has a window unless it says null."""
    if raw.get("model_type") == "mistral":
        return raw.get("sliding_window", 4096)
    return raw.get("use_sliding_window") and raw.get("sliding_window")


def rope_of(raw, path):
    """The settings of the rotary embedding, by the key of transformers 5 or by that of the versions before. A file that says two
    things is refused."""
    rope, scaling = (raw.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(rope, dict) or not isinstance(scaling, dict) or any(isinstance(v, dict) for v in rope.values()):
        raise BadInput(f"{path}: rope_parameters and rope_scaling must be objects that hold for all layers")
    if rope and scaling and rope != scaling:
        raise BadInput(f"{path}: has rope_parameters and another rope_scaling; keep the one that the model was trained with")
    rope, name = rope or scaling, "original_max_position_embeddings"
    if rope.get(name, raw.get(name)) != raw.get(name, rope.get(name)):
        raise BadInput(f"{path}: has two different {name}; keep one")
    return rope


def with_defaults(raw, path):
    """A `config.json` with what Hugging Face takes where a key is missing or null (ours has all of them)."""
    family, rope = raw["model_type"], rope_of(raw, path)
    window, kv_heads = sliding_window(raw), {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family)
    known = {"num_key_value_heads": raw.get("num_key_value_heads", kv_heads) or raw.get("num_attention_heads"),
             "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": False, "head_dim": 128 if family == "qwen3" else None, "qkv_bias": family == "qwen2",
             "qk_norm": family == "qwen3", "rope_theta": 10000.0} | {k: v for k, v in raw.items() if v is not None}
    if not isinstance(window or 0, int) or not isinstance(known["max_position_embeddings"], int):
        raise BadInput(f"{path}: sliding_window and max_position_embeddings must be whole numbers")
    if window:          # within it, attention is full
        known["max_position_embeddings"] = min(known["max_position_embeddings"], window)
    if isinstance(known.get("eos_token_id"), list):         # several ways to end: we use the first
        known["eos_token_id"] = next(iter(known["eos_token_id"]), None)
    if known.get("pad_token_id") == -1:                     # old conversions of Llama: none
        known["pad_token_id"] = None
    known["rope_theta"], kind = rope.get("rope_theta", known["rope_theta"]), rope.get("rope_type", rope.get("type", "default"))
    stretch = {k: rope.get(k) for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if kind == "llama3" and all(isinstance(v, (int, float)) and 0 < v < 2 ** 24 for v in stretch.values()):
        known["rope_scaling"] = {"rope_type": "llama3"} | stretch
    elif kind == "default" and rope.get("partial_rotary_factor", 1) == 1:
        known["rope_scaling"] = None
    else:
        raise BadInput(f"{path}: rotary embedding {repr(rope)[:200]} is not supported")
    return known


def check_size(name, value, path):
    """Refuse a field of another type than Config's, or a number that no model has."""
    kind = {f.name: f.type for f in fields(Config)}[name]
    numbers = {int: int, float: (int, float), int | None: int}
    if kind in numbers:
        least = 0 if name.endswith("token_id") or kind is float else 1
        good = isinstance(value, numbers[kind]) and not isinstance(value, bool) and least <= value <= MOST.get(name, 2 ** 24)
        good = good and not (name == "rope_theta" and value == 0)
    else:
        good = isinstance(value, dict if name == "rope_scaling" else bool)
    if not good:
        raise BadInput(f"{path}: {name} cannot be {value!r}")


def read_weights(folder):
    """The file and the tensors of `model.safetensors`, or of the shards that its index names."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        pickled = next((p.name for ending in ("bin", "pt", "pth") for p in sorted(folder.glob(f"*.{ending}"))), None)
        if pickled and not path.exists():
            raise BadInput(f"{folder / pickled}: a pickle can run any code and is not opened; convert the model to safetensors")
        return path, load_tensors(path)
    raw = read_json(index)
    shards = raw.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise BadInput(f"{index}: has no weight_map")
    weights = {}
    for shard in sorted(set(map(str, shards.values()))):
        if Path(shard).name != shard or "\\" in shard or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise BadInput(f"{index}: a shard must be a .safetensors file of the same folder, found {shard!r}")
        found = load_tensors(folder / shard)
        if twice := sorted(weights.keys() & found.keys()):
            raise BadInput(f"{folder / shard}: {twice[0]} stands in another shard too; keep one of them")
        weights |= found
    return index, weights


def without_tables(weights):
    """Some old files hold tables of the rotary embedding beside the weights; both we and transformers compute them."""
    return {n: t for n, t in weights.items() if not n.endswith("rotary_emb.inv_freq")}


# What an adapter_config.json may hold. NEUTRAL keys are read below, or change nothing in what is computed; those of PLAIN must hold
# one of these values; every other key must be unset.
NEUTRAL = {f.name for f in fields(LoRA)} | {"modules_to_save", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout",
                                            "megatron_core", "qalora_group_size", "runtime_config"}
UNSET = (None, False, {}, [], "")
PLAIN = {"peft_type": ("LORA",), "bias": ("none", None),
         "init_lora_weights": (True, False, None, "gaussian", "orthogonal")}


def read_lora(folder):
    """The adapters of a folder in PEFT's layout, or None where it has plain weights."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    raw = read_json(path)
    for name in sorted(PLAIN | raw):
        if name not in NEUTRAL and raw.get(name) not in PLAIN.get(name, UNSET):
            raise BadInput(f"{path}: {name} {repr(raw.get(name))[:80]} is not supported")
    heads = raw.get("modules_to_save") or []
    if not isinstance(heads, list) or not set(map(str, heads)) <= {"score", "classifier"}:     # peft names both, and some twice
        raise BadInput(f"{path}: modules_to_save {repr(heads)[:80]} is not supported")
    try:
        lora = LoRA(**{f.name: raw[f.name] for f in fields(LoRA)})
        if not isinstance(lora.base_model_name_or_path, str) or not lora.base_model_name_or_path:
            raise TypeError("base_model_name_or_path must name the folder of its base model")
        if type(lora.r) is not int or not 1 <= lora.r < 2 ** 16:
            raise TypeError(f"r must be a whole number of at least 1, found {repr(lora.r)[:40]}")
        if type(lora.lora_alpha) not in (int, float) or not 0 < lora.lora_alpha < 2 ** 24:
            raise TypeError(f"lora_alpha must be a number above 0, found {repr(lora.lora_alpha)[:40]}")
        check_targets(lora.target_modules)
        base = Path(lora.base_model_name_or_path)
        if not (base / "config.json").exists() or (base / "adapter_config.json").exists():
            raise BadInput(f"{path}: its base model {base} is not there, or no whole model; correct base_model_name_or_path")
    except KeyError as e:
        raise BadInput(f"{path}: not the config of LoRA adapters (it has no {e.args[0]})")
    except (TypeError, re.error) as e:
        raise BadInput(f"{path}: not the config of LoRA adapters ({e})")
    return lora


def check_targets(targets):
    """Refuse target_modules that name other layers than ours. They are names, or ends of names, or one regular expression."""
    known = [name for names in LINEAR.values() for name in names]
    if isinstance(targets, str):
        re.compile(targets)
    elif not isinstance(targets, list) or not {str(t).rsplit(".", 1)[-1] for t in targets} <= set(known):
        raise TypeError(f"target_modules must be some of {','.join(known)}, found {repr(targets)[:80]}")


def is_reward(folder):
    """Does a folder hold a reward model, or adapters of one?"""
    adapters, raw = folder / "adapter_config.json", read_config(folder)[1]
    if adapters.exists() and read_json(adapters).get("task_type") == "SEQ_CLS":
        return True
    kinds = raw.get("architectures") or []
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return any(str(kind).endswith(RewardModel.architecture) for kind in kinds) if kinds else "num_labels" in raw


def load_model(folder, kind=LanguageModel, device="cpu", beside=None):
    """Read a folder as a LanguageModel or a RewardModel: one that `save_model` wrote, or a pretrained one.

    `beside`: a language model in memory; where both are adapters of one base, its frozen weights are used again."""
    folder = Path(folder)
    check_folder(folder)
    lora = read_lora(folder)
    model = load_adapters(folder, lora, kind, device, beside) if lora else load_plain(folder, kind, device)
    if kind is RewardModel:
        model.center = read_config(folder)[1].get("center", 0.0)
        if type(model.center) not in (int, float) or not abs(model.center) < 2 ** 24:
            raise BadInput(f"{folder}: the center in its config must be a number, found {model.center!r}")
    return model


def load_plain(folder, kind, device, dtype=torch.float32):
    config, _ = read_config(folder)
    path, weights = read_weights(folder)
    weights = without_tables(weights)
    if "embed_tokens.weight" in weights:                    # the body alone, as AutoModel saves it
        weights = {f"model.{name}": t for name, t in weights.items()}
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        if equal(weights["lm_head.weight"], weights.get("model.embed_tokens.weight")) or kind is RewardModel:
            del weights["lm_head.weight"]                   # the same tensor once more, or a head that is not asked for
        else:                                               # the weights override the config, as in transformers
            config = replace(config, tie_word_embeddings=False)
    try:
        with torch.device("meta"):                          # no weights yet: they come from the file
            model = kind(config)
    except (TypeError, RuntimeError) as e:
        raise BadInput(f"{folder / 'config.json'}: no model has these sizes ({e})")
    expected = model.state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    put(model, weights, expected, path, device, dtype)
    if kind is LanguageModel and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)


def equal(a, b):
    """Do two tensors, of whatever precision, hold the same numbers?"""
    return b is not None and a.shape == b.shape and torch.equal(a.float(), b.float())


def load_adapters(folder, lora, kind, device, beside):
    config, _ = read_config(folder)
    base = lora.base_model_name_or_path
    of_base, _ = read_config(base)
    for name in (*SIZES, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "qkv_bias", "qk_norm"):
        if getattr(config, name) != getattr(of_base, name):
            raise BadInput(f"{config_file(folder)}: {name} is {getattr(config, name)}, and {getattr(of_base, name)} in its base "
                           f"{base}")
    shared = beside and beside.model.lora and beside.model.lora.base_model_name_or_path == base
    model = twin(beside) if shared else load_plain(Path(base), LanguageModel, device, frozen_dtype(device))
    # Whether the head is tied is known from the weights, see load_plain.
    config = replace(config, tie_word_embeddings=model.config.tie_word_embeddings)
    model.config = model.model.config = config
    model = model if kind is LanguageModel else RewardModel(config, body=model.model).to(device)
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise BadInput(f"{folder / 'adapter_model.bin'}: a pickle can run any code and is not opened; save the adapters as safetensors")
    weights = {n.removeprefix("base_model.model."): t for n, t in load_tensors(path).items()}
    if own := sorted(n for n in weights if n.startswith(("model.embed_tokens.", "lm_head."))):
        raise BadInput(f"{path}: also holds {own[0]}, as after a change of the vocabulary; merge the adapters with peft first")
    if any(lora.r > max(t.shape, default=0) for n, t in weights.items()):       # before memory is taken for them
        raise BadInput(f"{path}: its adapters are not of rank {lora.r}, as its config says")
    add_lora(model, lora)
    put(model, weights, {n: p for n, p in model.state_dict().items() if is_adapter(n)}, path, device)
    return model


def put(model, weights, expected, path, device, dtype=torch.float32):
    """Weights into the model, where their names, shapes and kinds are the expected ones."""
    complaint = f"{path}: does not fit its config as a {type(model).__name__}"
    for what, names in (("missing", expected.keys() - weights.keys()), ("unexpected", weights.keys() - expected.keys())):
        if names:
            wrapped = next((p for p in ("_orig_mod.", "module.", "pretrained_model.") for n in weights if n.startswith(p)), None)
            if wrapped:
                raise BadInput(f"{complaint}: its names begin with {wrapped}; save the unwrapped model (torch.compile, DataParallel or TRL added that)")
            raise BadInput(f"{complaint}: {what} {', '.join(sorted(names)[:3])}{' and more' if len(names) > 3 else ''}")
    for name, t in weights.items():
        if t.shape != expected[name].shape:
            raise BadInput(f"{complaint}: {name} is {list(t.shape)}, expected {list(expected[name].shape)}")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"{complaint}: {name} is {t.dtype}; only float32, bfloat16 and float16 are read")
        if not t.sum(dtype=torch.float64).isfinite():
            raise BadInput(f"{path}: {name} holds what is no finite number; the file is damaged, or its training went astray")
    # copies: what the file gives is the file itself, mapped into memory and not aligned
    model.load_state_dict({n: t.to(device, dtype, copy=True) for n, t in weights.items()}, strict=False, assign=True)


def end_of_text(folder, raw):
    """The token that ends a text of a pretrained model whose config names none (no key, null, []) or several; None if nothing says
    it. Of several it is ChatML's end of turn, if that is one of them, else the first. Of none it is what the tokenizer_config.json
    names, or <|endoftext|>, if the vocabulary has it."""
    ends = raw.get("eos_token_id") or []
    if not (folder / "tokenizer.json").exists():
        return ends[0] if ends else None
    tokenizer = load_tokenizer(folder)
    if ends:
        turn = tokenizer.token_to_id(END_OF_TURN)
        return turn if turn in ends else ends[0]
    path = folder / "tokenizer_config.json"
    named = read_json(path).get("eos_token") if path.exists() else None
    named = named.get("content") if isinstance(named, dict) else named      # older files describe it by an object
    return tokenizer.token_to_id(named if isinstance(named, str) else EOS)


@dataclass
class StartFlags:
    """What stages 1 and 2 start from, and which of its weights they train."""
    init: str = flag("", "start from the model in this Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3")
    lora_rank: int = flag(0, "with --init: train adapters of this rank and leave its weights as they are; 0: train all", least=0)
    lora_alpha: float = flag(0.0, "the adapters count alpha / rank; 0: twice the rank")
    lora_targets: str = flag("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers with adapters")
    checkpointing: bool = flag(False, "keep only what goes into each block, and compute the rest again: less memory, more time")


def load_pretrained(flags, codec, seed, device):
    """The language model of `--init`, as this codec and these StartFlags want it; fresh adapters are drawn by the seed."""
    folder = Path(flags.init).resolve()
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds adapters; merge them first:  python girl.py export --merge --model {folder} --out DIR")
    model = load_plain(folder, LanguageModel, device, frozen_dtype(device) if flags.lora_rank else torch.float32)
    c, tokens = model.config, number_of_ids(codec.tokenizer)
    if max(tokens, codec.eos + 1) > c.vocab_size:
        raise BadInput(f"{folder}: its tokenizer has {tokens} tokens and its JDs end in token {codec.eos}, but its model has "
                       f"{c.vocab_size}")
    if codec.context() > c.max_position_embeddings:
        raise BadInput(f"{folder}: a CV and a JD of {codec.context()} tokens together are more than the "
                       f"{c.max_position_embeddings} that this model reads; lower --max-cv or --max-jd")
    model.config = model.model.config = replace(c, eos_token_id=codec.eos, pad_token_id=codec.pad, max_cv_tokens=codec.max_cv,
                                                max_jd_tokens=codec.max_jd)
    if flags.lora_rank:
        torch.manual_seed(seed)
        alpha = flags.lora_alpha or 2.0 * flags.lora_rank
        add_lora(model, LoRA(str(folder), flags.lora_rank, alpha, flags.lora_targets.split(",")))
    return model
