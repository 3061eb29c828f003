"""Load and save weights: models in the Hugging Face layout, adapters in PEFT's layout.

    load_model(folder)       a model that `save_model` wrote, or a pretrained Llama, Mistral, Qwen2
                             or Qwen3
    save_model(folder, m)    for load_model, and for transformers (AutoModelForCausalLM,
                             AutoModelForSequenceClassification) and peft

Nothing is unpickled. Activations, biases, rotary embeddings, quantization and adapters that this
transformer does not compute are refused by name. Other unknown keys of a `config.json` are ignored,
as transformers ignores them; unknown keys of an `adapter_config.json` are refused.
"""
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from plumbing.tokenizer import END_OF_TURN, EOS, load_tokenizer, number_of_ids
from model import LINEAR, Config, LanguageModel, LoRA, RewardModel, add_lora, copy_trainable
from plumbing.files import BadInput, load_tensors, read_json, save_tensors, write_json
from plumbing.stage import check_folder, flag, frozen_dtype

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")
MOST = {"num_hidden_layers": 256, "max_cv_tokens": 2 ** 16, "max_jd_tokens": 2 ** 16,
        "rope_theta": 1e12}


def save_model(folder, model):
    """Write `config.json` and `model.safetensors` in the Hugging Face layout.

    If the model has adapters, write only these, in PEFT's layout, and the config as `girl.json`:
    other tools take a folder with a config.json for a whole model. save_tokenizer adds the
    tokenizer."""
    folder, c, lora = Path(folder), model.config, model.model.lora
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    config = asdict(c) | {
        "model_type": family, "architectures": [family.capitalize() + model.architecture],
        "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": None}
    scores = isinstance(model, RewardModel)
    if scores:
        config |= {"num_labels": 1, "center": model.center}
    weights = {n: p.detach().float().cpu().contiguous() for n, p in model.state_dict().items()
               if lora is None or is_adapter(n)}
    if c.tie_word_embeddings:
        weights.pop("lm_head.weight", None)             # the same tensor as embed_tokens
    write_json(folder / ("girl.json" if lora else "config.json"), config)
    if lora is None:
        save_tensors(folder / "model.safetensors", weights)
    else:
        save_tensors(folder / "adapter_model.safetensors",
                     {f"base_model.model.{n}": p for n, p in weights.items()})
        write_json(folder / "adapter_config.json", asdict(lora) | {
            "peft_type": "LORA", "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
            "bias": "none", "lora_dropout": 0.0,
            "modules_to_save": ["score"] if scores else None, "inference_mode": True})


def is_adapter(name):
    return ".lora_" in name or name == "score.weight"


# ------------------------------------------------------------------------------------------- config
def read_config(folder):
    """(Config, the whole JSON object) of a model's folder, our own or a pretrained one."""
    check_links(folder)
    path = config_file(Path(folder))
    if not path.exists():
        raise BadInput(f"{folder}: not a model's folder: it has no config.json; give one that "
                       "`sft`, `reward` or `ppo` wrote, or a pretrained model in the Hugging Face "
                       "layout")
    raw = read_json(path)
    if raw.get("model_type") not in FAMILIES:
        raise BadInput(f"{path}: GIRL cannot load this kind of model: model_type must be one of "
                       f"{', '.join(FAMILIES)}, found {raw.get('model_type')!r}")
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "quantization_config": raw.get("quantization_config"),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) not in (1, None),
        "rope_interleaved": raw.get("rope_interleaved"),
        "layer_types": has_other_layers(raw),
        "is_causal": raw.get("is_causal", True) is not True}
    for name, is_unsupported in unsupported.items():
        if is_unsupported:
            raise BadInput(f"{path}: {name} {repr(raw[name])[:80]} is not supported")
    if missing := [name for name in SIZES if raw.get(name) is None]:
        raise BadInput(f"{path}: has no {', '.join(missing)}")
    filled = with_defaults(raw, path)
    settings = {f.name: filled[f.name] for f in fields(Config) if filled.get(f.name) is not None}
    for name, value in settings.items():
        check_size(name, value, path)
    if not isinstance(raw.get("eos_token_id"), int):        # none, or several
        settings["eos_token_id"] = end_of_text(path.parent, raw)
    try:
        return Config(**settings), raw
    except (TypeError, BadInput) as e:
        raise BadInput(f"{path}: not a valid model config ({e})")


