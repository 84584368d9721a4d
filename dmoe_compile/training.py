"""Train the demonstration model: a small mixture-of-experts diffusion language model, from nothing.

    python -m dmoe_compile.training OUT [--steps N] [--minutes M]      the same command again goes on where it stopped

The model is a transformers Qwen3MoeForCausalLM; nothing of it is ours. It is trained as block diffusion models are
(BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303): attention is causal from block to block and full inside of one, a
share t of a block's tokens is replaced by the mask token, and the loss is their cross entropy over t, which bounds the
likelihood from below when t is uniform. As in LLaDA2.0 (arXiv 2512.15745), t keeps to a band, here from 0.1 to 1.
One thing is different: half of the blocks are masked from some place to their end, as decoding mostly leaves them. A
worked answer says its results twice, so that with scattered masks a model can copy nearly all of them, and learns to
work out few. For the same reason it trains on drills too, in which nothing is said twice.

Of the first steps every second one is autoregressive, as SDAR trains a model before it adapts it to blocks. Masks alone
hardly teach to look up what follows a name in a table: a mask knows nothing of the token before it, so that two things
must be learned at once. Next tokens teach it soon, and masks then take it over.

Attention learns with Muon (Keller Jordan; scaled to AdamW's rates as in arXiv 2502.16982), the rest with AdamW: heads
that copy, which every skill rests on, come within hundreds of steps then, and not within thousands.

Two things make a step cheap. A problem takes one or two blocks (problems.py), so that instead of a noisy copy beside
the clean one, a sequence ends with its one noisy block. And a batch holds sequences of one length: nothing is padding.

B: sequences; S: tokens of a sequence, one or two blocks; L: block length, 32; V: vocabulary
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe_compile import problems
from dmoe_compile.config import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

BLOCK_LENGTH = 32
PAD, MASK, END, UNKNOWN = "<pad>", "<mask>", "<end>", "<unknown>"
_LEAST_NOISE = 0.1
_ORDERED = 0.5  # share of blocks that are masked from some place to their end
_FILL_WEIGHT = 0.1  # of the ends that fill a block up: the first one says it all
_MIX = (  # what batches are made of, in turn: what is hard to learn more often
    *("arithmetic", "sums", "lookup", "lookups", "counting", "counts"),
    *("arithmetic", "sums", "lookup", "sorting", "counting", "edits"),
)
_MUON_RATE = 2.5  # Muon's learning rate, in AdamW's
_AUTOREGRESSIVE = 0.7  # share of the training in which every second step is autoregressive
_CHUNK = 250  # steps whose problems and noise come from one seed; training is saved and goes on between chunks


def check_schedule(steps: int, tokens: int, learning_rate: float, warm_up: int) -> None:
    """Raise ValueError for what can't be trained with; `tokens` is of a step, in sequences of one or two blocks."""
    check_int("steps", steps, "optimizer steps")
    if tokens < 1 or tokens % (2 * BLOCK_LENGTH):
        raise ValueError(f"tokens is {tokens}, but must be a multiple of two blocks, {2 * BLOCK_LENGTH}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}, but must be above 0")
    check_int("warm_up", warm_up, "steps in which the learning rate rises")


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Attributes:
        steps: of the optimizer, all in all.
        tokens: of a step, so that short sequences are more of them.
        learning_rate: its peak, AdamW's; it rises over `warm_up` steps and falls as a cosine.
        balance: weight of the loss that spreads tokens over experts (Switch Transformer, arXiv 2101.03961).
        seed: of weights, problems and noise.
        minutes: stop at the end of a chunk once so many have passed; None never.
    """

    steps: int = 7500
    tokens: int = 2048
    learning_rate: float = 2e-3
    warm_up: int = 300
    balance: float = 1e-3
    seed: int = 0
    minutes: float | None = None

    def __post_init__(self) -> None:
        check_schedule(self.steps, self.tokens, self.learning_rate, self.warm_up)


@dataclass(frozen=True)
class Batch:
    """Sequences whose last block is noisy.

    Attributes:
        input_ids: [B, S] int64.
        targets: [B, L] int64, what stands in the last block.
        weights: [B, L] fp32, of each position's cross entropy; 0 where nothing is masked.
        worth: [B, L] fp32, of each position's cross entropy if none were masked; 0 before the answer. They sum to 1.
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    worth: Tensor


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every word of problems.py; it gives any of their texts back as it was."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"  # as in SentencePiece
    marks = set(".,:;?")
    known = [PAD, MASK, END, UNKNOWN, *(word if word in marks else space + word for word in problems.words())]
    vocabulary = {word: number for number, word in enumerate(known)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex("[.,:;?]"), "isolated"),
    ])  # fmt: skip
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, mask_token=MASK, eos_token=END, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def model_config(words: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Return the architecture: 4 layers of 64 experts, 8 a token; 3.5 M parameters, of which 0.8 M take part."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=-(-len(words) // 64) * 64, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, intermediate_size=256, moe_intermediate_size=32, num_experts=64,
        num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=512, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, initializer_range=0.06,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
        mask_token_id=words.mask_token_id,
    )  # fmt: skip


