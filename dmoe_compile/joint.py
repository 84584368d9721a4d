"""The passes on AOTAutograd's joint graph, forward and gradients in one, as Inductor calls them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import uuid
from pathlib import Path

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from dmoe_compile.config import Config
from dmoe_compile.kernels import count_experts
from dmoe_compile.normalise import source
from dmoe_compile.notices import Notices, unreadable
from dmoe_compile.passes import pipeline
from dmoe_compile.passes.constrain import Settings
from dmoe_compile.passes.cost import Verdict
from dmoe_compile.passes.nodes import Sources
from dmoe_compile.passes.policies import Policy, find_policy, policy_names


class JointPass(CustomGraphPass):
    """The passes on AOTAutograd's joint graph: forward and gradients in one, decomposed as Inductor asks.

    Args:
        config: what to run.
        gm: Dynamo's graph, which knows where the inputs come from.
        notices: what takes the findings.
        verdicts: whether a coreset pays, for every site; None where it is wanted at all of them.
    """

    def __init__(
        self, config: Config, gm: fx.GraphModule, notices: Notices, verdicts: list[Verdict] | None = None
    ) -> None:
        self.config = config
        self.verdicts = verdicts
        self.gm = gm
        self.inputs = [source(node) for node in gm.graph.find_nodes(op="placeholder")]
        self.notices = notices

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table

        config = self.config
        settings = Settings(config.block_length, config.max_block_tokens, config.scope)
        table = select_decomp_table()
        try:
            findings = pipeline.run(
                graph,
                self.sources(graph),
                config.selected,
                settings,
                decompositions=table,
                joint=True,
                verdicts=self.verdicts,
            )
        except Exception as error:
            self.notices.warn(unreadable(error))
            return
        self.notices.take(self.gm, findings, config)

    def sources(self, graph: fx.Graph) -> Sources:
        """Return what is known of a joint graph's inputs: AOTAutograd numbers them as Dynamo does."""
        paths, parameters = {}, set()
        for node in graph.find_nodes(op="placeholder"):
            index = getattr(node.meta.get("desc"), "idx", None)  # tangents describe an output instead
            if isinstance(index, int) and index < len(self.inputs):
                paths[node.name], is_parameter = self.inputs[index]
                if is_parameter:
                    parameters.add(node.name)
        return Sources(paths, frozenset(parameters))

    def uuid(self) -> tuple[str, ...]:
        """Return what the result depends on: our sources, the policies', options, inputs, and what pays."""
        policies = [find_policy(name) for name in policy_names() if name in self.config.passes]
        pays = [verdict.pays for verdict in self.verdicts or ()]
        seen = "" if all(map(_is_ours, policies)) else uuid.uuid4().hex  # what others' rules depend on, nobody knows
        return _source_hash(), seen, repr(self.config), repr(self.inputs), repr(pays)


@functools.cache
def _source_hash() -> str:
    """Return a hash of this package's sources: a changed rule must never be served from a cache."""
    folders = (Path(each).parent for each in (__file__, pipeline.__file__, count_experts.__file__))
    files = sorted(file for folder in folders for file in folder.glob("*.*") if file.suffix in {".py", ".cpp", ".h"})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _is_ours(policy: Policy) -> bool:
    """Say whether a policy is a module of this package, whose sources are hashed."""
    return inspect.ismodule(policy) and policy.__name__.startswith(f"{pipeline.__package__}.")
