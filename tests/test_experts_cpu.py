"""dmoe::experts_cpu against its reference, on every instruction set of this machine.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from dmoe_compile.kernels import experts_cpu as module
from dmoe_compile.kernels.experts_cpu import Operands, launch, reference
from hypothesis import given
from torch import Tensor

from cpu_operands import HERE, PAIRING, ROUNDING, build_two_at_a_time, check, on
from expert_operands import ACTIVATIONS, DTYPES, forms, operands, routing
from pairwise import covering

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_two_at_a_time()


@pytest.mark.parametrize("isa", HERE)
def test_every_two_options_together(isa: str) -> None:
    for form in covering(forms()):
        check(isa, operands(routing(21, 6, 3), 6, **form))


@pytest.mark.nightly
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("T", "H", "F"), [(21, 72, 40), (64, 200, 72)])
def test_all_options_together(isa: str, T: int, H: int, F: int) -> None:
    for form in forms():
        check(isa, operands(routing(T, 6, 3), 6, H=H, F=F, **form))


SIZES = {  # T, E, k, H, F
    "one token": (1, 4, 2, 72, 40),
    "one expert": (20, 1, 1, 72, 40),
    "all experts": (7, 3, 3, 64, 64),
    "one row": (7, 4, 2, 33, 1),
    "one column": (5, 4, 2, 1, 3),
    "more rows than a block": (33, 4, 2, 100, 72),
    "every number of tokens of an expert": (33, 5, 5, 40, 33),
    "sums that are left for later": (40, 2, 1, 1100, 36),
    "more tokens than are multiplied at once": (500, 2, 1, 40, 24),
    "more columns than a block": (9, 2, 1, 600, 550),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("T", "E", "k", "H", "F"), SIZES.values(), ids=SIZES)
def test_sizes(isa: str, T: int, E: int, k: int, H: int, F: int) -> None:
    for dtype, columns in itertools.product(DTYPES, (False, True)):
        sizes = dict(H=H, F=F, dtype=dtype, transposed=columns, down_transposed=columns)
        check(isa, operands(routing(T, E, k), E, biases=True, **sizes))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    T, E = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    # The largest of many outputs, to which check() refers, is not one whose terms cancel; fewer are in SIZES.
    form = draw(st.sampled_from(forms())) | dict(H=draw(st.integers(16, 140)), F=draw(st.integers(1, 90)))
    return operands(routing(T, E, draw(st.integers(1, E))), E, **form)


@pytest.mark.parametrize("isa", HERE)
@given(case=cases())
def test_any_size_and_form(isa: str, case: dict[str, Any]) -> None:
    check(isa, case)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_may_be_of_another_type(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    args = operands(routing(9, 6, 3), 6, dtype=dtype)
    whole = launch(**args, out_dtype=torch.float32)
    assert torch.equal(launch(**args, out_dtype=out_dtype), whole.to(out_dtype))
    assert torch.equal(launch(**args), whole.to(dtype))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nobody_is_routed(isa: str, dtype: torch.dtype) -> None:
    assert not on(isa)(**operands(torch.full((20, 2), 4), 4, biases=True, dtype=dtype)).any()


def test_nothing_to_do() -> None:
    assert launch(**operands(torch.zeros(0, 2).long(), 4)).shape == (0, 72)
    assert not launch(**operands(torch.zeros(3, 0).long(), 4) | dict(hidden=torch.ones(3, 72))).any()


def test_small_operands_may_be_views_and_of_other_types() -> None:
    args = operands(routing(21, 6, 3), 6, biases=True)
    expected = launch(**args)
    args["hidden"] = args["hidden"].T.contiguous().T
    args["ids"] = args["ids"].clamp(-1, 6).int().repeat(1, 2)[:, :3]
    args["weights"] = args["weights"].double()
    args["down_bias"] = args["down_bias"].T.contiguous().T
    assert torch.equal(launch(**args), expected)


def test_an_expert_twice_counts_twice() -> None:
    """Not promised, but it stays within its memory."""
    args = operands(torch.tensor([[1, 1]] * 300), 3)
    once = args | dict(ids=args["ids"][:, :1], weights=args["weights"].sum(1, keepdim=True))
    torch.testing.assert_close(launch(**args), launch(**once))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_huge_values_do_what_they_do_in_torch(isa: str, activation: str) -> None:
    layout = "concatenated" if activation == "swigluoai" else "plain"  # a product with up, NaN itself, would hide what
    args = operands(torch.tensor([[0], [0], [0], [2]]), 2, activation=activation, layout=layout)
    args["hidden"][1] *= 1e9  # past what exp takes
    args["hidden"][2, 0] = torch.nan
    out, truth = on(isa)(**args), reference(Operands(**args))
    assert truth[2].isnan().all()
    assert truth[[0, 1, 3]].isfinite().all()
    scale = truth.abs().amax(-1, keepdim=True).nan_to_num(1).clamp(1)  # the huge token's would hide the others
    torch.testing.assert_close(out / scale, truth / scale, rtol=0, atol=ROUNDING[torch.float32], equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_every_magnitude(isa: str, activation: str) -> None:
    """Expert width 1 and weights of 1: what comes out is act(x), infinities and all."""
    x = torch.cat([torch.logspace(-30, 38, 400), torch.linspace(0, 120, 997), torch.tensor([torch.inf, torch.nan])])
    x = torch.cat([x, -x]).unsqueeze(1)
    one = torch.ones(1, 1, 1)
    form = dict(layout="plain", activation=activation)
    if activation == "swigluoai":
        form |= dict(layout="separate", up=one)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, F=1, layout=form["layout"]) | form
    args |= dict(hidden=x, weights=torch.ones(len(x), 1), gate_up=one, down=one)
    out = on(isa)(**args).squeeze()
    wide = x.double().squeeze()
    truth = module.activated(wide, None if form["layout"] == "plain" else wide, activation, 1.702, 1.5)
    kept = wide.isfinite() | (
        activation != "gelu"
    )  # of infinity PyTorch's own erf makes NaN or not as it is vectorised
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=4e-7, equal_nan=True)  # erf's error, times x of up to 6
    close(out[kept], truth[kept].float())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(isa: str, dtype: torch.dtype) -> None:
    """Through an identity: read, widened, rounded twice, written. Products of pairs take subnormal values for zero."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, F=1, layout="separate", activation="relu", dtype=dtype)
    # relu(bias of 1) * x
    args |= dict(hidden=x, weights=torch.ones(len(x), 1), gate_up=one * 0, up=one, down=one, gate_up_bias=one[0])
    out, expected = on(isa)(**args), torch.where(x.isfinite(), x, torch.nan)  # 0 * infinity
    if isa in PAIRING and dtype == torch.bfloat16:
        expected = torch.where(x.abs() < torch.finfo(dtype).smallest_normal, 0, expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(isa: str, dtype: torch.dtype) -> None:
    """What is summed in fp32, and is between two 16-bit values, ties among them, goes where torch puts it."""
    x = torch.cat([torch.randn(4000) * scale for scale in (1e-7, 1e-5, 1, 6e4)])
    x = torch.cat([x, torch.arange(1, 4000, 2) / 2048 + 1, torch.tensor([65519.0, 65520, 65536, 1e30, 2**-25, 2**-24])])
    one = torch.ones(1, 1, 1, dtype=dtype)
    args = operands(torch.zeros(len(x), 1).long(), 1, H=1, F=1, layout="plain", activation="relu", dtype=dtype)
    args |= dict(hidden=torch.ones(len(x), 1, dtype=dtype), weights=x.unsqueeze(1), gate_up=one, down=one)
    assert torch.equal(on(isa)(**args).squeeze(1), x.to(dtype))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_goes_down_is_rounded_to_nearest(isa: str, dtype: torch.dtype) -> None:
    """Products of two 16-bit values, through an identity to fp32: of more than one vector of outputs, and a rest."""
    T, F = 64, 40
    x, one = torch.rand(T, F).add(1).to(dtype), torch.eye(F, dtype=dtype).unsqueeze(0)
    args = operands(torch.zeros(T, 1).long(), 1, H=F, F=F, layout="separate", activation="relu", dtype=dtype)
    args |= dict(hidden=x, weights=torch.ones(T, 1), gate_up=one, up=one, down=one, out_dtype=torch.float32)
    assert torch.equal(on(isa)(**args), (x.float() * x.float()).to(dtype).float())


def grouped_mm(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what transformers computes with experts_implementation="grouped_mm", the same operations in turn."""
    order = ids.flatten().argsort()
    tokens = order // ids.shape[1]
    ends = torch.histc(ids.flatten().float(), len(gate_up), 0, len(gate_up) - 1).cumsum(0).int()
    gate, up = torch._grouped_mm(hidden[tokens], gate_up.mT, offs=ends).chunk(2, -1)
    out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.mT, offs=ends)
    weighted = out * weights.flatten()[order].unsqueeze(1)
    sums = torch.empty_like(weighted).index_copy_(0, order, weighted).view(*ids.shape, -1).sum(1)
    return sums.to(hidden.dtype)


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_more_than_that_of_grouped_mm(isa: str, dtype: torch.dtype) -> None:
    """Root mean square against fp64, over widths and numbers of tokens.

    The portable path of x86 has no fused multiply-add: in fp32 every product is rounded too, as often as a sum is.
    """
    more = 2**0.5 if isa == "portable" and dtype == torch.float32 else 1.05
    for T, E, k, H, F in ((32, 8, 4, 256, 128), (64, 4, 2, 512, 64), (8, 16, 8, 128, 192)):
        ids = torch.rand(T, E).argsort(-1)[:, :k]
        args = operands(ids, E, H=H, F=F, dtype=dtype)
        args = {
            name: x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()
        }
        args["weights"] = args["weights"].to(dtype)
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args.values()]
        truth = fp64(*wide[:4], wide[5])
        other = grouped_mm(*(args[name] for name in ("hidden", "ids", "weights", "gate_up", "down")))
        assert error(on(isa)(**args), truth) <= more * error(other, truth)


def fp64(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.einsum("th,tkih->tki", hidden, gate_up[ids]).chunk(2, -1)
    return torch.einsum("tki,tkhi,tk->th", torch.nn.functional.silu(gate) * up, down[ids], weights)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "names": (dict(layout="twisted"), r"layout 'twisted'"),
    "two projections": (dict(layout="plain", activation="swigluoai"), r"'swigluoai' multiplies two projections"),
    "hidden": (
        dict(hidden=torch.zeros(21, 72).double()),
        r"hidden is float64\[21, 72\], but must be fp32, bf16 or fp16",
    ),
    "ids": (dict(ids=torch.zeros(21, 2).long()), r"ids int64\[21, 2\] and weights"),
    "down": (dict(down=torch.zeros(6, 40, 72)), r"do not fit H=72"),
    "up": (dict(layout="separate", gate_up=torch.zeros(6, 40, 72)), r"up is None; with layout 'separate'"),
    "bias": (dict(down_bias=torch.zeros(6, 71)), r"down_bias is float32\[6, 71\], but must be \[6, 72\]"),
    "view": (dict(down=torch.zeros(6, 40, 72).mT), r"must be contiguous"),
    "out": (dict(out_dtype=torch.float64), r"out_dtype is torch.float64, but must be fp32, bf16 or fp16"),
    "device": (dict(ids=torch.zeros(21, 3, device="meta").long()), r"operands are on cpu, meta, .* one device"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch(**operands(routing(21, 6, 3), 6) | change)


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_as_an_operator(out_dtype: torch.dtype | None) -> None:
    args = operands(routing(21, 6, 3), 6, dtype=torch.bfloat16, biases=True)
    args = {name: x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in args.items()}
    before = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor)}
    torch.library.opcheck(module.experts_cpu, tuple(args.values()), dict(out_dtype=out_dtype))
    compiled = torch.compile(partial(module.experts_cpu, out_dtype=out_dtype), fullgraph=True)
    assert torch.equal(compiled(*args.values()), launch(**args, out_dtype=out_dtype))
    assert all(torch.equal(args[name], x) for name, x in before.items())
