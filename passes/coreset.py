"""Keep the tokens of a block inside a coreset of experts: what every coreset method has in common.

    scores [T, E] -> blocks [N, L, E] -> coreset [N, E] (the method's own rule) -> scores outside it = -inf

The method only chooses the coreset. The model's top-k then picks from what is left, and the model's own
weights follow, because only the score operand of that one top-k is replaced.

Group-limited routers choose groups first. They see the scores with a finite penalty outside the
coreset, so that groups are compared by their experts in it (-inf would make groups with one such
expert equal). If a token's groups hold fewer than k experts of the coreset, the rest come from the
coreset outside its groups, best score first: blocks never leave their coreset.
Tokens that do not vote (padding) are not routed either: they are pointed at the experts with most
votes, which are read anyway, and activate none of their own.

    B, S: sequences and tokens a sequence; L: tokens a block; N: blocks of the forward; E, k: experts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (scores [N, L, E], ids [N, L, k], voting [N, L]) -> coreset [N, E]; with own weights [N, L, k] as a keyword `weights`
Rule = Callable[..., Tensor]


@dataclass(frozen=True)
class Blocks:
    """How the tokens of one forward fall into blocks.

    Attributes:
        batch, seq: B and S; int, or SymInt while a rule is traced, which torch's stubs take for no number.
        length: tokens of a block; the last block of a row may be shorter.
        voting: [B, S] bool, or None where every token votes. A row's first block starts at its first voting token.
        whole: whether all tokens of the forward are one block instead.
        silent: [B, S] bool, tokens that do not vote though they are part of their block; None where there are none.
        candidates: rows of one sequence, one after the other: versions of the same blocks, which share coresets.
    """

    batch: Any
    seq: Any
    length: int
    voting: Tensor | None = None
    whole: bool = False
    silent: Tensor | None = None
    candidates: int = 1

    @property
    def even(self) -> bool:
        """Whether blocks are plain views of the rows: no padding, and rows cut without a rest."""
        return (
            self.voting is None
            and isinstance(self.seq, int)
            and (self.seq <= self.length or self.seq % self.length == 0)
        )

    @property
    def tokens(self) -> int:
        """Tokens of a block as they are laid out: a row shorter than a block is one block of its own length."""
        return min(self.length, self.seq) if isinstance(self.seq, int) else self.length

    @property
    def count(self) -> Any:
        """Blocks of one row."""
        return (self.seq + self.tokens - 1) // self.tokens

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B*S, E] as blocks [N, L, E], and which of their tokens vote, [N, L] bool."""
        heard = torch.ones(1, 1, dtype=torch.bool, device=x.device) if self.silent is None else ~self.silent
        heard = heard.expand(self.batch, self.seq)
        if self.whole:
            voting = heard if self.voting is None else heard & self.voting
            return x.unsqueeze(0), voting.reshape(1, -1)
        rows = x.reshape(self.batch, self.seq, x.shape[-1])
        if self.even:
            return self._merged(rows), self._merged(heard.unsqueeze(-1)).squeeze(-1)
        slots = torch.arange(self.count * self.tokens, device=x.device) + self._start(x)  # [B or 1, slots]
        here = slots.clamp(max=self.seq - 1).expand(self.batch, self.count * self.tokens)
        voting = (slots < self.seq).expand_as(here) & heard.gather(1, here)
        if self.voting is not None:
            voting = voting & self.voting.gather(1, here)
        blocks = rows.gather(1, here.unsqueeze(-1).expand(*here.shape, x.shape[-1]))
        return self._merged(blocks), self._merged(voting.unsqueeze(-1)).squeeze(-1)

    def spread(self, x: Tensor) -> Tensor:
        """Return what [N, E] says of each block as [B*S, E]: for each token what its block has."""
        if self.whole:
            return x.expand(self.batch * self.seq, x.shape[-1])
        if self.candidates > 1:
            x = x.reshape(self.batch // self.candidates, 1, self.count, x.shape[-1])
            x = x.expand(-1, self.candidates, self.count, x.shape[-1])
        rows = x.reshape(self.batch, self.count, x.shape[-1])
        if self.even:
            tokens = rows.unsqueeze(2).expand(self.batch, self.count, self.tokens, x.shape[-1])
        else:
            slots = torch.arange(self.seq, device=x.device) - self._start(x)
            block = slots.div(self.tokens, rounding_mode="floor").clamp(min=0).expand(self.batch, self.seq)
            tokens = rows.gather(1, block.unsqueeze(-1).expand(self.batch, self.seq, x.shape[-1]))
        return tokens.reshape(self.batch * self.seq, x.shape[-1])

    def _merged(self, rows: Tensor) -> Tensor:
        """Return [B, slots, E] as [N, L, E], the candidates of a sequence's block in one."""
        width = rows.shape[-1]
        if self.candidates == 1:
            return rows.reshape(self.batch * self.count, self.tokens, width)
        sequences, tokens = self.batch // self.candidates, self.candidates * self.tokens
        blocks = rows.reshape(sequences, self.candidates, self.count, self.tokens, width).transpose(1, 2)
        return blocks.reshape(sequences * self.count, tokens, width)

    def _start(self, x: Tensor) -> Tensor:
        """Return the position of each row's first block, [B or 1, 1] int64."""
        if self.voting is None:
            return torch.zeros(1, 1, dtype=torch.int64, device=x.device)
        return self.voting.to(torch.int8).argmax(1, keepdim=True)


def choose(scores: Tensor, blocks: Blocks, top_k: int, rule: Rule, own: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Apply a coreset method; return the experts each token may use, [B*S, E] bool.

    A token with NaN or infinite scores does not vote: it would decide for all of its block.

    Args:
        scores: [B*S, E], selection scores.
        blocks: how tokens fall into blocks.
        top_k: experts a token.
        rule: the method.
        own: what the model itself would choose, ids and weights [B*S, k], for a rule that wants them.
    """
    split, voting = blocks.split(scores.float())
    if own is None:
        picked, ids = split.topk(top_k, dim=-1)
        return blocks.spread(rule(split, ids, voting & are_sound(picked)))
    (ids, _), (weights, _) = blocks.split(own[0]), blocks.split(own[1].float())
    sound = are_sound(split.gather(-1, ids)) & are_sound(weights)
    return blocks.spread(rule(split, ids, voting & sound, weights=weights))


def count_below(inside: Tensor, ids: Tensor, weights: Tensor, routed: Tensor | None, promise: float) -> Tensor:
    """Return the number of routed tokens, [] int64, whose experts in the coreset hold too little of their weight.

    Args:
        inside: [T, E] bool, the experts each token may use.
        ids, weights: [T, k], what the model itself would choose.
        routed: [T] bool, or None where all are.
        promise: the share; a rest of a millionth is rounding.
    """
    weights = weights.float().abs()
    kept = torch.where(inside.gather(-1, ids), weights, 0).sum(-1)
    below = kept < promise * (1 - 2e-6) * weights.sum(-1)
    return (below if routed is None else below & routed).sum()


def are_sound(picked: Tensor) -> Tensor:
    """Say which tokens have scores that can be counted, [...] bool, from each one's best k, [..., k].

    NaN and plus infinity rank first, so they are among the best; minus infinity only where fewer than k are finite.
    """
    return picked.isfinite().all(-1)


def restrict(scores: Tensor, inside: Tensor) -> Tensor:
    """Return scores with -inf outside the coreset; inside, even a score of -inf still beats that."""
    lowest = torch.finfo(scores.dtype).min
    return torch.where(inside, scores.clamp(min=lowest), -torch.inf)


def penalise(scores: Tensor, inside: Tensor) -> Tensor:
    """Return scores lowered outside the coreset by more than any two of a token's scores can make up for."""
    spread = scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)
    return torch.where(inside, scores, scores - (2 * spread + 1))


def restrict_groups(masked: Tensor, penalised: Tensor, inside: Tensor, top_k: int) -> Tensor:
    """Return what the last top-k of a group-limited router ranks.

    Args:
        masked: [T, E], what the router's own group mask made of `penalised`.
        penalised: [T, E], see penalise().
        inside: [T, E] bool, the coreset.
        top_k: experts a token.
    """
    in_groups = inside & (masked == penalised)
    enough = in_groups.sum(-1, keepdim=True) >= top_k
    spread = penalised.amax(-1, keepdim=True) - penalised.amin(-1, keepdim=True)
    topped_up = torch.where(in_groups, masked, penalised - (spread + 1))
    return restrict(torch.where(enough, masked, topped_up), inside)


def unroute(scores: Tensor, routed: Tensor, top_k: int) -> Tensor:
    """Point the tokens that are not routed at the experts that the routed ones use most, which are read anyway.

    Args:
        scores: [T, E], what the selection ranks.
        routed: [T] bool.
        top_k: experts a token.
    """
    ids = scores.topk(top_k, dim=-1).indices
    counted = routed.unsqueeze(-1).expand_as(ids).float()
    uses = torch.zeros_like(scores, dtype=torch.float32).scatter(-1, ids, counted).sum(0)
    return torch.where(routed.unsqueeze(-1), scores, uses.to(scores.dtype))
