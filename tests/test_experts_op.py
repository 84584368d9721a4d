"""dmoe::experts interpreted against the plain-torch truth, and traced for a GPU that isn't here.

T, H, F: tokens, hidden size, expert width; E, k: experts, experts a token
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from dmoe_compile.kernels import experts_cpu
from dmoe_compile.kernels.experts import experts, launch
from dmoe_compile.kernels.experts_cpu import Operands
from dmoe_compile.kernels.limits import DENSE_TOKENS, LISTED_TOKENS
from dmoe_compile.kernels.tiles import MOST_PARTIALS
from torch import Tensor
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import expert_operands
from dmoe_compile.testing.fake_gpu import fake_gpu
from dmoe_compile.testing.interpreter import interpreted
from expert_operands import ACTIVATIONS, DTYPES, LAYOUTS, forms, routing
from pairwise import covering

Args = dict[str, Any]

# The kernel rounds each mid once, by at most this share of itself, up or down; their sum then moves by less than that
# share of the largest output. fp32 has no such rounding: there it is the sums' other order, over some 100 terms.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-19}

pytestmark = pytest.mark.usefixtures("nan_memory")


def operands(ids: Tensor, E: int, *, listed: bool = True, **form: Any) -> Args:
    """Return launch()'s arguments, see expert_operands.py, with a list of the experts in use or without."""
    used = sorted(set(ids[(ids >= 0) & (ids < E)].tolist()))
    active = torch.full((1, E), 2**31 - 1, dtype=torch.int32)  # behind the list may be anything
    active[0, : len(used)] = torch.tensor(random.Random(0).sample(used, len(used)), dtype=torch.int32)
    listing = {"active": active, "counts": torch.tensor([len(used)], dtype=torch.int32)}
    return expert_operands.operands(ids, E, **form) | (listing if listed else dict.fromkeys(listing))


def truth_of(args: Args) -> Tensor:
    return experts_cpu.reference(Operands(**{name: x for name, x in args.items() if name not in ("active", "counts")}))


def check(args: Args, seed: int | None = None) -> Tensor:
    """Compare the interpreted op with the truth, and return its partials."""
    with interpreted(seed=seed):
        partials = experts(**args)
    truth = truth_of(args)
    assert not truth.isnan().any()
    bound = ROUNDING[args["hidden"].dtype] * max(truth.abs().max().item(), 1e-3)
    torch.testing.assert_close(partials.sum(0), truth, rtol=0, atol=bound)
    return partials


def name(form: dict[str, Any]) -> str:
    flags = [option for option, value in form.items() if value is True]
    return "-".join([form["layout"], form["activation"], str(form["dtype"]).removeprefix("torch."), *flags])


@pytest.mark.parametrize("form", covering(forms(listed=[True, False])), ids=name)
def test_every_two_options_together(form: dict[str, Any]) -> None:
    check(operands(routing(21, 6, 3), 6, **form))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_options_together(layout: str, activation: str, dtype: torch.dtype) -> None:
    own = dict(layout=layout, activation=activation, dtype=dtype)
    for form in forms(listed=[True, False]):
        if form == form | own:
            check(operands(routing(21, 6, 3), 6, **form))


SIZES = {  # listed, T, E, k, H, F
    "one token": (True, 1, 4, 2, 72, 40),
    "all experts, tiles that fit": (True, 7, 3, 3, 64, 64),
    "one expert": (True, 20, 1, 1, 72, 40),
    "the width cut into shares": (True, 33, 3, 1, 128, 256),
    "a step of the width and a bit": (True, 16, 4, 2, 200, 72),
    "the most tokens of the dense variant": (True, DENSE_TOKENS, 4, 2, 72, 136),
    "a list for the second launch only": (True, DENSE_TOKENS + 1, 4, 2, 64, 64),
    "a list, and three tiles of tokens": (True, 130, 6, 3, 72, 136),
    "the most tokens that a list is read for": (True, LISTED_TOKENS, 6, 3, 72, 40),
    "a list of no use": (True, LISTED_TOKENS + 1, 4, 2, 64, 64),
    "one routed token": (False, 1, 4, 2, 72, 40),
    "routed, tiles that fit": (False, 33, 3, 3, 128, 128),
    "one expert, which gets two tiles of tokens": (False, 100, 1, 1, 72, 40),
    "many tokens": (False, 256, 8, 2, 72, 40),
}


@pytest.mark.parametrize(("listed", "T", "E", "k", "H", "F"), SIZES.values(), ids=SIZES)
def test_sizes(listed: bool, T: int, E: int, k: int, H: int, F: int) -> None:
    check(operands(routing(T, E, k), E, H=H, F=F, listed=listed, dtype=torch.float16, biases=True))


def test_tokens_that_crowd_at_an_expert_take_turns() -> None:
    ids = torch.stack([torch.zeros(150, dtype=torch.int64), torch.arange(150) % 3 + 1], -1)
    ids[::7] = 9
    partials = check(operands(ids, 5, biases=True, layout="interleaved", listed=False))
    assert partials.shape == (2, 150, 72)


# Both launches dense over T, the second alone, neither.
variants = pytest.mark.parametrize(("T", "listed"), [(20, True), (80, True), (80, False)])


@variants
def test_nobody_is_routed(T: int, listed: bool) -> None:
    args = operands(torch.full((T, 2), 4), 4, biases=True, listed=listed)
    with interpreted():
        assert not experts(**args).any()


