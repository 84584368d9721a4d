"""Random mixture-of-experts blocks, and what each must compute under the passes: in loops, without them.

B, S: sequences, tokens a sequence; T = B*S; L: tokens of a block; E, k: experts, experts a token; H, I: width of the
model, of an expert
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from dmoe_compile.passes.policies import find_policy
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dmoe_compile.config import Config

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """A block, its inputs, and how it is compiled.

    Attributes:
        score: of the router: "softmax", "sigmoid", "logits".
        select: how the best k are taken: "topk", "sort", "argmax" (k = 1).
        groups: number of groups, and how many a token keeps; None without.
        renormalised: a token's weights sum to 1.
        rank3: the router works on [B, S, E], not on [T, E].
        layout: of experts: "gathered" (bmm), "grouped" (transformers' grouped_mm), "dense" (every one runs on all),
            "loop" (modules, one after another, which prepare() makes traceable).
        shared: a shared expert beside the routed ones.
        options: of the backend.
        dynamic: the length is symbolic.
    """

    score: str
    select: str
    bias: bool
    groups: tuple[int, int] | None
    renormalised: bool
    scale: float
    rank3: bool
    layout: str
    shared: bool
    num_experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype
    batch: int
    seq: int
    dynamic: bool
    seed: int
    options: Mapping[str, Any] = field(hash=False)

    def inputs(self, number: int) -> Tensor:
        """Return hidden states [B, S, H]; another draw for each number."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randn(self.batch, self.seq, self.hidden, generator=generator).to(self.dtype)


@st.composite
def _options(draw: Callable[..., Any], may_drop: bool) -> dict[str, Any]:
    size = st.integers(1, 40)
    share = st.floats(0.05, 1.0)
    methods = {
        "none": st.just({}),
        "dmoe": st.fixed_dictionaries({"dmoe.top_p": share, "dmoe.min_experts": size}),
        "seq": st.fixed_dictionaries({"des.keep": st.none() | st.integers(1, 9)}),
        "vote": st.fixed_dictionaries({"des.variant": st.just("vote"), "des.coreset_size": st.none() | size}),
        "cover": st.fixed_dictionaries({"cover.mass": share, "cover.max_experts": st.none() | size}),
    }
    method = draw(st.sampled_from(list(methods)))
    names = {"none": [], "seq": ["des"], "vote": ["des"]}.get(method, [method])
    dropping = {"top_any.ratio": draw(st.floats(0.0, 1.0))} if may_drop and draw(st.booleans()) else {}
    settings = st.fixed_dictionaries({
        "block_length": st.integers(1, 40), "scope": st.sampled_from(["block", "batch"]), "stats": st.booleans(),
        "experts": st.sampled_from(["auto", False]), "max_block_tokens": st.none() | st.integers(1, 40),
    })  # fmt: skip
    return {"passes": [*names, *["top_any"] * bool(dropping)], **draw(methods[method]), **dropping, **draw(settings)}


@st.composite
def forms(draw: Callable[..., Any]) -> Form:
    """Draw a form; a bias and groups come with scores of a bounded range, as in published routers."""
    score = draw(st.sampled_from(["softmax", "sigmoid", "logits"]))
    groups = None
    num_experts, top_k = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    if score == "sigmoid" and draw(st.booleans()):
        count = draw(st.integers(2, 4))
        groups = (count, draw(st.integers(1, count)))
        num_experts = count * max(2, num_experts // count)
        top_k = min(top_k, groups[1] * num_experts // count)
    top_k = min(top_k, num_experts)
    ways = ["topk"]
    ways += ["sort"] if top_k < num_experts else []  # [:, :E] cuts nothing off, so nothing is chosen
    ways += ["argmax"] if top_k == 1 and groups is None else []
    select = draw(st.sampled_from(ways))
    layout = draw(st.sampled_from(["gathered", "grouped", "dense", "loop"]))
    # Loops have H > k: prepare() tells hidden states [T, H] from weights [T, k] by their shapes.
    return Form(
        score, select, score == "sigmoid" and draw(st.booleans()), groups,
        score != "logits" and draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])), draw(st.booleans()),
        layout, draw(st.booleans()), num_experts, top_k,
        8 * draw(st.integers(2 if layout == "loop" else 1, 6)), 8 * draw(st.integers(1, 4)),
        draw(st.sampled_from(DTYPES)), draw(st.integers(1, 3)), draw(st.integers(1, 48)), draw(st.booleans()),
        draw(st.integers(0, 1000)),
        draw(_options(may_drop=top_k > 1 and layout != "dense")),
    )  # fmt: skip


