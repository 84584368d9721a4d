"""generate(): block-diffusion decoding of a batch of prompts, compiled with the passes, and what it did.

    result = dmoe_compile.generate(model, input_ids, config=dmoe_compile.Config(passes=("team", "dmoe")))
    tokenizer.batch_decode(result.answers)

The decoder is in decoding.py; here are its arguments, its results, streaming and the trace.

B: sequences; L: block length
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dmoe_compile import backend, loading
from dmoe_compile.config import Config, check_config, check_int
from dmoe_compile.decoding import Decoder, Forward
from dmoe_compile.sampling import Sampling

if TYPE_CHECKING:
    from rich.progress import Progress

Write = Callable[[Mapping[str, Any]], None]
PLAIN = ("prefill", "store")  # forwards that denoise nothing


class Streamer(Protocol):
    """What transformers' TextStreamer is, and anything else that takes tokens as they are finished."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Generated:
    """What generate() returns.

    Attributes:
        sequences: [B, N] int64 on the CPU: prompt and answer of each row, then padding.
        prompts, lengths: tokens of each row's prompt, and of prompt and answer together.
        forwards: forwards of each kind: "prefill", "first", "denoise", "speculate", "store".
        unique_experts: experts that a denoising forward used, mean over forwards and sites; NaN where not counted.
    """

    sequences: Tensor
    prompts: list[int]
    lengths: list[int]
    forwards: dict[str, int] = field(default_factory=dict)
    unique_experts: float = float("nan")

    @property
    def answers(self) -> list[Tensor]:
        """Generated tokens of each row, the end of text included."""
        return [row[a:b] for row, a, b in zip(self.sequences, self.prompts, self.lengths, strict=True)]

    @property
    def denoising(self) -> int:
        """Denoising forwards: all but prefill and store."""
        return sum(count for kind, count in self.forwards.items() if kind not in PLAIN)


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    config: Config | None = None,
    max_new_tokens: int = 128,
    mask_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    block_length: int | None = None,
    steps: int | None = None,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    editing_threshold: float | None = None,
    max_post_steps: int = 16,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
    trace: str | Path | Write | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Decode block by block with a KV cache of finished blocks.

    The model's forward takes input_ids, a 4D attention_mask that is added to attention scores, position_ids,
    past_key_values (a transformers Cache) and use_cache, and predicts each position's own token: SDAR (as Qwen3-MoE),
    LLaDA2 and their like. Not for models with a canvas and an encoder, such as DiffusionGemma, nor with sliding
    windows: the mask says who sees whom, in every layer.

    At temperature 0 the same call gives the same tokens, bit for bit. What TEAM does to sampling: docs/decoding.md.

    Args:
        model: a module. What torch.compile returned is run as it is, with TEAM if its options say so.
        input_ids: [B, S] int64, prompts.
        attention_mask: [B, S], 1 for the tokens of a prompt, 0 for padding on either side; None: there is no padding.
        config: compiles the model with these passes and options, see `compile`; None runs it as it is.
        max_new_tokens: length of the longest answer. Whole blocks are decoded, so what costs time is the next multiple.
        mask_token_id, eos_token_id, pad_token_id: the model's own (config, generation_config) if not given. No tokens
            in `eos_token_id=()` end an answer.
        block_length: tokens that are denoised together, L; the config's if not given.
        steps: denoising steps of a block, so that at least L / steps tokens are committed in each; L if not given.
        threshold: tokens that are surer than this are committed at once; above 1 the schedule alone decides.
        temperature: 0 is greedy.
        top_k, top_p: what is sampled from, at temperatures above 0.
        editing_threshold: committed tokens change where the model is surer than this of another; None never.
        max_post_steps: with editing, forwards of a block without masks, as long as each changes a token.
        generator: of sampling, on the model's device.
        streamer: takes the prompts, then the tokens of each block once it is finished: [B, n] int64 on the CPU. In a
            batch `pad_token_id` stands for what is no answer: the end of a prompt, whatever follows the end of text.
        trace: a file for one JSON object a line, or what takes these objects: a header, one for every forward, an end.
            Positions in it count from the first token of a row's prompt. Counts the experts, which costs some time
            (not those of plain forwards, where the model was compiled before, without ``stats``).
        progress: shows a bar.

    Raises:
        ValueError: for arguments out of range, or a token id that is needed and not known.
    """
    loading.check_model(model)
    check_config(config)
    _check_helpers(generator, streamer, progress)
    model, config = _runnable(model, config, counts=trace is not None)
    facts = _facts(model)
    stops = _stops(facts, eos_token_id)
    length = _block_length(config, block_length)
    sampling = Sampling(
        mask_token_id=_mask_token(facts, mask_token_id),
        block_length=length,
        steps=length if steps is None else steps,
        threshold=threshold,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        editing_threshold=editing_threshold,
        max_post_steps=max_post_steps,
        eos_token_ids=stops,
    )
    check_int("max_new_tokens", max_new_tokens, "length of the longest answer")
    if pad_token_id is not None:
        check_int("pad_token_id", pad_token_id, "the id of a token", least=0)
    pad = facts.get("pad_token_id") if pad_token_id is None else pad_token_id
    if not isinstance(pad, int):  # some configs hold a list, or none
        pad = stops[0] if stops else sampling.mask_token_id
    prompts, lengths = _prompts(input_ids, attention_mask, pad)
    _check_ids(model, [row[:n] for row, n in zip(prompts, lengths, strict=True)], sampling.mask_token_id)
    team = config.selected.get("team") if config is not None else None
    with _writer(trace) as write:
        seen = _Seen(write)
        decoder = Decoder(model, prompts, lengths, max_new_tokens, sampling, team, generator, seen.take)
        seen.padding = decoder.padding.tolist()
        options = None if config is None else config.to_options()
        write({"kind": "decoding", "options": options, **asdict(sampling), "prompts": lengths})
        answers = _Answers(decoder, lengths, pad)
        _stream(decoder, answers, input_ids, streamer, progress)
        result = replace(answers.result(), forwards=dict(seen.kinds), unique_experts=seen.mean())
        write({"kind": "end", "lengths": result.lengths, "forwards": result.forwards})
    return result


def _runnable(model: Any, config: Config | None, *, counts: bool) -> tuple[Any, Config | None]:
    """Return what is called, compiled if that is asked for, and the options that it has.

    Args:
        model, config: as generate() takes them.
        counts: whether a model that is compiled here counts its experts.
    """
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        if config is not None:
            raise ValueError(
                "config= is for a model that is not compiled yet, and this one is: leave config out, or give the model "
                "that torch.compile() was given"
            )
        config = backend.config_of(model)
    elif getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the model was compiled by model.compile(), which hides its options: give generate() what "
            'torch.compile(model, backend="dmoe", ...) returns, or the model and config='
        )
    elif config is not None:
        config = replace(config, stats=True) if counts else config
        model = backend.compiled(model, config)
    if getattr(model, "training", False):
        raise ValueError(
            "the model is in training mode, where dropout and the like are random; call model.eval() first"
        )
    loading.check_values(model)
    return model, config


def _stream(
    decoder: Decoder, answers: _Answers, input_ids: Tensor, streamer: Streamer | None, progress: Progress | None
) -> None:
    from dmoe_compile.bench import Bar

    bar = Bar(progress, total=answers.blocks)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for number, _ in enumerate(decoder.blocks()):
        bar.advance()
        if streamer is not None and (new := answers.block(number)).numel():
            streamer.put(new)
    if streamer is not None:
        streamer.end()


class _Answers:
    """What a decoder's ids mean: where each row's answer begins and ends."""

    def __init__(self, decoder: Decoder, lengths: list[int], pad: int) -> None:
        self.decoder, self.lengths, self.pad = decoder, lengths, pad
        self.length = decoder.sampling.block_length
        self.blocks = (decoder.ids.shape[1] - decoder.first) // self.length
        self.begins = [a + b for a, b in zip(decoder.padding.tolist(), lengths, strict=True)]
        self.limits = decoder.limits.tolist()

    def ends(self) -> list[int]:
        """Return the column behind each row's last token, as far as it is decoded."""
        return [self._end(*each) for each in zip(self.decoder.ids.cpu(), self.begins, self.limits, strict=True)]

    def _end(self, row: Tensor, begin: int, limit: int) -> int:
        stops = torch.isin(row[begin:limit], row.new_tensor(self.decoder.sampling.eos_token_ids))
        return begin + int(stops.nonzero()[0]) + 1 if stops.any() else limit

    def block(self, number: int) -> Tensor:
        """Return the new tokens of a finished block, [B, n] int64; n < L where no row has more."""
        start = self.decoder.first + number * self.length
        ids = self.decoder.ids[:, start : start + self.length].cpu()
        columns = torch.arange(start, start + self.length, device=ids.device)
        begins, ends = (ids.new_tensor(each).unsqueeze(1) for each in (self.begins, self.ends()))
        new = (columns >= begins) & (columns < ends)
        return ids.masked_fill(~new, self.pad)[:, new.any(0)]

    def result(self) -> Generated:
        """Return prompts and answers without the padding between blocks, rows padded at their ends."""
        first, ends = self.decoder.padding.tolist(), self.ends()
        rows = [row[a:b] for row, a, b in zip(self.decoder.ids.cpu(), first, ends, strict=True)]
        sequences = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        return Generated(sequences, self.lengths, [len(row) for row in rows])