def block_mask(tokens: int, length: int = BLOCK_LENGTH) -> Tensor:
    """Return what is added to attention scores, [1, 1, S, S]: a token sees its block and those before it."""
    block = torch.arange(tokens) // length
    hidden = block.unsqueeze(0) > block.unsqueeze(1)
    return torch.zeros(1, 1, tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)


def batches(words: PreTrainedTokenizerFast, tokens: int, seed: int) -> Iterator[Batch]:
    """Yield batches of `tokens` tokens without end; equal seeds give equal ones."""
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    waiting: dict[int, list[tuple[list[int], int, int]]] = {}
    for problem in problems.draw("train", seed, _MIX):
        ids, begin, end = encode(words, problem)
        blocks = range(begin // BLOCK_LENGTH, len(ids) // BLOCK_LENGTH)
        # The block with more of the answer is noisy more often.
        parts = [min(end, (b + 1) * BLOCK_LENGTH) - max(begin, b * BLOCK_LENGTH) for b in blocks]
        block = rng.choices(blocks, [max(part, 1) for part in parts])[0]
        size = (block + 1) * BLOCK_LENGTH
        queue = waiting.setdefault(size, [])
        queue.append((ids[:size], begin, end))
        if len(queue) == tokens // size:
            yield _noisy(queue, words.mask_token_id, noise)
            queue.clear()


def encode(words: PreTrainedTokenizerFast, problem: problems.Problem) -> tuple[list[int], int, int]:
    """Return prompt and answer in whole blocks, filled up with ends; where the answer begins, and behind its end."""
    prompt = words(problem.prompt)["input_ids"]
    ids = [*prompt, *words(problem.answer)["input_ids"], words.eos_token_id]
    fill = -len(ids) % BLOCK_LENGTH
    return [*ids, *[words.eos_token_id] * fill], len(prompt), len(ids)


def _noisy(sequences: list[tuple[list[int], int, int]], mask_id: int, generator: torch.Generator) -> Batch:
    ids = torch.tensor([each for each, _, _ in sequences])
    begins, ends = (torch.tensor([each[i] for each in sequences]).unsqueeze(1) for i in (1, 2))
    number, size = ids.shape
    places = torch.arange(size - BLOCK_LENGTH, size)
    # Shares of a batch lie evenly in the band, which has less variance than drawing each by itself.
    even = (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number
    share = (_LEAST_NOISE + (1 - _LEAST_NOISE) * even).unsqueeze(1)
    masked = (torch.rand(number, BLOCK_LENGTH, generator=generator) < share) & (places >= begins)
    worth = torch.where(places < ends, 1.0, _FILL_WEIGHT) * (places >= begins)
    first = begins.clamp(min=size - BLOCK_LENGTH)
    cut = first + torch.rand(number, 1, generator=generator) * (ends.clamp(max=size) - first)
    ordered = torch.rand(number, 1, generator=generator) < _ORDERED
    masked = torch.where(ordered, places >= cut.floor(), masked)
    share = torch.where(ordered, (worth * masked).sum(1, keepdim=True) / worth.sum(1, keepdim=True), share)
    targets = ids[:, -BLOCK_LENGTH:].clone()
    ids[:, -BLOCK_LENGTH:][masked] = mask_id
    worth /= worth.sum(1, keepdim=True) * number
    return Batch(ids, targets, masked * worth / share, worth)


def loss_of(
    model: Qwen3MoeForCausalLM, batch: Batch, balance: float, autoregressive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the loss that is trained on, and its part without the balancing of experts, both scalars.

    Args:
        model: the model.
        batch: the sequences.
        balance: weight of the loss that spreads tokens over experts.
        autoregressive: predict every token of an answer from those before it instead, with a causal mask.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    ids, weights, block = batch.input_ids, batch.weights, BLOCK_LENGTH
    if autoregressive:
        ids, weights, block = torch.cat([ids[:, :-BLOCK_LENGTH], batch.targets], 1), batch.worth, 1
    mask = block_mask(ids.shape[1], block).to(ids.device)
    # The whole model would balance experts itself, and takes this mask, which has no padding, for one of padding.
    out = model.model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    hidden = out.last_hidden_state.roll(1, 1) if autoregressive else out.last_hidden_state
    logits = model.lm_head(hidden[:, -BLOCK_LENGTH:]).flatten(0, 1).float()
    entropy = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
    found = (entropy * weights.flatten()).sum()
    config = model.config
    spread = load_balancing_loss_func(out.router_logits, config.num_experts, config.num_experts_per_tok)
    return found + balance * spread, found


def train(folder: Path, settings: Settings) -> list[dict[str, Any]]:
    """Train until `settings` are met, saving as it goes; return the log, a line for every chunk.

    Args:
        folder: takes the model and its tokenizer (as save_pretrained has them), log.jsonl, and in state-STEP/ what is
            needed to go on. What an earlier call left there is gone on from, if its settings were the same.

    Raises:
        ValueError: where other settings were used in that folder.
    """
    from rich.progress import Progress

    log = folder / "log.jsonl"
    lines = _log_so_far(log, settings)
    training = _Training(settings)
    if lines:
        training.go_on(folder, lines[-1]["step"])
    start = time.monotonic()
    with Progress() as bar:
        task = bar.add_task("train", total=settings.steps, completed=training.done)
        while training.done < settings.steps:
            lines.append(asdict(settings) | training.chunk(lambda: bar.advance(task)))
            shown = [
                f"{lines[-1][name]:.4f}" for name in ("loss", "autoregressive_loss") if lines[-1][name] is not None
            ]
            bar.update(task, description=f"loss {', '.join(shown)}")
            training.save(folder)
            # The log says which state is whole: it is replaced at once, after what it tells of is saved.
            written = log.with_suffix(".new")
            written.write_text("".join(json.dumps(line) + "\n" for line in lines))
            written.replace(log)
            training.forget_others(folder)
            if settings.minutes is not None and time.monotonic() - start > 60 * settings.minutes:
                break
    return lines


class _Training:
    """A model and what trains it, `done` steps from its beginning."""

    def __init__(self, settings: Settings) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
        from transformers import Qwen3MoeForCausalLM, get_cosine_schedule_with_warmup

        self.settings = settings
        self.done = 0
        self.words = tokenizer()
        self.accelerator = Accelerator()
        set_seed(settings.seed)
        model = Qwen3MoeForCausalLM(model_config(self.words))
        model.config._experts_implementation = "grouped_mm"  # batched_mm takes 60 times as long to train on a CPU
        trained = optimizers(model, settings.learning_rate)
        schedules = [get_cosine_schedule_with_warmup(each, settings.warm_up, settings.steps) for each in trained]
        # Optimizers come before what sets their rates.
        self.model, *self.steppers = self.accelerator.prepare(model, *trained, *schedules)

    def go_on(self, folder: Path, step: int) -> None:
        self.accelerator.load_state(str(_state(folder, step)))
        self.done = step

    def chunk(self, tick: Callable[[], None]) -> dict[str, Any]:
        """Train for a chunk, calling `tick` at every step; return its line of the log."""
        began, settings = time.monotonic(), self.settings
        source = batches(self.words, settings.tokens, settings.seed * 1_000_003 + self.done)
        losses: dict[bool, list[Tensor]] = {False: [], True: []}
        for _ in range(min(_CHUNK, settings.steps - self.done)):
            autoregressive = self.done % 2 == 0 and self.done < _AUTOREGRESSIVE * settings.steps
            batch = _on(next(source), self.accelerator.device)
            loss, plain = loss_of(self.model, batch, settings.balance, autoregressive)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            for stepper in self.steppers:
                stepper.step()
            self.model.zero_grad()
            losses[autoregressive].append(plain.detach())
            self.done += 1
            tick()
        means = {kind: torch.stack(each).mean().item() if each else None for kind, each in losses.items()}
        seconds = time.monotonic() - began
        return {"step": self.done, "loss": means[False], "autoregressive_loss": means[True], "seconds": seconds}

    def save(self, folder: Path) -> None:
        save(self.accelerator.unwrap_model(self.model), self.words, folder)
        self.accelerator.save_state(str(_state(folder, self.done)))

    def forget_others(self, folder: Path) -> None:
        for old in folder.glob("state-*"):
            if old != _state(folder, self.done):
                shutil.rmtree(old)


def _state(folder: Path, step: int) -> Path:
    return folder / f"state-{step}"


def optimizers(model: Qwen3MoeForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return what trains a model: Muon for the matrices of attention, AdamW for the rest; see above."""
    attention: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (attention if "self_attn" in name and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(attention, _MUON_RATE * learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ]


def save(model: Qwen3MoeForCausalLM, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in bf16, and its tokenizer, as from_pretrained() reads them."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(getattr(batch, each.name).to(device) for each in fields(batch)))


def _log_so_far(log: Path, settings: Settings) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    wanted = asdict(settings) | {"minutes": None}
    for line in lines:
        found = {name: line[name] for name in wanted} | {"minutes": None}
        if found != wanted:
            raise ValueError(f"{log} was written with {found}, not {wanted}: give the same settings, or another folder")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m dmoe_compile.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model goes, and what is needed to go on")
    default = Settings()
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float if value is None else type(value), default=value)
    args = vars(parser.parse_args())
    folder = args.pop("folder")
    folder.mkdir(parents=True, exist_ok=True)
    train(folder, Settings(**args))


if __name__ == "__main__":
    main()
