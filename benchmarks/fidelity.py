"""How far every rule set is from exhaustive exact patching, on real behaviours.

    python benchmarks/fidelity.py                                          print the summary
    python benchmarks/fidelity.py --out benchmarks/results/fidelity.json   and write every row
    python benchmarks/fidelity.py --stories ../shared/data/models/stories260k    with a pretrained model as well

mini-gpt2 and mini-llama on all bundled tasks, and stories260k, where present, on pronouns in the style of its training text.
Every position of resid_pre, attn_out, mlp_out and every head is patched exactly, in each direction; `interp.compare` gives
Pearson, Spearman, top-10 overlap, slope, relative error and sign agreement per site with 95 % bootstrap intervals over prompts.
Metric: logit difference (answer logit where a task has no wrong answers), so that no rule set is at a loss. One pass means two
forward passes and one backward; the others say what they take.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

import interp
from interp import PromptPairs, Transformer, activation_patching, attribution, compare, load_model, load_task
from interp.agreement import STATISTICS
from interp.directions import BASES
from interp.files import write_atomically
from interp.provenance import versions
from interp.rules import RULES
from interp.tasks.named import TASKS

SITES = ["resid_pre", "attn_out", "mlp_out", "head"]
# One token each side of a name's place, names of one, two, three and four tokens, in words the model has read
STORIES = (
    "Once upon a time, there was a child named {}.",
    "{} was happy.",
    "One day, {} went to the park.",
    "There was a little child named {}. One day",
)
STORY_NAMES = (("Lily", "Tim"), ("Sue", "Max"), ("Mia", "Bob"), ("Lucy", "Jack"))

Method = Callable[..., object]
METHODS: dict[str, tuple[str, Method]] = {
    **{name: ("one pass", lambda *a, name=name, **k: attribution(*a, rules=name, **k)) for name in RULES},
    "gradient, both ends": ("2 backward", lambda *a, **k: attribution(*a, at="both", **k)),
    "relp, both ends": ("2 backward", lambda *a, **k: attribution(*a, rules="relp", at="both", **k)),
    "integrated gradients, embeddings x8": ("8 rows", lambda *a, **k: interp.integrated_gradients(*a, steps=8, **k)),
    "integrated gradients, site x4 midpoints": (
        "4 rows per layer and site",
        lambda *a, **k: interp.integrated_gradients(*a, path="activation", steps=4, quadrature="midpoint", **k),
    ),
    "site secants": ("1 row per layer and site", lambda *a, **k: interp.site_secants(*a, **k)),
    "site secants, 3 groups": ("3 rows per layer and site", lambda *a, **k: interp.site_secants(*a, groups=3, **k)),
    "site secants, 3 groups, head by head": (
        "3 rows per layer and site or head",
        lambda *a, **k: interp.site_secants(*a, groups=3, each_unit=True, **k),
    ),
}


def story_pairs(model: Transformer) -> PromptPairs:
    """Pronouns after a name, each pair in both orders."""
    told = [(text.format(a), text.format(b), i) for text in STORIES for names in STORY_NAMES
            for i, (a, b) in enumerate((names, names[::-1]))]  # fmt: skip
    she_he = [" She", " He"]
    return PromptPairs.from_text(
        model, clean=[clean for clean, _, _ in told], corrupt=[corrupt for _, corrupt, _ in told],
        answers=[she_he[i] for *_, i in told], wrong_answers=[she_he[1 - i] for *_, i in told], name="story_pronoun",
    )  # fmt: skip


def cases(
    n: int = 32, tasks: Sequence[str] = tuple(TASKS), stories: Path | None = None
) -> list[tuple[Transformer, PromptPairs]]:
    """Models with their behaviours; stories: the folder of stories260k, passed over if it is not there."""
    found = []
    for name in ("mini-gpt2", "mini-llama"):
        model = load_model(name)
        found += [(model, load_task(task, model, n=n, seed=0)) for task in tasks]
    if stories is not None and stories.exists():
        model = load_model(stories)
        found.append((model, story_pairs(model)))
    return found


def rows_of(model: Transformer, pairs: PromptPairs, directions: list[str]) -> list[dict]:
    """Agreement of every method in every direction, per site."""
    rows = []
    metric = "answer_logit" if pairs.wrong_answers is None else "logit_diff"
    for direction in directions:
        asked = {"metric": metric, "direction": direction}
        exact = activation_patching(model, pairs, SITES, **asked)
        for method, (cost, run) in METHODS.items():
            for site, found in compare(run(model, pairs, SITES, **asked), exact, n_resamples=200).iterrows():
                stats = {s: [round(float(found[f"{s}{end}"]), 4) for end in ("", "_low", "_high")] for s in STATISTICS}
                rows.append({"model": model.cfg.name, "task": pairs.name, "metric": metric, "direction": direction,
                             "method": method, "cost": cost, "site": site, **stats})  # fmt: skip
    return rows


def summary(rows: list[dict], direction: str) -> str:
    """Means over tasks: Pearson / relative error for each model, method and site."""
    table = pd.DataFrame([row for row in rows if row["direction"] == direction])
    parts = []
    for model, of_model in table.groupby("model", sort=False):
        shown = ["pearson", "relative_error", "spearman"]
        of_model = of_model.assign(**{s: [value[0] for value in of_model[s]] for s in shown})
        mean = of_model.groupby(["method", "site"], sort=False)[shown].mean()
        cells = mean.apply(lambda r: f"{r.pearson:.3f} / {r.relative_error:.2f} / {r.spearman:.2f}", axis=1)
        parts.append(f"{model}, {direction}: Pearson / relative error / Spearman, mean over {of_model.task.nunique()} tasks\n"
                     + cells.unstack("site", sort=False).to_string())  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="prompt pairs per task")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--directions", nargs="*", default=list(BASES))
    parser.add_argument("--stories", type=Path, help="folder of stories260k")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is near zero on prompts")
    rows = []
    for model, pairs in cases(options.n, options.tasks, options.stories):
        rows += rows_of(model, pairs, options.directions)
        print(f"{model.cfg.name} on {pairs.name}: done", flush=True)
    for direction in options.directions:
        print(f"\n{summary(rows, direction)}")
    if options.out is not None:
        about = {"versions": versions(), "threads": torch.get_num_threads(), "n": options.n, "sites": SITES}
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_atomically(options.out, json.dumps(about)[:-1] + f', "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