class _Seen:
    """What the forwards of a decoding did: sums, and a line of the trace for each."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.padding: list[int] = []  # columns before each row's prompt
        self.kinds: Counter[str] = Counter()
        self.experts: list[int] = []

    def take(self, forward: Forward) -> None:
        self.kinds[forward.kind] += 1
        if forward.kind not in PLAIN:
            self.experts += forward.unique_experts.values()
        if self.write is not _no_trace:
            self.write({"kind": "forward", **self._line(forward)})

    def mean(self) -> float:
        return sum(self.experts) / len(self.experts) if self.experts else float("nan")

    def _line(self, forward: Forward) -> dict[str, Any]:
        line: dict[str, Any] = {"forward": forward.kind, "block": forward.block, "step": forward.step}
        if forward.ids is not None:
            line["sequences"] = [self._row(forward, row) for row in range(len(forward.ids))]
        return {**line, "unique_experts": dict(forward.unique_experts)}

    def _row(self, forward: Forward, row: int) -> dict[str, Any]:
        assert forward.ids is not None
        assert forward.choice is not None
        known = {"choice": int(forward.choice[row])}
        masks = {"committed": forward.committed, "edited": forward.edited}
        masks |= {"decoded": forward.decoded, "cold": forward.cold}
        offset = forward.start - self.padding[row]
        places = {name: [] if mask is None else mask[row].nonzero().flatten().tolist() for name, mask in masks.items()}
        tokens = {name: forward.ids[row, places[name]].tolist() for name in ("committed", "edited")}
        absolute = {name: [offset + place for place in each] for name, each in places.items()}
        return {**known, **absolute, "tokens": tokens["committed"], "edited_to": tokens["edited"]}


def _facts(model: Any) -> dict[str, Any]:
    """Return the special tokens that a model's configs name."""
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    names = ("mask_token_id", "eos_token_id", "pad_token_id")
    pairs = [(name, getattr(config, name, None)) for config in configs for name in names]
    return {name: value for name, value in pairs if value is not None}