class Loop(nn.Module):
    """Experts that are modules, and run one after another."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(form.hidden, form.width) for _ in range(form.num_experts))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            tokens, places = torch.where(ids == number)
            out.index_add_(0, tokens, expert(hidden[tokens]) * weights[tokens, places, None])
        return out


class Expert(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """A form in PyTorch: forward() is what gets compiled, expected() what the passes make of it."""

    bias: Tensor

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(form.seed)
        self.form = form
        self.gate = nn.Parameter(torch.randn(form.num_experts, form.hidden) * 2 / form.hidden**0.5)
        self.register_buffer("bias", 0.1 * torch.randn(form.num_experts))
        config = Qwen3MoeConfig(
            hidden_size=form.hidden, moe_intermediate_size=form.width, num_experts=form.num_experts,
            num_experts_per_tok=form.top_k,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        self.experts: nn.Module = Loop(form) if form.layout == "loop" else Qwen3MoeExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.shared = nn.Linear(form.hidden, form.hidden, bias=False) if form.shared else None
        self.to(form.dtype).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the block adds, [B, S, H], and the experts it chose, [B, S, k]."""
        scores, biased = self.scores(x)
        return self.finish(x, scores, self.select(self.group_mask(biased)))

    def scores(self, x: Tensor, nudge: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return scores, and what the selection ranks; [T, E] or [B, S, E]."""
        form = self.form
        logits = F.linear((x if form.rank3 else x.reshape(-1, form.hidden)).float(), self.gate.float())
        if nudge is not None:
            logits = logits * nudge.view(logits.shape)
        scores = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid, "logits": lambda: logits}[
            form.score
        ]()
        return scores, scores + self.bias.float() if form.bias else scores

    def group_mask(self, scores: Tensor) -> Tensor:
        if self.form.groups is None:
            return scores
        count, kept = self.form.groups
        grouped = scores.unflatten(-1, (count, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        mask = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1).unsqueeze(-1).expand_as(grouped)
        return scores.masked_fill(mask.flatten(-2) == 0, -torch.inf)

    def select(self, ranked: Tensor) -> Tensor:
        if self.form.select == "argmax":
            return ranked.argmax(-1, keepdim=True)
        if self.form.select == "sort":
            return ranked.sort(dim=-1, descending=True).indices[..., : self.form.top_k]
        return ranked.topk(self.form.top_k, dim=-1).indices

    def weigh(self, weights: Tensor) -> Tensor:
        """Return the weights of the chosen experts, whose scores are given."""
        if self.form.score == "logits":
            weights = weights.softmax(-1)
        if self.form.renormalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.form.scale

    def finish(self, x: Tensor, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        form = self.form
        weights = self.weigh(scores.gather(-1, ids)).to(form.dtype)
        rows, flat = x.reshape(-1, form.hidden), ids.reshape(-1, form.top_k)
        out = self.routed(rows, flat, weights.reshape(-1, form.top_k)).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, ids.reshape(*x.shape[:2], form.top_k)

    def dropped(self, scores: Tensor, ids: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """Return experts and weights of tokens that drop some: top_any's `ratio` is the share of the best that is kept.

        A dropped expert's place is taken by the best, with weight 0.
        """
        given = scores.gather(-1, ids)
        size = self.weigh(given).to(self.form.dtype).float().abs()
        small = size < ratio * size.amax(-1, keepdim=True)
        given = given.masked_fill(small, -torch.inf if self.form.score == "logits" else 0.0)
        return torch.where(small, ids.gather(-1, size.argmax(-1, keepdim=True)), ids), self.weigh(given)

    def exact(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a choice gives in fp64, [B, S, H], and the sum of its terms' sizes: roundings are shares of it.

        A projection in fp32 that cancels out is as rounded as its terms are large; one that is rounded to bf16 is not.
        """
        rows, shape = x.reshape(-1, self.form.hidden).double(), x.shape
        gate, up, down = self.matrices()
        gates, ups = (torch.einsum("th,eih->tei", rows, each) for each in (gate, up))
        acted, size = F.silu(gates) * ups, (F.silu(gates) * ups).abs()
        if self.form.dtype is torch.float32:
            of_gate, of_up = (torch.einsum("th,eih->tei", rows.abs(), each.abs()) for each in (gate, up))
            size = size + of_gate * ups.abs() + F.silu(gates).abs() * of_up
        weighed = torch.zeros(len(rows), len(down), dtype=torch.float64).scatter_add(
            1, ids.reshape(len(rows), -1), weights.to(self.form.dtype).double().reshape(len(rows), -1)
        )
        out = torch.einsum("te,tei,ehi->th", weighed, acted, down)
        size = torch.einsum("te,tei,ehi->th", weighed.abs(), size, down.abs())
        if self.shared is not None:
            shared = self.shared.weight.double()
            out, size = out + F.linear(rows, shared), size + F.linear(rows.abs(), shared.abs())
        return out.view(shape), size.view(shape)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gate and up, [E, I, H], and down, [E, H, I], in fp64."""
        if not isinstance(self.experts, Loop):
            gate, up = self.experts.gate_up_proj.double().chunk(2, 1)
            return gate, up, self.experts.down_proj.double()
        found = []
        for name in ("gate_proj", "up_proj", "down_proj"):
            found.append(torch.stack([getattr(each, name).weight for each in self.experts.experts]).double())
        return found[0], found[1], found[2]

    def routed(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.form.layout in ("grouped", "loop"):
            return self.experts(rows, ids, weights)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        if self.form.layout == "dense":
            gate, up = torch.einsum("th,eih->tei", rows, gate_up).chunk(2, -1)
            each = torch.einsum("tei,ehi->teh", F.silu(gate) * up, down)
            dense = torch.zeros(len(rows), len(down), dtype=rows.dtype).scatter(1, ids, weights)
            return (each * dense.unsqueeze(-1)).sum(1)
        repeated = rows.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        gate, up = torch.bmm(gate_up[ids.reshape(-1)], repeated).chunk(2, 1)
        each = torch.bmm(down[ids.reshape(-1)], F.silu(gate) * up).view(*ids.shape, -1)
        return (each * weights.unsqueeze(-1)).sum(1)

    def is_close(self, x: Tensor) -> bool:
        """Say whether some choice hangs on less than fp32 rounds: compiled code may round logits otherwise."""
        generator = torch.Generator().manual_seed(0)
        wanted = self.choice(x)[0].sort(-1).values
        for _ in range(8):
            nudge = 1 + 1e-6 * torch.randn(x.shape[0] * x.shape[1] * self.form.num_experts, generator=generator)
            if not torch.equal(self.choice(x, nudge)[0].sort(-1).values, wanted):
                return True
        return False

    @torch.no_grad()
    def expected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the experts that the passes leave, [B, S, k], and what these give, exactly, with its terms' sizes."""
        ids, weights = self.choice(x)
        return (ids.reshape(*x.shape[:2], self.form.top_k), *self.exact(x, ids, weights))

    @torch.no_grad()
    def choice(self, x: Tensor, nudge: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return experts and weights, [.., k], as the passes of the form's options must leave them.

        Args:
            x: hidden states [B, S, H].
            nudge: what logits are multiplied by, T*E values; None leaves them.
        """
        config = Config.from_options(self.form.options)
        scores, biased = self.scores(x, nudge)
        ids = self.select(self.group_mask(biased))
        longest = config.max_block_tokens
        if set(config.selected) - {"top_any"} and (longest is None or x.shape[1] <= longest):
            rows = biased.reshape(-1, self.form.num_experts)
            weights = self.weigh(scores.gather(-1, ids)).to(self.form.dtype)  # as the experts are weighed
            inside = self._coresets(rows, ids.reshape(len(rows), -1), weights.reshape(len(rows), -1))
            ids = torch.stack([self._best(*each) for each in zip(rows, inside, strict=True)]).view(ids.shape)
        if "top_any" in config.selected:
            return self.dropped(scores, ids, config.selected["top_any"].ratio)
        return ids, self.weigh(scores.gather(-1, ids))

    def _coresets(self, rows: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        """Return the experts that each token may use, [T, E] bool, block by block."""
        form, config = self.form, Config.from_options(self.form.options)
        ((name, options),) = ((name, each) for name, each in config.selected.items() if name != "top_any")
        policy: Any = find_policy(name)
        rule = functools.partial(policy.coreset, options=options)
        seq = len(rows) // form.batch
        length = len(rows) if config.scope == "batch" else config.block_length
        spans = [(0, len(rows))] if config.scope == "batch" else [
            (row * seq + start, row * seq + min(start + length, seq))
            for row in range(form.batch) for start in range(0, seq, length)
        ]  # fmt: skip
        inside = torch.zeros_like(rows, dtype=torch.bool)
        for start, end in spans:
            part = rows[start:end].unsqueeze(0)
            ids = (
                own[start:end] if getattr(policy, "needs_weights", False) else rows[start:end].topk(form.top_k).indices
            )
            more = {"weights": weights[start:end].unsqueeze(0)} if getattr(policy, "needs_weights", False) else {}
            voting = torch.ones(1, end - start, dtype=torch.bool)
            inside[start:end] = rule(part, ids.unsqueeze(0), voting, **more)
        return inside

    def _best(self, scores: Tensor, inside: Tensor) -> Tensor:
        """Return the k experts of one token [E]: of the coreset, those in its groups first.

        Groups are compared by their experts in the coreset, unless the method promises something about the model's own
        choice, which then stays in its own groups.
        """
        if self.form.groups is None:
            return self.select(scores.masked_fill(~inside, -torch.inf))
        count, kept = self.form.groups
        low = scores.double() - (0.0 if "cover" in self.form.options["passes"] else 1000.0) * ~inside
        groups = low.view(count, -1).topk(2).values.sum(-1).topk(kept).indices
        chosen = torch.zeros(count, 1).index_fill(0, groups, 1).expand(count, len(scores) // count).reshape(-1).bool()
        order = scores.double() + 1000.0 * chosen
        return order.masked_fill(~inside, -torch.inf).topk(self.form.top_k).indices
