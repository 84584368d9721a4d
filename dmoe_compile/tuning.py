"""Tune a block diffusion model to a coreset: dMoE's method (arXiv 2605.30876), by distilling the model from itself.

    python -m dmoe_compile.tuning MODEL OUT [--steps N] [--top-p 0.6]

The teacher is the model as it is. The student is the same model compiled with the dmoe pass, so that its forward is
routed by votes while gradients flow through the passes' joint graph; it learns to say of every masked token what the
teacher says. All weights are trained: experts that a block shares must do what others did before.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmoe_compile import loading
from dmoe_compile.training import BLOCK_LENGTH, Batch, batches, block_mask, check_schedule, optimizers, save

_LOGGED = 100  # steps whose mean loss is a number of the log


@dataclass(frozen=True)
class Settings:
    """How long, how fast, and the coreset that is tuned to.

    Attributes:
        steps: of the optimizer.
        tokens: of a step.
        learning_rate: its peak, as in training; it rises over `warm_up` steps and falls as a cosine.
        top_p: dmoe.top_p.
        min_experts: dmoe.min_experts; the model's k if None.
        seed: of problems and noise; other ones than training saw.
    """

    steps: int = 6000
    tokens: int = 2048
    learning_rate: float = 1e-3
    warm_up: int = 50
    top_p: float = 0.6
    min_experts: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        check_schedule(self.steps, self.tokens, self.learning_rate, self.warm_up)


def tune(source: str, folder: Path, settings: Settings) -> list[float]:
    """Tune a model, write it to `folder` as save_pretrained() does, and return the loss of every step.

    Raises:
        ValueError: for a folder that holds no model with a tokenizer.
    """
    from rich.progress import track
    from transformers import get_cosine_schedule_with_warmup

    words: Any = loading.need_tokenizer(source)
    student: Any = loading.load_model(source)[0].float()
    student.config._experts_implementation = "grouped_mm"
    teacher = copy.deepcopy(student).requires_grad_(False)
    least = student.config.num_experts_per_tok if settings.min_experts is None else settings.min_experts
    options: Any = {"passes": ["dmoe"], "dmoe.top_p": settings.top_p, "dmoe.min_experts": least}
    options["block_length"] = BLOCK_LENGTH
    forward = torch.compile(student.model, backend="dmoe", options=options, dynamic=False)
    trained = optimizers(student, settings.learning_rate)
    schedules = [get_cosine_schedule_with_warmup(each, settings.warm_up, settings.steps) for each in trained]
    source_of = batches(words, settings.tokens, settings.seed)
    losses = []
    began = time.monotonic()
    for _ in track(range(settings.steps), "tune"):
        batch = next(source_of)
        loss = _distance(_logits(teacher, teacher.model, batch), _logits(student, forward, batch), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for stepper in (*trained, *schedules):
            stepper.step()
        student.zero_grad()
        losses.append(loss.item())
    folder.mkdir(parents=True, exist_ok=True)
    save(student, words, folder)
    means = [sum(some) / len(some) for some in (losses[i : i + _LOGGED] for i in range(0, len(losses), _LOGGED))]
    line = {**asdict(settings), "min_experts": least, "loss": means, "seconds": time.monotonic() - began}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    return losses


def _logits(model: Any, forward: Any, batch: Batch) -> Tensor:
    """Return logits of the last block, [B, L, V]."""
    mask = block_mask(batch.input_ids.shape[1])
    out = forward(batch.input_ids, attention_mask=mask, use_cache=False)
    logits: Tensor = model.lm_head(out.last_hidden_state[:, -BLOCK_LENGTH:])
    return logits


def _distance(teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
    """Return the divergence of the student's predictions from the teacher's, weighted as in training."""
    wanted = teacher.log_softmax(-1)
    each = (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)
    return (each * batch.weights).sum()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m dmoe_compile.tuning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="the folder of the model to tune")
    parser.add_argument("folder", type=Path, help="where the tuned one goes")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int if value is None else type(value), default=value)
    args = vars(parser.parse_args())
    tune(args.pop("model"), args.pop("folder"), Settings(**args))


if __name__ == "__main__":
    main()
