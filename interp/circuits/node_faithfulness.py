"""Does a set of components suffice? Keep them, ablate all others, and see how much of the behaviour is left."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from interp.directions import metric_attrs
from interp.errors import OptionError, SiteError, one_of
from interp.exact import Announce, exact_scores
from interp.interventions import Patch
from interp.metrics import Metric, get_metric
from interp.model.run import config_of
from interp.provenance import provenance
from interp.sites import component_nodes, parse_node
from interp.statistics import bootstrap_ratio
from interp.tasks.pairs import PromptPairs

ABLATIONS = ("corrupt", "zero", "mean")


def node_faithfulness(
    model, pairs: PromptPairs, ranking: Sequence[str], *, sizes: Sequence[int] | None = None,
    metric: str | Metric = "logit_diff", ablation: str = "corrupt", engine: Literal["sweep", "hooks"] = "sweep",
    max_memory: int | None = None, batch_size: int | None = None, seed: int = 0, announce: Announce = None,
    progress: bool = False,
) -> xr.Dataset:  # fmt: skip
    """Recovered metric by circuit size: the clean run with only the first n nodes of a ranking left as they are.

    All other heads and MLPs are replaced at all positions by their values in the corrupt run ("corrupt"), by zero, or
    by the corrupt run's mean over prompts at each position ("mean"). The embeddings stay clean, so n = 0 is the direct
    path from the input alone.

        recovered(n) = (mean metric(n nodes) - mean metric(corrupt)) / (mean metric(clean) - mean metric(corrupt))

    ranking: node ids of heads and MLPs, most important first; nodes not named are always ablated.
    sizes: which n (default: all up to 40 nodes, then about 40 spread evenly on a log scale).
    Returns a Dataset over `n`: value [prompt, n], recovered, low and high (95 % bootstrap over prompts), node: the
    component added last. With all nodes kept, recovered is exactly 1.
    """
    one_of(ablation, ABLATIONS, "ablation")
    metric, cfg = get_metric(metric), config_of(model)
    nodes = [parse_node(node, cfg) for node in ranking]
    if len(set(nodes)) < len(nodes):
        raise OptionError("the ranking names a node twice")
    everything = component_nodes(cfg)
    if strange := [node for node in nodes if node not in set(everything)]:
        raise SiteError(f"cannot rank {strange[0]}: a circuit here is made of whole heads and MLPs (a3.h2, m5)")
    sizes = default_sizes(len(nodes)) if sizes is None else sorted(set(sizes))
    if bad := [n for n in sizes if not 0 <= n <= len(nodes)]:
        raise OptionError(f"cannot keep {bad[0]} of {len(nodes)} ranked nodes")
    kept = [set(nodes[:n]) for n in sizes]
    scores = exact_scores(
        model,
        pairs,
        [tuple(Patch.of_node(node) for node in everything if node not in keep) for keep in kept],
        metrics=[metric],
        base="clean",
        source="other" if ablation == "corrupt" else ablation,
        engine=engine,
        max_memory=max_memory,
        batch_size=batch_size,
        announce=announce,
        progress=progress,
        title="faithfulness",
    )
    values, clean, corrupt = (part[0].double().numpy() for part in (scores.patched, scores.clean, scores.corrupt))
    recovered, low, high = bootstrap_ratio(values - corrupt[:, None], clean - corrupt, seed=seed)
    return xr.Dataset(
        {
            "value": (("prompt", "n"), values),
            "recovered": ("n", recovered),
            "low": ("n", low),
            "high": ("n", high),
            "node": ("n", ["" if n == 0 else str(nodes[n - 1]) for n in sizes]),
        },
        coords={"n": sizes, "prompt": range(len(pairs))},
        attrs={"method": "node_faithfulness", "ablation": ablation, "n_nodes": len(everything),
               **metric_attrs([metric], "noise"), **provenance(model, pairs)},
    )  # fmt: skip


def default_sizes(n_nodes: int, at_most: int = 40) -> list[int]:
    """0..n_nodes, thinned out towards the large end if there are more than `at_most`."""
    if n_nodes <= at_most:
        return list(range(n_nodes + 1))
    spread = np.unique(np.geomspace(1, n_nodes, at_most).round().astype(int)).tolist()
    return [0, *spread]
