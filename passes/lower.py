"""Decide which layers get the fused kernels, and put them in: routing (GPUs) and experts.

    experts="auto"   where there is a kernel, it takes the layer, and is the faster one
    experts=True     the same, faster or not, and a layer that can't have it is an error that says why
    experts=False    nowhere: there is no Lowering then

On GPUs the kernels are Triton's, for up to 1,024 tokens of a forward: longer ones are prefill, which matrix
multiplication limits. On CPUs it is one of C++, for experts only, which takes any number of tokens; but it multiplies
weights that lie transposed without AMX: where there is that, and experts have many tokens each, they are oneDNN's.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from dmoe_compile.kernels.experts_cpu import available, best_isa
from dmoe_compile.kernels.limits import MAX_TOKENS
from dmoe_compile.passes.constrain import Outcome, Settings, describe
from dmoe_compile.passes.cost import GPUS, Gpu, reading_limits
from dmoe_compile.passes.fuse_experts import SYMBOLIC, Fused, Reader, fuse
from dmoe_compile.passes.fuse_route import Routed, Router, method_of, read, route
from dmoe_compile.passes.inline import Tracer
from dmoe_compile.passes.layouts import Layout
from dmoe_compile.passes.limit import DECODED
from dmoe_compile.passes.readings import Bank
from dmoe_compile.passes.region import hints
from dmoe_compile.passes.sites import Refusal, Site
from torch import Tensor, fx

log = logging.getLogger(__name__)
_AMX_TOKENS = 16  # a tile of AMX has 16 rows: with fewer, reading weights is what takes long
_KERNELS = ("route", "experts", "reuse")  # they import Triton, which CPU builds of torch do not bring


class NotFusedError(ValueError):
    """experts=True asks for what can't be had."""


@dataclass
class Lowering:
    """Puts fused kernels into one graph.

    Attributes:
        reader: reads the experts of its sites.
        experts: the option of this name.
        autotune: time the tiles of GPU kernels at their first call.
    """

    reader: Reader
    experts: Literal[True, "auto"]
    autotune: bool = False

    def bank(self, site: Site) -> Bank | str:
        """Return what the fused experts take of a site, or why it keeps its own code.

        Raises:
            NotFusedError: where experts=True asks for what can't be had.
        """
        size = self._size_reason(site)
        found: Bank | str = self._reason(site) or size or self._tried(self.reader.read, site)
        if self.experts == "auto" and isinstance(found, Bank):
            found = _amx_reason(site, found) or found
        if self.experts is True and isinstance(found, str) and found != size:  # a prompt is not what kernels are for
            raise NotFusedError(
                f"experts=True, but {site.name} can't have the fused kernel: {found}; use experts='auto'"
            )
        return found

    def insist(self, refusals: Sequence[Refusal]) -> None:
        """Raise NotFusedError where experts=True asks for layers of which the matcher made no site."""
        layers = [refusal for refusal in refusals if refusal.has_experts]
        if self.experts is True and layers:
            first = layers[0]
            raise NotFusedError(
                f"experts=True, but {first.name} can't have the fused kernel: {first.reason}; use experts='auto'"
            )

    def _tried(self, reading: Callable[..., Any], *args: Any) -> Any:
        """Return what was read; whatever goes wrong in a check, memory that is short too, is a reason to leave it."""
        try:
            with torch._C._DisableAutocast():
                return reading(*args)
        except Exception as error:
            log.debug("why it can't be checked", exc_info=True)
            return f"it can't be checked ({type(error).__name__}: {error})"

    def _reason(self, site: Site) -> str:
        """Return why a site keeps its own experts whatever they are, "" where it need not."""
        value = site.combine.meta["val"]
        if value.device.type == "cpu":
            return "" if self.experts is True else _cpu_reason(site)
        if value.device.type != "cuda":
            return f"there is no fused kernel for {value.device.type}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed, which the fused kernels are written in"
        for kernel in _KERNELS:
            importlib.import_module(f"dmoe_compile.kernels.{kernel}")
        return _spilling(value) if self.experts == "auto" else ""

    def _size_reason(self, site: Site) -> str:
        """Return why a site of so many tokens keeps its own experts on a GPU, "" where it need not."""
        device = site.combine.meta["val"].device
        if device.type != "cuda":
            return ""
        tokens = site.ids.meta["val"].numel() // site.top_k
        if not isinstance(tokens, int):
            return SYMBOLIC
        if tokens > MAX_TOKENS:
            return f"{tokens} tokens are more than the {MAX_TOKENS} that the fused kernels are made for"
        if self.experts == "auto" and not reading_limits(site, tokens, gpu_of(device)):
            return f"with {tokens} tokens it is limited by arithmetic, not by reading weights"
        return ""

    def route(
        self,
        graph: fx.Graph,
        site: Site,
        where: Layout,
        passes: Mapping[str, Any],
        settings: Settings,
        tracer: Tracer,
    ) -> tuple[Outcome, Routed] | str:
        """Give a site's routing to the fused op, or say why it is Inductor's."""
        if site.combine.meta["val"].device.type == "cpu":
            return "there is no fused routing on CPUs"
        method = method_of(passes, where, settings, site.top_k)
        router: Router | str = self._tried(read, site, self.reader)
        for answer in (method, router):
            if isinstance(answer, str):
                return answer
        assert not isinstance(method, str)
        assert not isinstance(router, str)
        done = route(graph, site, router, where, method, settings, tracer)
        if isinstance(done, str):
            return done
        lossy = method[0] != "own" or where.step is not None
        reason = (settings.too_long(where.seq) if passes else "") or "no pass is selected"
        outcome = Outcome(site, lossy, "" if lossy else reason)
        return (describe(outcome, where, settings) if lossy else outcome), done

    def fuse(
        self,
        graph: fx.Graph,
        site: Site,
        bank: Bank,
        routed: Routed | None,
        where: Layout,
        tracer: Tracer,
        *,
        dropped: bool,
    ) -> tuple[Site, Fused]:
        """Replace a site's experts by the fused op; return the site as it is then.

        Args:
            graph: the site's.
            site: as the routing passes have left it.
            bank: what its experts are.
            routed: what the fused routing made of it, None where it is Inductor's.
            where: where its tokens lie.
            tracer: of this graph.
            dropped: whether top_any has dropped experts of tokens: their weight is 0.
        """
        if routed is not None:
            site = replace(site, ids=routed.ids, weights=routed.weights)
            listed = [routed.active, routed.counts] if routed.listed else []
            fused = fuse(graph, site, bank, listed, tracer, autotune=self.autotune)
            return replace(site, combine=fused.combine), fused
        assert site.weights is not None
        chosen = site
        if dropped:
            args, key = [chosen.ids, site.weights], ("unweighted", site.num_experts)
            (ids,) = tracer.insert(graph, site.combine, _Unweighted(site.num_experts), args, key)
            chosen = replace(chosen, ids=ids)
        if where.step is not None:
            args, key = [chosen.ids, where.step.roles], ("unrouted", site.num_experts)
            (ids,) = tracer.insert(graph, site.combine, _Unrouted(site.num_experts), args, key)
            chosen = replace(chosen, ids=ids)
        fused = fuse(graph, chosen, bank, [], tracer, autotune=self.autotune)
        return replace(site, combine=fused.combine), fused