def config_file(folder):
    """Our adapters have a `girl.json`, a whole model has a `config.json`. Adapters that peft saved
    have neither: they use the config of their base."""
    for name in ("girl.json", "config.json"):
        if (folder / name).exists():
            return folder / name
    lora = read_lora(folder)
    return Path(lora.base_model_name_or_path if lora else folder) / "config.json"


def check_links(folder):
    """Refuse a folder with a link out of it: only files that the user gave are read."""
    root = Path(os.path.realpath(folder))
    for path in sorted(Path(folder).glob("*")):
        if path.is_symlink() and root not in Path(os.path.realpath(path)).parents:
            raise BadInput(f"{path}: a link that leaves its folder is not followed; copy the "
                           f"folder with  cp -rL {folder} COPY  and give the copy")


def has_other_layers(raw):
    """Does the config ask for layers other than plain attention? (with_defaults handles sliding
    windows.)"""
    plain = {"full_attention", "sliding_attention"} if sliding_window(raw) else {"full_attention"}
    types = raw.get("layer_types") or []
    return not isinstance(types, list) or not all(isinstance(t, str) and t in plain for t in types)


def sliding_window(raw):
    """How many tokens back a token sees; None or False if it sees all. A Mistral has a window
    unless its config says null."""
    if raw.get("model_type") == "mistral":
        return raw.get("sliding_window", 4096)
    return raw.get("use_sliding_window") and raw.get("sliding_window")