@variants
def test_programs_may_run_in_any_order(T: int, listed: bool) -> None:
    args = operands(routing(T, 6, 3), 6, biases=True, dtype=torch.bfloat16, listed=listed)
    results = [check(args, seed) for seed in (None, 1, 2)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_huge_values_do_what_they_do_in_torch(activation: str) -> None:
    layout = "concatenated" if activation == "swigluoai" else "plain"  # a product with up, NaN itself, would hide what
    args = operands(torch.tensor([[0], [0], [0], [2]]), 2, activation=activation, layout=layout)
    args["hidden"][1] *= 1e9  # past what exp takes
    args["hidden"][2, 0] = torch.nan
    with interpreted():
        out = experts(**args).sum(0)
    truth = truth_of(args)
    assert truth[2].isnan().all()
    assert truth[[0, 1, 3]].isfinite().all()
    # Each token by its own largest value: the huge one's would hide the others.
    scale = truth.abs().amax(-1, keepdim=True).nan_to_num(1).clamp(1)
    torch.testing.assert_close(out / scale, truth / scale, rtol=0, atol=ROUNDING[torch.float32], equal_nan=True)


def test_the_small_operands_may_be_views_and_of_other_types() -> None:
    args = operands(routing(21, 6, 3), 6)
    args["hidden"] = args["hidden"].T.contiguous().T
    args["ids"] = args["ids"].clamp(-1, 6).int().repeat(1, 2)[:, :3]
    args["weights"] = args["weights"].half()
    check(args)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": (dict(hidden=torch.zeros(1025, 72), ids=torch.zeros(1025, 3).long(), weights=torch.zeros(1025, 3)),
               r"T=1025 tokens, but at most 1024"),
    "nothing": (dict(ids=torch.zeros(21, 0).long(), weights=torch.zeros(21, 0)), r"ids \[21, 0\] have a dimension"),
    "weights": (dict(weights=torch.zeros(21, 3).long()), r"weights is torch.int64, but must be a float type"),
    "bias type": (dict(down_bias=torch.zeros(6, 72).int()), r"down_bias is torch.int32, but must be a float type"),
    "bias view": (dict(down_bias=torch.zeros(72, 6).T), r"down_bias has strides \(1, 6\), but must be contiguous"),
    "up bias": (dict(up_bias=torch.zeros(6, 40)), r"with layout 'concatenated' all biases are in gate_up_bias"),
    "half a list": (dict(counts=None), r"give both or neither"),
    "two blocks": (dict(active=torch.zeros(2, 6).int()), r"active is torch.int32\[2, 6\], but must be int32\[1, 6\]"),
    "list type": (dict(counts=torch.ones(1)), r"counts is torch.float32\[1\], but must be int32\[1\]"),
    "limit": (dict(activation="swigluoai", limit=float("inf")), r"limit=inf of 'swigluoai' must be finite"),
    "what experts_cpu refuses": (dict(layout="twisted"), r"layout 'twisted'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    args = operands(routing(21, 6, 3), 6) | change
    with pytest.raises(ValueError, match=words):
        launch(**args)


@variants
def test_as_an_operator(T: int, listed: bool) -> None:
    args = operands(routing(T, 6, 3), 6, listed=listed)
    args["hidden"], args["weights"] = args["hidden"].nan_to_num(), args["weights"].nan_to_num()
    before = {name: x.clone() for name, x in args.items() if isinstance(x, Tensor)}
    with interpreted():
        torch.library.opcheck(experts, (), args, test_utils=["test_schema", "test_faketensor"])
    after = {name: args[name] for name in before}
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def traced(args: Args, autotune: bool = False) -> tuple[list[list[str]], Tensor]:
    """Trace the op for a GPU that isn't here; return what each launch seems to write, and the fake result."""
    # Only functionalisation looks inside a triton_op; only with a GPU's driver does torch look inside the kernels.
    with fake_gpu():
        graph = make_fx(dispatch_functionalize(lambda given: experts(**given, autotune=autotune)))(args).graph
    written = [node.kwargs["tensors_to_clone"] for node in graph.nodes if "triton_kernel" in str(node.target)]
    (out,) = graph.output_node().all_input_nodes
    return written, out.meta["val"]


@pytest.mark.parametrize("autotune", [False, True], ids=["", "autotune"])
@pytest.mark.parametrize(("T", "listed", "partials"), [(20, True, MOST_PARTIALS), (300, True, 3), (20, False, 3)])
def test_traced_for_a_gpu_it_is_two_launches(T: int, listed: bool, partials: int, autotune: bool) -> None:
    args = operands(routing(T, 6, 3), 6, listed=listed, biases=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        args |= {name: torch.empty_like(x, device="cuda") for name, x in args.items() if isinstance(x, Tensor)}
    written, out = traced(args, autotune)
    assert written == [["mid_ptr"], ["partials_ptr"]]  # no weights among them, which would be copied
    assert (out.shape, out.dtype, out.device.type) == ((partials, T, 72), torch.float32, "cuda")


def test_the_number_of_tokens_may_be_symbolic() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    args = operands(routing(20, 6, 3), 6)
    for name, x in args.items():
        if isinstance(x, Tensor):
            sizes = [DimDynamic.STATIC] * x.dim()
            sizes[0] = DimDynamic.DYNAMIC if name in ("hidden", "ids", "weights") else DimDynamic.STATIC
            args[name] = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes))
    written, out = traced(args)
    assert written == [["mid_ptr"], ["partials_ptr"]]
    assert isinstance(out.shape[1], torch.SymInt)
    assert (out.shape[0], out.shape[2]) == (MOST_PARTIALS, 72)


def test_caches_know_the_kernels_inside() -> None:
    """Inductor keys compiled graphs by the source of the Triton kernels that it finds in the op's."""
    names = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op("dmoe::experts")}
    assert names == {"_gate_up_kernel", "_down_dense_kernel", "_down_routed_kernel"}
