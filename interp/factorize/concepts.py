"""Which concept a direction of activations stands for: how it tells texts apart, and which neurons it shares with others.

A direction z is held against texts that have a concept and texts that do not (2506.10920, concept detection):

    a(text) = max over tokens t of cos(z, x_t)                 S_CD = log( mean a(active) / mean a(neutral) )

S_CD (nats) has no value where a mean is not positive, and near 0 it measures little but noise: both means are raised to a small
floor first, and where that changed something the score says only its sign. Two measures that need no floor stand beside it: the
difference of the two means (cosine), and AUROC, the share of pairs of an active and a neutral text in which the active one has
the larger a (ties count half; .5 is chance). Five texts on each side can be ordered in 252 ways, so that among hundreds of
features one reaches 1 by accident: choose features by some texts and judge them by others.

Components of an SNMF are sparse, so that features can be compared by the neurons they are made of:

    M = Zb Zb^T,  Zb = (Z != 0)                                M_ij: neurons that features i and j share; M_ii: those of i

Features of related concepts (days of the week) share core neurons, and each has exclusive ones.
"""

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, TaskError
from interp.features.sources import Corpus, ModelSource
from interp.precision import at_least_float32

Texts = Sequence[Float[Tensor, "_ d"]] | Float[Tensor, "_ _ d"]  # activations of each text


def text_activations(
    model, hook: str, texts: Sequence[str], *, context: int = 128, batch_size: int = 32
) -> list[Float[Tensor, "token d"]]:
    """What each text has at a hook, one matrix per text, in float32; heads side by side, without the first position.

    context: tokens of a window; a longer text is read in several, each without its first position. batch_size: windows per
    forward pass. Raises `TaskError` naming a text that is not two tokens long, `SiteError` where there is no such hook.
    """
    if not texts:
        raise TaskError("there are no texts to read")
    windows = [Corpus.from_texts(model, [text], context=context, name=f"the text {text[:40]!r}") for text in texts]
    width = max(part.tokens.shape[1] for part in windows)
    tokens = torch.cat([F.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in windows])
    corpus = Corpus(tokens, torch.cat([part.lengths for part in windows]))
    values = ModelSource(model, corpus, [hook], batch_size=batch_size).read(range(len(tokens))).values[hook]
    sizes = [int(part.lengths.sum()) - len(part.lengths) for part in windows]
    return list(values.split(sizes))


@torch.no_grad()
def concept_detection(
    directions: Float[Tensor, "feature d"], active: Texts, neutral: Texts, *, floor: float = 1e-3
) -> pd.DataFrame:
    """How well each direction tells active from neutral texts: S_CD of 2506.10920, with AUROC and the difference of means.

    active, neutral: activations of each text, [token, d] (`text_activations`), or stacked [text, token, d].
    directions: of any length; to a direction or an activation of zeros every cosine is 0. floor: a cosine above 0; means below it
    count as this. Columns: feature (row), s_cd (nats), floored (whether a mean was at or below the floor), auroc,
    difference (of mean cosines), mean_active, mean_neutral (cosines, as they are).
    Raises `OptionError` where a side has no text, a text has no token, or widths differ.
    """
    if floor <= 0:
        raise OptionError(f"a floor under means is above 0, not {floor}")
    on = _strongest_cosines(directions, active, "active")
    off = _strongest_cosines(directions, neutral, "neutral")
    means = on.mean(0), off.mean(0)
    above = [mean.clamp_min(floor) for mean in means]
    # a loop over one side: [active, neutral, feature] at once may not fit
    wins = sum(((row > off).double() + 0.5 * (row == off)).mean(0) for row in on) / len(on)
    columns = {
        "s_cd": (above[0] / above[1]).log(),
        "floored": (means[0] <= floor) | (means[1] <= floor),
        "auroc": wins,
        "difference": means[0] - means[1],
        "mean_active": means[0],
        "mean_neutral": means[1],
    }
    return pd.DataFrame(
        {"feature": range(len(directions))} | {name: value.cpu().numpy() for name, value in columns.items()}
    )


def _strongest_cosines(
    directions: Float[Tensor, "feature d"], texts: Texts, side: str
) -> Float[Tensor, "text feature"]:
    """a(text) for each direction, in float64."""
    if not len(texts):
        raise OptionError(f"there is no {side} text")
    z = _unit(directions)
    found = []
    for i, x in enumerate(texts):
        if x.ndim != 2 or x.shape[1] != directions.shape[1]:
            raise OptionError(
                f"{side} text {i} is {list(x.shape)}, and directions read activations [token, {directions.shape[1]}]"
            )
        if not len(x):
            raise OptionError(f"{side} text {i} has no token")
        found.append((_unit(x.to(z)) @ z.T).amax(0))
    return torch.stack(found).double()


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows of length 1, and those of zeros as they are, whatever their scale."""
    rows = at_least_float32(rows)
    largest = rows.abs().amax(1, keepdim=True)  # first, so that no square under- or overflows
    rows = rows / torch.where(largest > 0, largest, 1)
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1)


# ---------------------------------------------------------------------------------------------------------- neurons


def neuron_overlap(components: Float[Tensor, "feature neuron"]) -> Int[Tensor, "feature feature"]:
    """Neurons that each two features share, M = Zb Zb^T with Zb = (Z != 0); its diagonal counts each feature's own.

    Signs do not matter: a neuron that one feature raises and the other lowers is shared.
    """
    used = (components != 0).to(torch.float32)  # whole numbers are exact below 2^24, and this is the fast product
    return (used @ used.T).to(torch.int64)


def core_neurons(
    components: Float[Tensor, "feature neuron"], features: Sequence[int]
) -> tuple[Int[Tensor, " core"], dict[int, Int[Tensor, " _"]]]:
    """(neurons that all of these features have, {feature: neurons that only it has among these}), ascending.

    Amplifying core neurons should raise what the features have in common (all days of the week), exclusive ones a single day
    (2506.10920). Raises `OptionError` for fewer than two features, one that is named twice, or one that there is not.
    """
    features = [int(feature) for feature in features]
    if len(features) < 2 or len(set(features)) < len(features):
        raise OptionError(f"neurons are shared among two or more different features, not {features}")
    if wrong := [feature for feature in features if not 0 <= feature < len(components)]:
        raise OptionError(f"there are features 0 to {len(components) - 1}, not {wrong[0]}")
    used = components[features] != 0
    count = used.sum(0)
    core = (count == len(features)).nonzero()[:, 0]
    return core, {f: (row & (count == 1)).nonzero()[:, 0] for f, row in zip(features, used, strict=True)}