def rope_of(raw, path):
    """The settings of the rotary embedding, under the key of transformers 5 or the older one. A
    file with two different settings is refused."""
    rope, scaling = (raw.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    are_objects = isinstance(rope, dict) and isinstance(scaling, dict)
    if not are_objects or any(isinstance(v, dict) for v in rope.values()):
        raise BadInput(f"{path}: rope_parameters and rope_scaling must be objects that hold for "
                       "all layers")
    if rope and scaling and rope != scaling:
        raise BadInput(f"{path}: has rope_parameters and another rope_scaling; keep the one that "
                       "the model was trained with")
    rope = rope or scaling
    name = "original_max_position_embeddings"
    if rope.get(name, raw.get(name)) != raw.get(name, rope.get(name)):
        raise BadInput(f"{path}: has two different {name}; keep one")
    return rope


def with_defaults(raw, path):
    """A `config.json` with Hugging Face's defaults for keys that are missing or null (ours has all
    keys)."""
    family, rope, window = raw["model_type"], rope_of(raw, path), sliding_window(raw)
    default_kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family)
    kv_heads = raw.get("num_key_value_heads", default_kv_heads) or raw.get("num_attention_heads")
    defaults = {
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": 128 if family == "qwen3" else None,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "rope_theta": 10000.0}
    settings = defaults | {k: v for k, v in raw.items() if v is not None}
    context = settings["max_position_embeddings"]
    if not isinstance(window or 0, int) or not isinstance(context, int):
        raise BadInput(f"{path}: sliding_window and max_position_embeddings must be whole numbers")
    if window:                                              # within it, attention is full
        settings["max_position_embeddings"] = min(context, window)
    if isinstance(settings.get("eos_token_id"), list):      # several ways to end: use the first
        settings["eos_token_id"] = next(iter(settings["eos_token_id"]), None)
    if settings.get("pad_token_id") == -1:                  # none, in old conversions of Llama
        settings["pad_token_id"] = None
    settings["rope_theta"] = rope.get("rope_theta", settings["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    llama3_keys = ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")
    llama3 = {k: rope.get(k) for k in llama3_keys}
    in_range = all(isinstance(v, (int, float)) and 0 < v < 2 ** 24 for v in llama3.values())
    if kind == "llama3" and in_range:
        settings["rope_scaling"] = {"rope_type": "llama3"} | llama3
    elif kind == "default" and rope.get("partial_rotary_factor", 1) == 1:
        settings["rope_scaling"] = None
    else:
        raise BadInput(f"{path}: rotary embedding {repr(rope)[:200]} is not supported")
    return settings


def check_size(name, value, path):
    """Refuse a value whose type is not that of Config's field, or a number that no model has."""
    kind = {f.name: f.type for f in fields(Config)}[name]
    numbers = {int: int, float: (int, float), int | None: int}
    if kind in numbers:
        least = 0 if name.endswith("token_id") or kind is float else 1
        good = isinstance(value, numbers[kind]) and not isinstance(value, bool)
        good = good and least <= value <= MOST.get(name, 2 ** 24)
        good = good and not (name == "rope_theta" and value == 0)
    else:
        good = isinstance(value, dict if name == "rope_scaling" else bool)
    if not good:
        raise BadInput(f"{path}: {name} cannot be {value!r}")


# ------------------------------------------------------------------------------- files with tensors
def read_weights(folder):
    """The path and the tensors of `model.safetensors`, or of the shards that its index names."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        endings = ("bin", "pt", "pth")
        pickles = [p for ending in endings for p in sorted(folder.glob(f"*.{ending}"))]
        if pickles and not path.exists():
            raise BadInput(f"{pickles[0]}: a pickle can run any code and is not opened; "
                           "convert the model to safetensors")
        return path, load_tensors(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{index}: has no weight_map")
    weights = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        is_file_name = Path(shard).name == shard and "\\" not in shard and shard.isprintable()
        if not is_file_name or not shard.endswith(".safetensors"):
            raise BadInput(f"{index}: a shard must be a .safetensors file of the same folder, "
                           f"found {shard!r}")
        tensors = load_tensors(folder / shard)
        if duplicates := sorted(weights.keys() & tensors.keys()):
            raise BadInput(f"{folder / shard}: {duplicates[0]} is in another shard too; keep one "
                           "of them")
        weights |= tensors
    return index, weights


def without_tables(weights):
    """Drop the tables of the rotary embedding, which some old files hold: we compute them, as
    transformers does."""
    return {n: t for n, t in weights.items() if not n.endswith("rotary_emb.inv_freq")}


# The keys of an adapter_config.json. NEUTRAL: read below, or without effect on what is computed.
# PLAIN: must have one of these values. Every other key must be unset.
NEUTRAL = {f.name for f in fields(LoRA)} | {
    "modules_to_save", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"}
UNSET = (None, False, {}, [], "")
PLAIN = {"peft_type": ("LORA",), "bias": ("none", None),
         "init_lora_weights": (True, False, None, "gaussian", "orthogonal")}


def read_lora(folder):
    """The LoRA settings of a folder in PEFT's layout, or None if it has plain weights."""
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    raw = read_json(path)
    for name in sorted(PLAIN | raw):
        if name not in NEUTRAL and raw.get(name) not in PLAIN.get(name, UNSET):
            raise BadInput(f"{path}: {name} {repr(raw.get(name))[:80]} is not supported")
    heads = raw.get("modules_to_save") or []
    # peft may name both heads, and one of them twice.
    if not isinstance(heads, list) or not set(map(str, heads)) <= {"score", "classifier"}:
        raise BadInput(f"{path}: modules_to_save {repr(heads)[:80]} is not supported")
    try:
        lora = LoRA(**{f.name: raw[f.name] for f in fields(LoRA)})
        base, rank, alpha = lora.base_model_name_or_path, lora.r, lora.lora_alpha
        if not isinstance(base, str) or not base:
            raise TypeError("base_model_name_or_path must name the folder of its base model")
        if type(rank) is not int or not 1 <= rank < 2 ** 16:
            raise TypeError(f"r must be a whole number of at least 1, found {repr(rank)[:40]}")
        if type(alpha) not in (int, float) or not 0 < alpha < 2 ** 24:
            raise TypeError(f"lora_alpha must be a number above 0, found {repr(alpha)[:40]}")
        check_targets(lora.target_modules)
        base = Path(base)
        if not (base / "config.json").exists() or (base / "adapter_config.json").exists():
            raise BadInput(f"{path}: its base model {base} is missing, or not a whole model; "
                           "correct base_model_name_or_path")
    except KeyError as e:
        raise BadInput(f"{path}: not a valid LoRA config (it has no {e.args[0]})")
    except (TypeError, re.error) as e:
        raise BadInput(f"{path}: not a valid LoRA config ({e})")
    return lora


def check_targets(targets):
    """Refuse target_modules that name layers other than ours. They are names, ends of names, or
    one regular expression."""
    layers = [name for names in LINEAR.values() for name in names]
    if isinstance(targets, str):
        re.compile(targets)
    elif (not isinstance(targets, list)
          or not {str(t).rsplit(".", 1)[-1] for t in targets} <= set(layers)):
        raise TypeError(f"target_modules must be some of {','.join(layers)}, "
                        f"found {repr(targets)[:80]}")


def is_reward(folder):
    """Does a folder hold a reward model, or a reward model's adapters?"""
    adapters, raw = folder / "adapter_config.json", read_config(folder)[1]
    if adapters.exists() and read_json(adapters).get("task_type") == "SEQ_CLS":
        return True
    kinds = raw.get("architectures")
    if not kinds:
        return "num_labels" in raw
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return any(str(kind).endswith(RewardModel.architecture) for kind in kinds)


# ------------------------------------------------------------------------------------------- models
def load_model(folder, kind=LanguageModel, device="cpu", share_base_with=None):
    """Read a folder that `save_model` wrote, or a pretrained model, as a LanguageModel or a
    RewardModel.

    `share_base_with`: a language model in memory. If both are adapters of one base, the new model
    uses its frozen weights instead of loading them again."""
    folder = Path(folder)
    check_folder(folder)
    lora = read_lora(folder)
    if lora:
        model = load_adapters(folder, lora, kind, device, share_base_with)
    else:
        model = load_plain(folder, kind, device)
    if kind is RewardModel:
        model.center = read_config(folder)[1].get("center", 0.0)
        if type(model.center) not in (int, float) or not abs(model.center) < 2 ** 24:
            raise BadInput(f"{folder}: the center in its config must be a number, "
                           f"found {model.center!r}")
    return model


def load_plain(folder, kind, device, dtype=torch.float32):
    config, _ = read_config(folder)
    path, weights = read_weights(folder)
    weights = without_tables(weights)
    if "embed_tokens.weight" in weights:            # the body alone, as AutoModel saves it
        weights = {f"model.{name}": t for name, t in weights.items()}
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        embedding = weights.get("model.embed_tokens.weight")
        if equal(weights["lm_head.weight"], embedding) or kind is RewardModel:
            del weights["lm_head.weight"]           # a copy, or a head that nobody asked for
        else:                                       # weights overrule config, as in transformers
            config = replace(config, tie_word_embeddings=False)
    try:
        with torch.device("meta"):                  # no weights yet: they come from the file
            model = kind(config)
    except (TypeError, RuntimeError) as e:
        raise BadInput(f"{folder / 'config.json'}: a model cannot have these sizes ({e})")
    expected = model.state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    load_checked(model, weights, expected, path, device, dtype)
    if kind is LanguageModel and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)


def equal(a, b):
    """Do two tensors hold the same numbers, whatever their precision?"""
    return b is not None and a.shape == b.shape and torch.equal(a.float(), b.float())


# Adapters fit their base only if both configs have the same values for these.
BASE_SETTINGS = (*SIZES, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
                 "rms_norm_eps", "qkv_bias", "qk_norm")


def load_adapters(folder, lora, kind, device, share_base_with):
    config, _ = read_config(folder)
    base = lora.base_model_name_or_path
    base_config, _ = read_config(base)
    for name in BASE_SETTINGS:
        value, base_value = getattr(config, name), getattr(base_config, name)
        if value != base_value:
            raise BadInput(f"{config_file(folder)}: {name} is {value}, but {base_value} in its "
                           f"base {base}")
    other_lora = share_base_with and share_base_with.model.lora
    if other_lora and other_lora.base_model_name_or_path == base:
        model = copy_trainable(share_base_with)
    else:
        model = load_plain(Path(base), LanguageModel, device, frozen_dtype(device))
    # Only the weights tell whether the head is tied, see load_plain.
    config = replace(config, tie_word_embeddings=model.config.tie_word_embeddings)
    model.config = model.model.config = config
    if kind is not LanguageModel:
        model = RewardModel(config, body=model.model).to(device)
    path, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not path.exists() and pickled.exists():
        raise BadInput(f"{pickled}: a pickle can run any code and is not opened; save the adapters "
                       "as safetensors")
    weights = {n.removeprefix("base_model.model."): t for n, t in load_tensors(path).items()}
    if extra := sorted(n for n in weights if n.startswith(("model.embed_tokens.", "lm_head."))):
        raise BadInput(f"{path}: also holds {extra[0]}, as after a change of the vocabulary; merge "
                       "the adapters with peft first")
    if any(lora.r > max(t.shape, default=0) for t in weights.values()):    # before memory is used
        raise BadInput(f"{path}: its config says rank {lora.r}, but its adapters have a lower one")
    add_lora(model, lora)
    expected = {n: p for n, p in model.state_dict().items() if is_adapter(n)}
    load_checked(model, weights, expected, path, device)
    return model


# What tools that wrap a model put before the names of its tensors.
WRAPPERS = ("_orig_mod.", "module.", "pretrained_model.")


def load_checked(model, weights, expected, path, device, dtype=torch.float32):
    """Put the weights into the model, if their names, shapes and dtypes are the expected ones."""
    complaint = f"{path}: does not fit its config as a {type(model).__name__}"
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    prefix = next((p for p in WRAPPERS for n in weights if n.startswith(p)), None)
    if prefix and (missing or unexpected):
        raise BadInput(f"{complaint}: its names begin with {prefix}; save the unwrapped model "
                       "(torch.compile, DataParallel or TRL added the prefix)")
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = " and more" if len(names) > 3 else ""
            raise BadInput(f"{complaint}: {problem} {', '.join(sorted(names)[:3])}{more}")
    for name, t in weights.items():
        if t.shape != expected[name].shape:
            raise BadInput(f"{complaint}: {name} is {list(t.shape)}, "
                           f"expected {list(expected[name].shape)}")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"{complaint}: {name} is {t.dtype}; only float32, bfloat16 and float16 "
                           "are read")
        if not t.sum(dtype=torch.float64).isfinite():
            raise BadInput(f"{path}: {name} contains NaN or infinity; the file is damaged, or "
                           "training diverged")
    # Copies: the tensors of a file are the file itself, mapped into memory and not aligned.
    weights = {n: t.to(device, dtype, copy=True) for n, t in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)


