"""lm-evaluation-harness on compiled models: gsm8k and the like, on real checkpoints with passes.

    python -m dmoe_compile.harness run --model dmoe --tasks gsm8k --model_args ARGS
    ARGS: pretrained=FOLDER,passes=team+dmoe,dmoe.top_p=0.8

That is the harness's own command line with one more model in it: the harness finds models in its own list, and has no
entry point for those of others. Only tasks that generate text are possible: a diffusion model has no likelihood of a
continuation, token after token, that multiple choice tasks compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor

from dmoe_compile import backend, loading
from dmoe_compile.config import Config
from dmoe_compile.generation import generate

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_DECODING = ("steps", "threshold", "temperature", "top_k", "top_p", "editing_threshold", "mask_token_id")
_MAX_NEW_TOKENS = 256  # where neither the task nor the arguments say how long an answer may be


@register_model("dmoe")
class DmoeLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """A checkpoint folder, compiled with passes and decoded block by block.

    Args:
        pretrained: the folder.
        device: where to put the model. The harness says "cuda:0" by default; without a GPU that is the CPU.
        batch_size: prompts that are decoded together.
        max_new_tokens: length of the longest answer; the task's own limit if it has one.
        trust_remote_code: run model code that lies in the folder.
        options: of generate() by their names (steps, threshold, temperature, ...), and of the backend ("passes",
            "block_length", "dmoe.top_p", ...).

    Raises:
        ValueError: for a folder without a tokenizer, and for options that are none.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.decoding = {name: options.pop(name) for name in _DECODING if name in options}
        passes = options.get("passes")
        if isinstance(passes, str) and passes != "auto":  # as the harness passes on passes=team+dmoe
            options["passes"] = [name for name in passes.split("+") if name]
        self.config = Config.from_options(options)
        self.batch_size, self.max_new_tokens = int(batch_size), max_new_tokens
        self._templated = False
        self.tokenizer = loading.need_tokenizer(pretrained, trust_remote_code)
        model, _ = loading.load_model(pretrained, trust_remote_code)
        here = device is None or (device.startswith("cuda") and not torch.cuda.is_available())
        self.place = model.device if here else torch.device(str(device))
        self.model = backend.compile(model.to(self.place), self.config)
        if getattr(model.config, "mask_token_id", None) is None:
            self.decoding.setdefault("mask_token_id", self.tokenizer.mask_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches what the chat template made."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text."""
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        assert isinstance(text, str)
        self._templated = True
        return text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to every request, in their order."""
        from tqdm import tqdm

        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for group in self._groups(requests):
                texts = self._answered([requests[i].args[0] for i in group], requests[group[0]].args[1])
                for i, text in zip(group, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update()
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: see the module."""
        raise NotImplementedError(
            "a diffusion model gives no likelihood of a continuation: choose tasks that generate, such as gsm8k, not "
            "multiple choice"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: see the module."""
        raise NotImplementedError("a diffusion model gives no perplexity: choose tasks that generate, such as gsm8k")

    def _groups(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Yield the numbers of requests that are decoded together: of equal settings, and of about one length."""
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), len(requests[i].args[0])))
        group: list[int] = []
        for i in order:
            if group and (len(group) == self.batch_size or requests[i].args[1] != requests[group[0]].args[1]):
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _answered(self, prompts: Sequence[str], how: Mapping[str, Any]) -> list[str]:
        until = how.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        special = not self._templated  # which a template writes out
        ids = [torch.tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"]) for text in prompts]
        lengths = torch.tensor([len(each) for each in ids]).unsqueeze(1)
        padded: Tensor = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths
        decoding = {"temperature": how["temperature"]} if how.get("do_sample") and "temperature" in how else {}
        result = generate(
            self.model, padded.to(self.place), attention_mask=mask.to(self.place),
            block_length=self.config.block_length,
            max_new_tokens=self.max_new_tokens or how.get("max_gen_toks") or _MAX_NEW_TOKENS,
            **decoding | self.decoding,
        )  # fmt: skip
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in result.answers]
        return [_cut(text, stops) for text in texts]


def _cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to where the first of some stops begins."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def main() -> None:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
