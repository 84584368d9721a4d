"""Widths of the published models' expert layers: what figures are taken at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Hidden size, expert width, experts, experts a token, tokens of a block of one model."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    tokens: int

    def config(self, *, width: str = "moe_intermediate_size", num_experts: str = "num_experts") -> dict[str, int]:
        """Return the widths by the names that transformers' configs have for them, of which two differ."""
        named = {width: self.width, num_experts: self.num_experts}
        return {"hidden_size": self.hidden, "num_experts_per_tok": self.top_k, **named}


SHAPES = {
    "SDAR-30B-A3B": Shape(2048, 768, 128, 8, 32),
    "LLaDA2.0-mini": Shape(2048, 512, 256, 8, 32),
    "LLaDA-MoE-7B-A1B": Shape(2048, 1024, 64, 8, 32),
    "DiffusionGemma-26B-A4B": Shape(2816, 704, 128, 8, 256),
}