# -------------------------------------------------------------------------------- pretrained models
def end_of_text(folder, raw):
    """The token that ends a text of a pretrained model, if its config names none (no key, null,
    []) or several; None if nothing names it.

    Of several, ChatML's end of turn if it is one of them, else the first. If there is none, the
    token that tokenizer_config.json names, or <|endoftext|>, if the vocabulary has it."""
    ends = raw.get("eos_token_id") or []
    if not (folder / "tokenizer.json").exists():
        return ends[0] if ends else None
    tokenizer = load_tokenizer(folder)
    if ends:
        turn = tokenizer.token_to_id(END_OF_TURN)
        return turn if turn in ends else ends[0]
    path = folder / "tokenizer_config.json"
    named = read_json(path).get("eos_token") if path.exists() else None
    named = named.get("content") if isinstance(named, dict) else named  # an object in older files
    return tokenizer.token_to_id(named if isinstance(named, str) else EOS)


@dataclass
class StartFlags:
    """The weights that stages 1 and 2 start from, and which of them they train."""
    init: str = flag(
        "", "start from the model in this Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3")
    lora_rank: int = flag(
        0, "with --init: train adapters of this rank and freeze the model; 0: train all weights",
        least=0)
    lora_alpha: float = flag(
        0.0, "the adapters are scaled by alpha / rank; 0: alpha is twice the rank")
    lora_targets: str = flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers that get adapters")
    checkpointing: bool = flag(
        False, "keep only the input of each block and recompute the rest: less memory, more time")


