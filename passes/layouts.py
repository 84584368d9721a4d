"""Where the tokens of a site lie in a forward, [B, S], and which of them are padding, decoded or cold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dmoe_compile.passes.inline import Argument, size_argument
from dmoe_compile.passes.limit import DECODED, HOT
from dmoe_compile.passes.nodes import VIEWS, Sources, packet, same, shape
from dmoe_compile.passes.sites import Site
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_MAX_STEPS_TO_ROWS = 64  # nodes between a router's matmul and [B, S, H] rows; diffusion_gemma's norm has 9
_MASK = re.compile(r"\b(decoder_)?attention_mask\b")  # as transformers' forwards and diffusers' pipelines name it
Size = int | torch.SymInt


@dataclass(frozen=True)
class Step:
    """One denoising step, as the graph's inputs say it.

    Attributes:
        roles: [R, S] int8, see passes/limit.py.
        rows: [R] int64, the stored row that each goes on from.
        candidates: rows of a sequence.
    """

    roles: fx.Node
    rows: fx.Node
    candidates: int


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward, [B, S], as a rule sees them.

    `present` are no padding, None where all are; `roles` is None outside of a denoising step.
    """

    batch: Any
    seq: Any
    present: Tensor | None = None
    roles: Tensor | None = None

    @property
    def routed(self) -> Tensor | None:
        """The tokens that are computed, [B, S] bool; None where all are."""
        computed = None if self.roles is None else self.roles < DECODED
        if computed is None or self.present is None:
            return self.present if computed is None else computed
        return self.present & computed

    @property
    def heard(self) -> Tensor | None:
        """The tokens that vote, [B, S] bool; None where all do."""
        if self.roles is None:
            return self.present
        assert self.routed is not None
        return self.routed & (self.roles == HOT)


@dataclass(frozen=True)
class Kind:
    """What the layout arguments of a rule are besides B and S: an attention mask, the roles of a denoising step."""

    mask: bool
    step: bool
    candidates: int

    def read(self, batch: Any, seq: Any, *masks: Tensor) -> Tokens:
        """Return the tokens that layout_arguments() describe."""
        present = voting_tokens(seq, masks[0]) if self.mask else None
        return Tokens(batch, seq, present, masks[-1] if self.step else None)


@dataclass(frozen=True)
class Layout:
    """Where [B, S] of a site's tokens is read: from `rows` [B, S, ...], or T as one row where there is none.

    `mask` is the graph's 2D attention mask [B, at least S], if it has one; `step` says that these tokens are denoised
    by TEAM's rules.
    """

    rows: fx.Node | None
    batch: Size
    seq: Size
    mask: fx.Node | None
    step: Step | None = None

    @property
    def kind(self) -> Kind:
        return Kind(self.mask is not None, self.step is not None, self.step.candidates if self.step else 1)


def find_layouts(graph: fx.Graph, sites: Sequence[Site], sources: Sources) -> list[Layout]:
    """Find B and S behind every site's flattened tokens, and the mask that says which of them are padding."""
    rows = [_rows(site) for site in sites]
    lengths = [dims[1] for node in rows if node is not None and (dims := shape(node))]
    layouts = []
    for site, node in zip(sites, rows, strict=True):
        if node is None:
            layouts.append(Layout(None, 1, (shape(site.scores) or (0,))[0], None))
        else:
            batch, seq, *_ = shape(node) or (0, 0)
            layouts.append(Layout(node, batch, seq, _attention_mask(graph, sources, batch, seq, lengths)))
    return layouts


def layout_arguments(graph: fx.Graph, site: Site, where: Layout) -> list[Argument]:
    """Return what Layout.kind reads as arguments of a rule that is inlined ahead of the site's selection."""
    if where.rows is None:
        return [1, size_argument(graph, site.select, site.scores, 0)]
    sizes = [size_argument(graph, site.select, where.rows, dim) for dim in (0, 1)]
    mask = [where.mask] if where.mask is not None else []
    step = [where.step.roles] if where.step is not None else []
    return [*sizes, *mask, *step]


def voting_tokens(seq: int, mask: Tensor) -> Tensor:
    """Return which tokens of a forward are no padding, [B, S] bool, from an attention mask [B, at least S].

    A longer mask covers cached tokens too: the forward's are its last S. A row with nothing but padding
    there is taken as all tokens: the mask means something else (a cache longer than what it holds).
    """
    window = mask[:, mask.shape[1] - seq :] != 0
    return window | ~window.any(1, keepdim=True)


def _rows(site: Site) -> fx.Node | None:
    """Return the nearest [B, S, .] tensor that a site's tokens were flattened from."""
    if len(shape(site.scores) or ()) == 3:
        return site.scores
    tokens = (shape(site.scores) or (0,))[0]
    node = site.hidden
    for _ in range(_MAX_STEPS_TO_ROWS):
        dims = shape(node)
        if dims is not None and len(dims) == 3 and statically_known_true(dims[0] * dims[1] == tokens):
            return _unmerged(node) if statically_known_true(dims[0] == 1) else node
        width = (shape(node) or (0,))[-1]
        parents = [a for a in node.all_input_nodes if len(shape(a) or ()) >= 2 and (shape(a) or (0,))[-1] == width]
        if not parents:
            return None
        node = parents[0]
    return None


def _unmerged(merged: fx.Node) -> fx.Node:
    """Return the [B, S, H] that [1, T, H] is a view of, as einsum makes one for a bmm; [1, T, H] where B or S is 1."""
    node, (_, tokens, width) = merged, shape(merged) or (0, 0, 0)
    while node.op == "call_function" and packet(node) in VIEWS:
        node = node.all_input_nodes[0]
        dims = shape(node) or ()
        alike = len(dims) == 3 and same(dims[0] * dims[1], tokens) and same(dims[2], width)
        if alike and not same(dims[0], 1) and not same(dims[1], 1):
            return node
    return merged


def _attention_mask(
    graph: fx.Graph, sources: Sources, batch: Size, seq: Size, lengths: Sequence[Size]
) -> fx.Node | None:
    """Return the 2D attention mask, [B, at least S], that ends with a site's tokens, if the graph has one.

    A longer one covers cached tokens too, unless it is as long as another site's tokens: then it is theirs
    (an encoder's in the graph of its decoder).
    """
    longest: tuple[Size, fx.Node] | None = None
    for node in graph.find_nodes(op="placeholder"):
        dims = shape(node)
        if dims is None or len(dims) != 2 or not _MASK.search(sources.paths.get(node.name, node.name)):
            continue
        if node.meta["val"].is_floating_point():
            continue  # 0 and -inf, to be added to scores: another convention
        if not statically_known_true(dims[0] == batch) or not dims[1] >= seq:
            continue
        if statically_known_true(dims[1] == seq):
            return node
        if any(statically_known_true(dims[1] == length) for length in lengths):
            continue
        if longest is None or dims[1] > longest[0]:
            longest = dims[1], node
    return longest[1] if longest else None
