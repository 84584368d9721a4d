"""Block-diffusion decoding with a KV cache, and TEAM's decoder on top of it.

    prompt -> prefill (its complete blocks)
    block:   [prompt tail | mask ...] -> denoise, denoise, ... -> store its keys and values -> next block

Tokens are committed by diffusers' BlockRefinementScheduler (sampling.py). What it lacks is here, in kv_cache.py and
candidates.py: a cache, the masks of the blocks, rows of different lengths, TEAM's candidates and their verification
(passes/team.py has the Options).

The model: any whose forward takes input_ids, a 4D attention mask, position_ids and a transformers Cache, and predicts
the token at each position itself (no shift).

B: sequences; C: candidate rows a sequence; L: block length; V: vocabulary; P: positions in the cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe_compile.candidates import cold_tokens, filled_in, most_confident, verify
from dmoe_compile.context import Denoising
from dmoe_compile.kv_cache import aside, compact, keep, mark_sizes
from dmoe_compile.sampling import Sampling, scheduler_of

if TYPE_CHECKING:
    from transformers import DynamicCache

    from dmoe_compile.passes.team import Options

_RECOMPILE_LIMIT = 64  # of one model: with Dynamo's own, 8, the third size of a batch would find no room


@dataclass(frozen=True)
class Forward:
    """What one forward of a decoding did.

    Attributes:
        block: number of the block, from the first that is generated; -1 for the prompt.
        step: denoising step inside it.
        kind: "prefill", "first" (of a block, with TEAM), "denoise" (one candidate), "speculate" or "store".
        start: column of the first token of its rows.
        input_ids: [B, C, S] that went in.
        ids: [B, L], the block afterwards.
        committed, edited: [B, L] bool, positions that became known in this step, and known ones that changed.
        choice: [B], the candidate that went on, all 0 where there was one.
        decoded, cold: [B, L] bool, what the context was told.
        unique_experts: experts that were used by site, where they were counted.
    """

    block: int
    step: int
    kind: str
    start: int
    input_ids: Tensor
    ids: Tensor | None = None
    committed: Tensor | None = None
    edited: Tensor | None = None
    choice: Tensor | None = None
    decoded: Tensor | None = None
    cold: Tensor | None = None
    unique_experts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    """A block in the middle of its denoising.

    `ids` [B, L] are known so far; `seen` [B, L] what the accepted candidate's last forward read; `tokens`,
    `confidence` [B, L] what it predicted; `edited` whether known tokens changed in it; `wide` is the cache with a row
    for every candidate.
    """

    number: int
    start: int
    ids: Tensor
    prompt: Tensor
    seen: Tensor | None = None
    tokens: Tensor | None = None
    confidence: Tensor | None = None
    edited: bool = True
    wide: DynamicCache | None = None


class Decoder:
    """One decoding of a batch; iterate over blocks().

    Args:
        forward: the model, compiled or not.
        input_ids: [B, up to the longest prompt] int64.
        lengths: tokens of each prompt; the others at its end are not read.
        new_tokens: tokens to generate at least; whole blocks are generated.
        sampling: how tokens are chosen.
        team: TEAM's options, None to decode without.
        generator: of sampling.
        watch: is told of every forward.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        input_ids: Tensor,
        lengths: Sequence[int],
        new_tokens: int,
        sampling: Sampling,
        team: Options | None = None,
        generator: torch.Generator | None = None,
        watch: Callable[[Forward], None] | None = None,
    ) -> None:
        from transformers import DynamicCache

        self.forward, self.sampling, self.team = forward, sampling, team
        self.generator, self.watch = generator, watch
        self.context = Denoising()
        self.cache: DynamicCache = DynamicCache()
        self.scheduler = scheduler_of(sampling)
        self.scheduler.set_timesteps(sampling.steps, device=input_ids.device)
        length, lengths = sampling.block_length, list(lengths)
        full = [each // length for each in lengths]
        blocks = max(-(-(each + new_tokens) // length) - count for each, count in zip(lengths, full, strict=True))
        self.first = max(full) * length  # the column of the first block that is generated
        self.padding = torch.tensor([self.first - count * length for count in full], device=input_ids.device)
        self.ids = input_ids.new_full((len(lengths), self.first + blocks * length), sampling.mask_token_id)
        self.prompt = torch.zeros_like(self.ids, dtype=torch.bool)
        for row, (each, pad) in enumerate(zip(lengths, self.padding.tolist(), strict=True)):
            self.ids[row, pad : pad + each] = input_ids[row, :each]
            self.prompt[row, pad : pad + each] = True
        self.limits = self.padding + torch.tensor(lengths, device=input_ids.device) + new_tokens  # columns
        self.finished = torch.zeros(len(lengths), dtype=torch.bool, device=input_ids.device)

    @torch.no_grad()
    def blocks(self) -> Iterator[Tensor]:
        """Decode block by block; yield each one's ids [B, L] once it is finished."""
        try:
            if self.first:
                self._plain("prefill", -1, 0, 0, self.first)
            for number, start in enumerate(range(self.first, self.ids.shape[1], self.sampling.block_length)):
                yield self._block(number, start)
                if self.finished.all():
                    break
        finally:
            self.context.close()

    def _block(self, number: int, start: int) -> Tensor:
        end = start + self.sampling.block_length
        block = _Block(number, start, compact(self.ids[:, start:end]), self.prompt[:, start:end])
        step = post = 0
        while self._unknown(block) and step < self.sampling.steps:
            if self.team is not None and self.team.speculate and block.seen is not None:
                self._speculate(block, step)
            else:
                self._denoise(block, step)
            step += 1
        if self._unknown(block):  # the model predicted mask tokens
            self._denoise(block, step, last=True)
            step += 1
        block.edited = True  # what was committed last has not been read yet
        while self.sampling.editing_threshold is not None and block.edited and post < self.sampling.max_post_steps:
            self._denoise(block, step + post, last=True)
            post += 1
        self.ids[:, start:end] = block.ids
        self._plain("store", number, step + post, start, end)
        new = ~block.prompt & ~self.finished.unsqueeze(-1)
        stops = torch.tensor(self.sampling.eos_token_ids, device=block.ids.device)
        self.finished |= (torch.isin(block.ids, stops) & new).any(1) | (end >= self.limits)
        return block.ids

    def _unknown(self, block: _Block) -> bool:
        """Say whether a sequence that goes on has masked tokens."""
        return bool((self._masked(block.ids) & ~self.finished.unsqueeze(-1)).any())

    def _plain(self, kind: str, number: int, step: int, start: int, end: int) -> None:
        """Run what is known through the model for its keys and values."""
        self.context.plain(self._absent(start, end))
        ids = compact(self.ids[:, start:end])
        self._run(ids, self.cache, start)
        keep(self.cache)
        self._tell(Forward(number, step, kind, start, ids.unsqueeze(1)))

    def _denoise(self, block: _Block, step: int, *, last: bool = False) -> None:
        """One forward with one candidate; the `last` of a block commits all that is left."""
        before, first = block.ids, block.seen is None
        decoded, cold = self._masks(block, before)
        self._describe(decoded, cold, block.start, 1)
        logits = self._run(before, aside(self.cache), block.start)
        results = self._commit(logits, before, block.prompt, step, last=last)
        kind = "first" if first and self.team is not None else "denoise"
        choice = torch.zeros(len(before), dtype=torch.int64)
        self._take(block, step, kind, before.unsqueeze(1), results, choice, decoded, cold)

    def _speculate(self, block: _Block, step: int) -> None:
        """One forward with candidates that fill in the most confident masked tokens, and the verdict on them."""
        assert self.team is not None
        assert block.tokens is not None
        block.wide = self._widened() if block.wide is None else block.wide
        before = block.ids
        assert block.confidence is not None
        places = most_confident(self._masked(before), block.confidence, self.team)
        guessed = block.tokens.gather(1, places)
        candidates = filled_in(before, places, guessed, self._masked(before))  # [B, C, L]
        count = candidates.shape[1]
        decoded, cold = self._masks(block, candidates[:, -1])
        self._describe(decoded, cold, block.start, count)
        logits = self._run(candidates.flatten(0, 1), aside(block.wide), block.start)
        prompt = block.prompt.repeat_interleave(count, 0)
        results = self._commit(logits, candidates.flatten(0, 1), prompt, step)
        _, tokens, _, moved = (each.unflatten(0, (-1, count)) for each in results)
        predicted = torch.where(self._masked(candidates), tokens, candidates)
        choice = verify(predicted, moved, places)
        self.context.accept(choice)
        self._take(block, step, "speculate", candidates, results, choice, decoded, cold)

    def _take(
        self,
        block: _Block,
        step: int,
        kind: str,
        candidates: Tensor,
        results: Sequence[Tensor],
        choice: Tensor,
        decoded: Tensor | None,
        cold: Tensor | None,
    ) -> None:
        """Go on from the chosen candidate of each sequence: what it read, and what came of it."""
        before, rows = block.ids, torch.arange(len(choice), device=choice.device)
        count = candidates.shape[1]
        block.ids, block.tokens, block.confidence, _ = (
            each.unflatten(0, (-1, count))[rows, choice] for each in results
        )
        block.seen = candidates[rows, choice]
        committed = self._masked(before) & ~self._masked(block.ids)
        edited = ~self._masked(before) & (before != block.ids)
        block.edited = bool((edited & ~self.finished.unsqueeze(-1)).any())
        self._tell(
            Forward(
                block.number, step, kind, block.start, candidates, block.ids, committed, edited, choice, decoded, cold
            )
        )

    def _absent(self, start: int, end: int) -> Tensor | None:
        """Return the tokens of no sequence, [B, S] bool: padding, and rows that are finished; None where none ever is.

        Of one prompt there are none. A batch may have some in any block, and one graph serves them all.
        """
        if len(self.ids) == 1 or (end <= self.first and not self.padding.any()):
            return None
        columns = torch.arange(start, end, device=self.ids.device)
        return (columns < self.padding.unsqueeze(-1)) | self.finished.unsqueeze(-1)

    def _tell(self, forward: Forward) -> None:
        if self.watch is not None:
            self.watch(replace(forward, unique_experts=self.context.counted()))

    def _describe(self, decoded: Tensor | None, cold: Tensor | None, start: int, candidates: int) -> None:
        """Tell the context what the next forward denoises."""
        if self.team is None:
            self.context.plain(self._absent(start, start + self.sampling.block_length))
            return
        shape = (len(self.ids), self.sampling.block_length)
        finished = self.finished if bool(self.finished.any()) else None
        self.context.step(decoded, cold, finished=finished, shape=shape, offset=start, candidates=candidates)

    def _masks(self, block: _Block, filled: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the tokens that are decoded and those that are cold, [B, L] bool; None in the first forward.

        Args:
            block: as the last forward left it.
            filled: [B, L], its ids with all speculated tokens in.
        """
        if self.team is None or block.seen is None or block.confidence is None:
            return None, None
        decoded = ~self._masked(block.seen) & (block.seen == block.ids)  # what was edited is computed anew
        return decoded, cold_tokens(self._masked(block.ids), ~self._masked(filled), block.confidence, self.team)

    def _commit(
        self, logits: Tensor, ids: Tensor, prompt: Tensor, step: int, *, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids after one step, predicted tokens, their probabilities, and what was committed, all [R, L].

        The last step commits every masked token, and none as a mask.
        """
        s = self.sampling
        threshold = s.threshold
        if last:
            threshold = -1.0  # which every probability exceeds
            logits = logits.index_fill(-1, torch.tensor([s.mask_token_id], device=logits.device), -torch.inf)
        results = []
        editing = s.editing_threshold is not None
        together = not editing or bool((prompt == prompt[:1]).all())  # the scheduler takes one prompt mask
        for rows in [slice(None)] if together else [slice(row, row + 1) for row in range(len(ids))]:
            out = self.scheduler.step(
                logits[rows],
                step,
                ids[rows],
                mask_token_id=s.mask_token_id,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                threshold=threshold,
                editing_threshold=s.editing_threshold,
                prompt_mask=prompt[rows][0],
                generator=self.generator,
            )
            results.append((out.prev_sample, out.sampled_tokens, out.sampled_probs, out.transfer_index))
        parts = [torch.cat(each) for each in zip(*results, strict=True)]
        return parts[0], parts[1], parts[2], parts[3]

    def _run(self, ids: Tensor, cache: DynamicCache, start: int) -> Tensor:
        """Return the logits [R, S, V] of rows that stand at column `start`; their keys and values go into the cache."""
        count = len(ids) // len(self.ids)
        columns = torch.arange(start, start + ids.shape[1], device=ids.device)
        padding = self.padding.repeat_interleave(count)
        positions = (columns - padding.unsqueeze(-1)).clamp(min=0)
        mask = self._attention(columns, padding, self._dtype())
        mark_sizes(cache, mask, ids, positions, whole=ids.shape[1] == self.sampling.block_length)
        arguments = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
        with torch._dynamo.config.patch(recompile_limit=limit):  # each number of rows has graphs of its own
            logits: Tensor = self.context.run(self.forward, input_ids=ids, **arguments).logits
        return logits

    def _attention(self, columns: Tensor, padding: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the block-causal mask [R, 1, S, P + S] that is added to attention scores."""
        keys = torch.arange(int(columns[-1]) + 1, device=columns.device)
        length = self.sampling.block_length
        seen = (keys // length <= (columns // length).unsqueeze(-1)) & (keys >= padding[:, None, None])
        seen |= keys == columns.unsqueeze(-1)  # padding sees itself: a row that sees nothing would be NaN
        added = torch.zeros(seen.shape, dtype=dtype, device=columns.device)
        return added.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    def _dtype(self) -> torch.dtype:
        owner = getattr(self.forward, "__self__", self.forward)
        return getattr(owner, "dtype", torch.float32)

    def _widened(self) -> DynamicCache:
        """Return the cache with a row for every candidate."""
        assert self.team is not None
        wide = aside(self.cache)
        if wide.get_seq_length():
            wide.batch_repeat_interleave(2**self.team.candidates)
        return wide

    def _masked(self, ids: Tensor) -> Tensor:
        return ids == self.sampling.mask_token_id