def load_pretrained(flags, codec, seed, device):
    """The language model of `--init`, set up for this codec and these StartFlags. The seed draws
    fresh adapters."""
    folder = Path(flags.init).resolve()
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds adapters; merge them first:  "
                       f"python girl.py export --merge --model {folder} --out DIR")
    dtype = frozen_dtype(device) if flags.lora_rank else torch.float32
    model = load_plain(folder, LanguageModel, device, dtype)
    c, tokens = model.config, number_of_ids(codec.tokenizer)
    if max(tokens, codec.eos + 1) > c.vocab_size:
        raise BadInput(f"{folder}: its tokenizer has {tokens} tokens and its JDs end in token "
                       f"{codec.eos}, but its model has {c.vocab_size} tokens")
    if codec.context() > c.max_position_embeddings:
        raise BadInput(f"{folder}: a CV and a JD together have up to {codec.context()} tokens, "
                       f"more than the {c.max_position_embeddings} that this model reads; lower "
                       "--max-cv or --max-jd")
    model.config = model.model.config = replace(
        c, eos_token_id=codec.eos, pad_token_id=codec.pad,
        max_cv_tokens=codec.max_cv, max_jd_tokens=codec.max_jd)
    torch.manual_seed(seed)                     # for the adapters, and for heads that are added
    if flags.lora_rank:
        alpha = flags.lora_alpha or 2.0 * flags.lora_rank
        add_lora(model, LoRA(str(folder), flags.lora_rank, alpha, flags.lora_targets.split(",")))
    return model