def _stops(facts: Mapping[str, Any], given: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the tokens that end an answer; those that are given must be ids."""
    found = facts.get("eos_token_id") if given is None else given
    found = found.tolist() if isinstance(found, Tensor) else found
    if found is None:
        return ()
    stops = tuple(found) if isinstance(found, Iterable) and not isinstance(found, str) else (found,)
    for stop in stops if given is not None else ():
        check_int("eos_token_id", stop, "the id of a token, or a list of ids", least=0)
    return stops


def _mask_token(facts: Mapping[str, Any], given: int | None) -> int:
    found = facts.get("mask_token_id") if given is None else given
    if found is None:
        raise ValueError(
            "the model's config names no mask_token_id: pass mask_token_id=, such as tokenizer.mask_token_id"
        )
    return found  # Sampling checks it


def _block_length(config: Config | None, given: int | None) -> int:
    own = Config.block_length if config is None else config.block_length
    if config is not None and config.selected and given is not None and given != own:
        raise ValueError(
            f"block_length={given!r}, but the passes vote in blocks of {own}: set block_length in the config, once"
        )
    return own if given is None else given


def _prompts(input_ids: Any, mask: Any, pad: int) -> tuple[Tensor, list[int]]:
    """Return prompts that begin in column 0, [B, longest], and their lengths."""
    for name, given in (("input_ids", input_ids), ("attention_mask", mask)):
        if not isinstance(given, Tensor) and (given is not None or name == "input_ids"):
            raise ValueError(
                f"{name} is of type {type(given).__name__}, but must be a tensor; torch.tensor() makes one"
            )
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not len(input_ids):
        kind = f"{str(input_ids.dtype).removeprefix('torch.')}{list(input_ids.shape)}"
        raise ValueError(f"input_ids is {kind}, but must be int64[B, S], one prompt a row")
    if mask is None:
        return input_ids, [input_ids.shape[1]] * len(input_ids)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, but must be as input_ids, {list(input_ids.shape)}")
    real = mask.bool()
    rows = [row[each] for row, each in zip(input_ids, real, strict=True)]
    for number, each in enumerate(real):
        if (each[1:] & ~each[:-1]).sum() + each[:1].sum() > 1:
            raise ValueError(f"attention_mask has a hole in row {number}: padding may stand before or after a prompt")
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad), [len(row) for row in rows]


def _check_helpers(generator: Any, streamer: Any, progress: Any) -> None:
    """Raise ValueError for what generate() would only call late, or at some temperatures."""
    streams = callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))
    for name, given, fits, what in (
        ("generator", generator, isinstance(generator, torch.Generator), "a torch.Generator"),
        ("streamer", streamer, streams, "a streamer with put() and end(), such as transformers' TextStreamer"),
        ("progress", progress, callable(getattr(progress, "add_task", None)), "a rich.progress.Progress"),
    ):
        if given is not None and not fits:
            raise ValueError(f"{name}={given!r} must be {what}")


def _check_ids(model: Any, prompts: list[Tensor], mask_token_id: int) -> None:
    """Raise ValueError for prompts, [S] each, with the mask token or with ids that the model has no embedding of."""
    for number, prompt in enumerate(prompts):
        if (prompt == mask_token_id).any():
            raise ValueError(f"prompt {number} holds the mask token, {mask_token_id}, which decoding would fill in")
    embed = getattr(model, "get_input_embeddings", None)
    weight = getattr(embed() if embed is not None else None, "weight", None)
    if weight is None:
        return
    for what, ids in (("input_ids", torch.cat(prompts)), ("mask_token_id", torch.tensor([mask_token_id]))):
        wrong = ids[(ids < 0) | (ids >= len(weight))]
        if len(wrong):
            raise ValueError(f"{what} holds {int(wrong[0])}, but the model has tokens 0 to {len(weight) - 1}")


def _no_trace(_: Mapping[str, Any]) -> None:
    """Take a line of a trace that nobody asked for."""


@contextmanager
def _writer(trace: str | Path | Write | None) -> Iterator[Write]:
    """Give what takes the lines of a trace."""
    if trace is None:
        yield _no_trace
    elif callable(trace):
        yield trace
    elif not isinstance(trace, str | Path):
        raise ValueError(f"trace={trace!r} must name a file, or be a function that takes what is traced")
    else:
        with Path(trace).open("w") as file:
            yield lambda line: print(json.dumps(line, default=repr), file=file)
