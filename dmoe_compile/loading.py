"""Models for the command line: a local checkpoint folder as it is, or a tiny random one of a transformers type."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe_compile.config import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_TINY: dict[str, Any] = {  # what `load` shrinks; a name that a config lacks is left out
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 4096,
    "sliding_window": 64,
    "layer_types": None,
    "mlp_layer_types": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What some defaults leave out, or have one of, which is no choice; else they are kept.
_UNSET: dict[str, Any] = {
    "num_experts": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_topk": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
}
_MAX_TINY = 100_000_000  # parameters


_CHECKPOINTS = Path(__file__).parent / "checkpoints"
OWN = {"demo": _CHECKPOINTS / "demo", "demo-tuned": _CHECKPOINTS / "demo_tuned"}  # models of this package


@dataclass(frozen=True)
class Loaded:
    """A model, the keyword arguments of one forward, and what a reader should know about both.

    `block_length`: the model's own denoising unit in tokens, where its config tells it.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    note: str
    block_length: int | None


def load(source: str, batch: int = 1, tokens: int = 64, trust_remote_code: bool = False, seed: int = 0) -> Loaded:
    """Return the model of a local checkpoint folder or a tiny random one of a transformers model type, and inputs.

    Args:
        source: a folder with config.json and .safetensors files, a model of this package ("demo", "demo-tuned"), or a
            model type such as "qwen3_moe".
        batch: sequences of the forward.
        tokens: random tokens of a sequence; of the prompt, where the model denoises a canvas of its own length.
        trust_remote_code: run model code that lies in the folder.
        seed: of the random tokens, and of a tiny model's weights.

    Raises:
        ValueError: where neither is found, or the model cannot be made from it.
    """
    check_int("batch", batch, "sequences of the forward")
    check_int("tokens", tokens, "random tokens of a sequence")
    model, note = load_model(source, trust_remote_code, seed)
    length = getattr(model.config, "canvas_length", None)
    inputs = _inputs(model, batch, tokens, length, torch.Generator().manual_seed(seed))
    return Loaded(model, inputs, note, length)


def folder_of(source: str) -> Path:
    """Return the folder that a name of OWN stands for, and any other source as it is."""
    return Path(source) if Path(source).is_dir() else OWN.get(source, Path(source))


