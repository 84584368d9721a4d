"""Tune a block diffusion model to a coreset: dMoE's method (arXiv 2605.30876), by distilling the model from itself.

    python -m dmoe_compile.tuning MODEL OUT [--steps N] [--top-p 0.6]

The teacher is the model as it is. The student is the same model compiled with the dmoe pass, so that its forward is
routed by votes while gradients flow through the passes' joint graph; it learns to say of every masked token what the
teacher says. Routers and norms alone are trained: what they hold is small beside the experts, and enough to move votes.
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
from dmoe_compile.training import BLOCK_LENGTH, Batch, batches, block_mask, check_schedule, save

_TRAINED = ("mlp.gate.", "norm")  # parts of the names of what is trained


@dataclass(frozen=True)
class Settings:
    """How long, how fast, and the coreset that is tuned to.

    Attributes:
        steps: of the optimizer.
        tokens: of a step.
        learning_rate: at the beginning; it falls linearly.
        top_p: dmoe.top_p.
        min_experts: dmoe.min_experts; the model's k if None.
        seed: of problems and noise; other ones than training saw.
    """

    steps: int = 1000
    tokens: int = 4096
    learning_rate: float = 1e-3
    top_p: float = 0.6
    min_experts: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        check_schedule(self.steps, self.tokens, self.learning_rate)


def tune(source: str, folder: Path, settings: Settings) -> list[float]:
    """Tune a model, write it to `folder` as save_pretrained() does, and return the loss of every step.

    Raises:
        ValueError: for a folder that holds no model with a tokenizer.
    """
    from rich.progress import track

    words: Any = loading.need_tokenizer(source)
    student: Any = loading.load_model(source)[0].float()
    student.config._experts_implementation = "grouped_mm"
    teacher = copy.deepcopy(student).requires_grad_(False)
    trained = [x for name, x in student.requires_grad_(False).named_parameters() if any(t in name for t in _TRAINED)]
    for parameter in trained:
        parameter.requires_grad_(True)
    least = student.config.num_experts_per_tok if settings.min_experts is None else settings.min_experts
    options: Any = {"passes": ["dmoe"], "dmoe.top_p": settings.top_p, "dmoe.min_experts": least}
    options["block_length"] = BLOCK_LENGTH
    forward = torch.compile(student.model, backend="dmoe", options=options, dynamic=False)
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    source_of = batches(words, settings.tokens, settings.seed)
    losses = []
    began = time.monotonic()
    for _ in track(range(settings.steps), "tune"):
        batch = next(source_of)
        loss = _distance(_logits(teacher, teacher.model, batch), _logits(student, forward, batch), batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    folder.mkdir(parents=True, exist_ok=True)
    save(student, words, folder)
    line = {**asdict(settings), "min_experts": least, "loss": losses[-100:], "seconds": time.monotonic() - began}
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
