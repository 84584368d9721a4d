"""TEAM inside diffusers' own pipelines: its caching and limiting, between the steps that their schedulers take.

    pipe = LLaDA2Pipeline(model=torch.compile(model, backend="dmoe", options={"passes": ["team"]}), ...)
    with dmoe_compile.StepCallback(pipe) as callback:
        pipe("...", callback_on_step_end=callback)

The pipeline calls the model; a hook on it describes each forward to a decoding context (context.py) from what really
goes in, and the callback adds how sure the scheduler was. A forward that does not go on from the one before, token for
token, is plain.

B: sequences; S: tokens of a forward; L: tokens of the block or canvas that is denoised
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor, nn

from dmoe_compile import backend
from dmoe_compile.candidates import cold_tokens
from dmoe_compile.context import Denoising, StepStats
from dmoe_compile.passes.team import Options


class StepCallback(PipelineCallback):
    """`callback_on_step_end` of a LLaDA2Pipeline or DiffusionGemmaPipeline, to be entered by `with` around its calls.

    In LLaDA2Pipeline, which runs all tokens up to the current block in every step, a token is decoded if it was no mask
    in the last step's input and has not been edited since: also those of the prompt and of finished blocks. The first
    step of a block reuses and limits nothing. Behind prompt and answer the pipeline pads the last block; TEAM routes no
    padding, and the scheduler reads it, so that tokens of that block may be committed in another order.

    DiffusionGemma has no mask token: its sampler replaces tokens that it does not accept by random ones. A token is
    decoded if the last step's input had it already. Nothing is limited, as no token is known to be still open.

    Neither pipeline runs candidates: `team.speculate` is for dmoe_compile.generate.

    Args:
        pipe: its model, or the model's decoder, is compiled by backend="dmoe" with the pass "team".

    Raises:
        ValueError: for another pipeline, or a model without the pass.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        followers = {"LLaDA2Pipeline": _Blocks, "DiffusionGemmaPipeline": _Canvas}
        kind = next((each.__name__ for each in type(pipe).__mro__ if each.__name__ in followers), None)
        if kind is None:
            raise ValueError(
                f"{type(pipe).__name__} is no pipeline that TEAM is defined for: {' and '.join(followers)} are. In a "
                "loop of your own describe each forward with dmoe_compile.denoising()"
            )
        self.pipe, self.model = pipe, pipe.model
        self.team = _team_of(self.model)
        self.follower: _Follower = followers[kind](self.team)
        self.context = Denoising()
        self._hooks: list[Any] = []
        self._attached = False

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline hands over at the end of a step."""
        return list(self.follower.tensor_inputs)

    @property
    def stats(self) -> list[StepStats]:
        """Unique experts of every step, oldest first."""
        return self.context.stats

    def __enter__(self) -> StepCallback:
        others = [getattr(hook, "__self__", None) for hook in self.model._forward_pre_hooks.values()]
        if any(isinstance(other, StepCallback) for other in others):
            raise RuntimeError("this callback, or another one of the same model, is entered already; leave it first")
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._after()  # the model was interrupted
        self.follower.forget()
        self.context.close()

    def callback_fn(self, pipeline: Any, step_index: int, timestep: int, callback_kwargs: dict[str, Any]) -> Any:
        """Take what a step has shown; the pipeline calls this."""
        if not self._hooks or pipeline is not self.pipe or pipeline.model is not self.model:
            raise RuntimeError("call the pipeline inside `with dmoe_compile.StepCallback(pipe) as callback`")
        self.follower.take(callback_kwargs)
        return callback_kwargs

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.follower.describe(self.context, args, kwargs)
        self.context.attach()
        self._attached = True

    def _after(self, *_: object) -> None:
        if self._attached:
            self.context.detach()
        self._attached = False


class _Follower(ABC):
    """Follows the steps of one pipeline. `last` [B, S] is what the last forward read, None where none counts."""

    tensor_inputs: tuple[str, ...]

    def __init__(self, team: Options) -> None:
        self.team = team
        self.last: Tensor | None = None

    @abstractmethod
    def describe(self, context: Denoising, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the context of the forward that takes these arguments."""

    @abstractmethod
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Take what the pipeline hands to the callback after a forward."""

    def forget(self) -> None:
        self.last = None


class _Blocks(_Follower):
    """LLaDA2Pipeline. `expected` [B, S] is what goes into the next step of the block, with its masks, both [B, S]."""

    tensor_inputs = ("block_x", "sampled_probs", "active_block")

    def __init__(self, team: Options) -> None:
        super().__init__(team)
        self.expected: tuple[Tensor, Tensor, Tensor] | None = None

    def describe(self, context: Denoising, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        expected, self.expected, self.last = self.expected, None, ids.clone()
        if expected is None or not (expected[0].shape == ids.shape and torch.equal(expected[0], ids)):
            context.step(shape=tuple(ids.shape))
            return
        _, decoded, cold = expected
        context.step(decoded, cold)

    def take(self, tensors: dict[str, Tensor]) -> None:
        ids, masked = tensors["block_x"], tensors["active_block"]
        assert self.last is not None
        length = masked.shape[1]
        start = ids.shape[1] - length
        open_now = masked & (ids[:, start:] == self.last[:, start:])
        known = nn.functional.pad(~masked, (start, 0), value=True)
        cold = cold_tokens(open_now, ~open_now, tensors["sampled_probs"], self.team)
        self.expected = ids.clone(), known & (ids == self.last), nn.functional.pad(cold, (start, 0), value=False)

    def forget(self) -> None:
        super().forget()
        self.expected = None


class _Canvas(_Follower):
    """DiffusionGemmaPipeline. A canvas is told from others by its cache and first position."""

    tensor_inputs = ("canvas",)

    def __init__(self, team: Options) -> None:
        if not team.cache:
            raise ValueError("team.cache=False leaves nothing to do in DiffusionGemmaPipeline: it can only be reused")
        super().__init__(team)
        self.cache: weakref.ref[Any] | None = None
        self.offset = -1

    def describe(self, context: Denoising, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, cache = kwargs["decoder_input_ids"], kwargs["past_key_values"]
        offset = int(kwargs["decoder_position_ids"][0, 0])
        same = self.cache is not None and self.cache() is cache and offset == self.offset
        decoded = self.last == ids if same and self.last is not None else None
        context.step(decoded, shape=tuple(ids.shape), offset=offset)
        self.cache, self.offset, self.last = weakref.ref(cache), offset, ids.clone()

    def take(self, tensors: dict[str, Tensor]) -> None:
        """The input of the next forward says all."""


def _team_of(model: nn.Module) -> Options:
    """Return the options of the pass "team" that a model, or a module in it, was compiled with."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the pipeline's model was compiled by model.compile(), which traces hooks too: give the pipeline "
            'torch.compile(model, backend="dmoe", ...) instead'
        )
    for config in map(backend.config_of, [model, *model.modules()]):
        if config is not None and "team" in config.passes:
            options: Options = config.selected["team"]
            return options
    raise ValueError(
        "the pipeline's model is not compiled with the pass 'team': torch.compile(model, backend=\"dmoe\", "
        'options={"passes": ["team"]})'
    )