def load_demo_model(tuned: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the block diffusion model that this package brings, in bf16, and its tokenizer.

    A transformers Qwen3MoeForCausalLM with 4 layers of 64 experts, 8 a token, and blocks of 32 tokens, which solves the
    short problems of problems.py; training.py made it, and checkpoints/demo/README.md is its model card.

    Args:
        tuned: the one that tuning.py tuned to the dmoe pass with top_p 0.6 and min_experts 8.
    """
    folder = str(OWN["demo-tuned" if tuned else "demo"])
    return load_model(folder)[0], need_tokenizer(folder)


def load_model(source: str, trust_remote_code: bool = False, seed: int = 0) -> tuple[PreTrainedModel, str]:
    """Return the model alone, see load(), and what a reader should know about it.

    Raises:
        ValueError: as load() does.
    """
    folder = folder_of(source)
    if folder.is_dir():
        return _checkpoint(folder, trust_remote_code), f"weights of {source}"
    return _tiny(source, seed)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a local checkpoint folder, None where there is none.

    Raises:
        ValueError: where it does not load, or there is neither such a folder nor such a model type.
    """
    from transformers import AutoTokenizer

    folder = folder_of(source)
    if not folder.is_dir():
        _check_type(source)
    if not any(folder.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {source} does not load: {_first_line(error)}") from error


def need_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint folder.

    Raises:
        ValueError: where there is none.
    """
    found = load_tokenizer(source, trust_remote_code)
    if found is None:
        raise ValueError(f"{source} has no tokenizer, and texts need one: give the folder of a whole checkpoint")
    return found


def check_model(model: object) -> None:
    """Raise ValueError for what can't be called, such as a model's name."""
    if not callable(model):
        raise ValueError(f"{model!r} is no model: give a module, or a function as torch.compile takes")


def check_values(model: Any) -> None:
    """Raise ValueError where a module has weights on the meta device."""
    if isinstance(model, torch.nn.Module) and any(weight.is_meta for weight in model.parameters()):
        raise ValueError("the model has weights on the meta device, where they have no values: load them first")


def _inputs(
    model: PreTrainedModel, batch: int, tokens: int, canvas_length: int | None, generator: torch.Generator
) -> dict[str, Tensor | bool]:
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    draw = partial(torch.randint, min(3, vocab_size - 1), vocab_size, generator=generator)
    if canvas_length is None:
        return {"input_ids": draw((batch, tokens)), "use_cache": False}
    return {"input_ids": draw((batch, tokens)), "decoder_input_ids": draw((batch, canvas_length))}


def _checkpoint(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Load a folder as it lies on disk: no network, no pickle, no code of its own unless trusted."""
    import transformers
    from safetensors import SafetensorError

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; name the folder that save_pretrained() wrote")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors file, and no other weights are loaded; convert them first")
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        remote = getattr(config, "auto_map", None) if trust_remote_code else None
        if remote:
            auto = "AutoModelForCausalLM" if "AutoModelForCausalLM" in remote else "AutoModel"
            cls = getattr(transformers, auto)
        else:
            cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        kwargs = local if remote else {"local_files_only": True}
        model, found = cls.from_pretrained(
            folder, config=config, use_safetensors=True, dtype="auto", output_loading_info=True, **kwargs
        )
    except (AttributeError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} does not load: {_first_line(error)}") from error
    _check_weights(folder, found)
    return model.eval()


def _check_weights(folder: Path, found: dict[str, Any]) -> None:
    """Raise ValueError where config.json asks for weights that the files lack: transformers makes them up."""
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        way_out = "a file is missing, or config.json is another model's: copy the whole folder again"
        raise ValueError(f"{folder} holds no weights for {missing[0]}{more}; {way_out}")
    if others := sorted(found["unexpected_keys"]):
        log.warning("%s holds weights that its config.json does not speak of, such as %s", folder, others[0])


def _tiny(model_type: str, seed: int) -> tuple[PreTrainedModel, str]:
    """Build a model type with its default routing (E, k, groups, ...) and everything else shrunk."""
    from transformers import CONFIG_MAPPING

    _check_type(model_type)
    try:
        config = _tiny_config(CONFIG_MAPPING[model_type])
        cls = _model_class(type(config))
        with torch.device("meta"):
            size = sum(weight.numel() for weight in cls(config).parameters())
        if size > _MAX_TINY:
            raise ValueError(f"still {size:,} parameters when shrunk")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = cls(config).eval()
        with torch.no_grad():
            model(**_inputs(model, 1, 8, getattr(config, "canvas_length", None), torch.Generator()))
    except Exception as error:  # a default config may lack values, or fit no rule of ours; the reader needs the reason
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"{model_type} cannot be built tiny ({reason}); give a checkpoint folder") from error
    default = CONFIG_MAPPING[model_type]()
    own = {name: getattr(config, name, None) for name in _UNSET}
    filled = [f"{name}={value}" for name, value in own.items() if value != getattr(default, name, None)]
    but = f", but {', '.join(filled)}" if filled else ""
    return model, f"tiny random {model_type}: {size / 1e6:.1f} M parameters, routing as in the default config{but}"


def _check_type(source: str) -> None:
    """Raise ValueError where what is no folder is no model type of transformers either."""
    from transformers import CONFIG_MAPPING

    if source in CONFIG_MAPPING:
        return
    if Path(source).is_file():
        raise ValueError(f"{source} is a file; name the folder of the checkpoint that it belongs to")
    if source.startswith(("/", ".")):
        raise ValueError(f"there is no folder {source}")
    if "/" in source:
        raise ValueError(f"{source} is no local folder; nothing is downloaded, so fetch the checkpoint first")
    near = difflib.get_close_matches(source, CONFIG_MAPPING, n=3) or ["qwen3_moe", "diffusion_gemma"]
    raise ValueError(f"{source!r} is no local folder and no transformers model type; near: {', '.join(near)}")


def _tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = config_class()
    if default.model_type == "diffusion_gemma":  # its default has no experts: the published 26B-A4B has these
        text = {**_TINY, "num_experts": 128, "top_k_experts": 8, "global_head_dim": 16}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        return config_class(text_config=text, vision_config=VISION)
    known = default.to_dict()
    changes = {name: value for name, value in _TINY.items() if name in known}
    unset = (None, 1) if known.get("num_experts") == 1 else (None,)
    changes |= {name: value for name, value in _UNSET.items() if name in known and known[name] in unset}
    if "kv_lora_rank" in known:  # latent attention: a key and value for every head, head_dim is the rotated part alone
        changes |= {"num_key_value_heads": _TINY["num_attention_heads"], "head_dim": _TINY["qk_rope_head_dim"]}
    return config_class(**changes)


def _model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if config_class in auto._model_mapping:
            return auto._model_mapping[config_class]
    raise ValueError(f"{config_class.__name__} has no language model class")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
