"""What `dmoe generate` does: a model and its tokenizer from a folder, prompts, blocks printed as they are finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from dmoe_compile import backend, bench, loading
from dmoe_compile.bench import Row
from dmoe_compile.config import Config, check_int
from dmoe_compile.generation import generate
from dmoe_compile.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """What is decoded: a folder or model type, prompts as texts or as comma-separated token ids, and how they are read.

    Attributes:
        chat: put texts into the tokenizer's chat template, if it has one.
        seed: of sampling, and of the weights of a model type.
    """

    model: str
    prompts: list[str]
    prompt_ids: list[str]
    chat: bool = True
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        bench.check_seed(self.seed)

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Tensor]:
        """Return each prompt's ids.

        Raises:
            ValueError: without a prompt, without a tokenizer for a text, or for ids that are none.
        """
        if not self.prompts and not self.prompt_ids:
            raise ValueError("there is no prompt: give --prompt TEXT, or --prompt-ids 1,2,3")
        if self.prompts and tokenizer is None:
            raise ValueError(f"{self.model} has no tokenizer: give --prompt-ids 1,2,3 instead of --prompt")
        texts = [self._encode(tokenizer, text) for text in self.prompts if tokenizer is not None]
        return [torch.tensor(each, dtype=torch.int64) for each in [*texts, *map(_numbers, self.prompt_ids)]]

    def _encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        if self.chat and tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer(text)["input_ids"]


def run(
    source: Source,
    config: Config,
    how: Mapping[str, Any],
    warm_up: bool = False,
    trace: Path | None = None,
    threads: int | None = None,
    to_stderr: bool = False,
) -> Row:
    """Decode, print each block once it is finished, and return what it took.

    Args:
        source: model and prompts.
        config: passes and options to compile with.
        how: further arguments of generate().
        warm_up: decode once before, unprinted and untimed, so that everything is compiled.
        trace: a file for generate()'s trace.
        threads: CPU threads; torch's own choice if None.
        to_stderr: print there, so that standard output stays free.
    """
    given = {name: value for name, value in how.items() if value is not None}
    check_int("max_new_tokens", given.pop("max_new_tokens"), "length of the longest answer")
    Sampling(**{"mask_token_id": 0, "block_length": config.block_length, **given})  # said now, not after minutes
    if trace is not None:
        bench.check_file("--trace", trace)
    bench.use_threads(threads)
    tokenizer = loading.load_tokenizer(source.model, source.trust_remote_code)
    prompts = source.tokens(tokenizer)  # before the model loads, which can take minutes
    model, _ = loading.load_model(source.model, source.trust_remote_code, source.seed)
    mask_token = how.get("mask_token_id")
    if mask_token is None and tokenizer is not None and getattr(model.config, "mask_token_id", None) is None:
        mask_token = tokenizer.mask_token_id
    lengths = [len(each) for each in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(model.device)
    attention_mask = torch.arange(input_ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    compiled = backend.compile(model, replace(config, stats=True) if trace is not None else config)
    decode = partial(generate, compiled, input_ids, attention_mask=attention_mask.to(model.device))
    arguments = {"block_length": config.block_length, **how, "mask_token_id": mask_token}

    def seeded() -> torch.Generator:
        return torch.Generator(device=model.device).manual_seed(source.seed)

    if warm_up:
        decode(**arguments, generator=seeded())
    printer = _Printer(tokenizer, len(prompts), sys.stderr if to_stderr else sys.stdout)
    start = time.perf_counter()
    result = decode(**arguments, generator=seeded(), streamer=printer, trace=trace)
    seconds = time.perf_counter() - start
    unique = result.unique_experts
    return bench.environment() | {
        "model": source.model,
        "options": config.to_options(),
        "answers": [answer.tolist() for answer in result.answers],
        "tokens": sum(map(len, result.answers)),
        "forwards": result.forwards,
        "denoising": result.denoising,
        "unique_experts": None if unique != unique else unique,
        "seconds": seconds,
        "warm": warm_up,
    }


def describe(row: Row) -> str:
    """Return what a decoding took, as one line."""
    tokens, seconds, denoising = row["tokens"], row["seconds"], row["denoising"]
    compiling = "" if row["warm"] else " with compiling"
    line = f"{tokens} tokens in {seconds:.2f} s{compiling} ({tokens / seconds:.1f} a second)"
    line += f", {denoising} denoising forwards ({tokens / denoising:.2f} tokens each)"
    return line if row["unique_experts"] is None else f"{line}, {row['unique_experts']:.1f} unique experts a layer"


class _Printer:
    """Prints blocks as text, or as ids where there is no tokenizer; in a batch a line for each row of a block."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, rows: int, file: TextIO) -> None:
        from transformers import TextStreamer

        self.tokenizer, self.rows, self.file = tokenizer, rows, file
        self.prompt = True
        alone = tokenizer is not None and rows == 1
        self.streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if alone else None

    def put(self, value: Tensor) -> None:
        if self.streamer is not None:
            with redirect_stdout(self.file):
                self.streamer.put(value)
        elif not self.prompt:
            for number, row in enumerate(value):
                name = f"[{number}] " if self.rows > 1 else ""
                text = " ".join(map(str, row.tolist())) if self.tokenizer is None else self._text(row)
                print(f"{name}{text}", file=self.file, flush=True)
        self.prompt = False

    def _text(self, row: Tensor) -> str:
        assert self.tokenizer is not None
        text: str = self.tokenizer.decode(row, skip_special_tokens=True)
        return text

    def end(self) -> None:
        if self.streamer is not None:
            with redirect_stdout(self.file):
                self.streamer.end()


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--prompt-ids {text}: must be token ids with commas between, such as 1,2,3") from error