@dataclass(frozen=True)
class _Unweighted:
    """ids and weights [T, k] -> ids with E, which no expert has, where the weight is 0."""

    num_experts: int

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.where(weights.reshape(ids.shape) == 0, self.num_experts, ids)


@dataclass(frozen=True)
class _Unrouted:
    """ids [T, k], roles [R, S] int8 -> ids with E for tokens that are not computed."""

    num_experts: int

    def __call__(self, ids: Tensor, roles: Tensor) -> Tensor:
        away = (roles >= DECODED).reshape(-1, 1)
        return torch.where(away, self.num_experts, ids.reshape(away.shape[0], -1)).reshape(ids.shape)


def _cpu_reason(site: Site) -> str:
    """Return why a site keeps its own experts on this CPU, "" where it need not."""
    value = site.expert_weights[0].meta["val"]
    unbuilt = value.dtype in (torch.float32, torch.bfloat16, torch.float16) and not available(value.dtype)
    return "the C++ kernel can't be built here" if unbuilt else ""


def _amx_reason(site: Site, bank: Bank) -> str:
    """Return why a site's experts are left to oneDNN on this CPU, "" where they are not."""
    value = site.expert_weights[0].meta["val"]
    by_columns = bank.form.transposed or bank.form.down_transposed
    if not by_columns or (value.device.type, value.dtype, best_isa()) != ("cpu", torch.bfloat16, "amx_bf16"):
        return ""
    tokens = prod(hints(site.ids.meta["val"].shape)) / site.num_experts
    many = f"its weights lie transposed and its experts have over {_AMX_TOKENS} tokens each: oneDNN's AMX is faster"
    return many if tokens > _AMX_TOKENS else ""


def gpu_of(device: torch.device) -> Gpu:
    """Return what a GPU does at best; of one that is not listed, what an H100 does."""
    return GPUS.get(_target(device), GPUS["sm_90"])


def _target(device: torch.device) -> str:
    """Return a GPU's name as its compiler has it."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _spilling(value: Tensor) -> str:
    """Return why the kernels' tiles do not fit the registers of a GPU, "" where they do."""
    target = _target(value.device)
    old = target.startswith("sm_") and int(target[3:]) < 80
    small = target.startswith("gfx") and not target.startswith("gfx9") and value.dtype == torch.float32
    return f"the fused kernels would spill registers on {target}, in {value.dtype}" if old or small else ""
