"""Which answer do the neurons hold true? A vote of MLP activations that needs no training (TruthV, 2509.17932).

For question q and candidate answer c let m_i(q, c) be the activation of neuron i (`mlp.hook_post`, all layers) at the last
token of the question with that answer. Each neuron is asked twice (last token and vote are our reading; the paper leaves them
open):

    pick_i(q) = argmax or argmin over c of m_i(q, c)                         no pick where several candidates share the extreme
    score_i   = share of labelled support questions whose pick is the true answer

The n_keep best of 2 x layers x d_mlp (the pole counts as a vector of its own) vote on the other questions. The best of so many
fit any support set: of a million, fifteen know 16 questions of two candidates by luck. So questions for choosing and for
judging are kept apart, and a null shows what the same procedure makes of labels drawn at random. Log-likelihood of the answers
is the baseline to beat.

A tie, of picks or votes, is worth 1 / (candidates tied), never the first one's: true answers are often listed first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import OptionError, TaskError, one_of
from interp.model.run import canonical
from interp.model.tokens import ids_of, pad, pad_id
from interp.model.transformer import Transformer
from interp.plots import INK, LOWERS, RAISES, finish
from interp.precision import at_least_float32

POLES = ("max", "min")


@dataclass(frozen=True, kw_only=True, eq=False)
class TruthVote:
    """What `truth_vote` found; accuracies are shares of the test questions.

    likelihood, likelihood_per_token: choosing the answer with the largest sum (mean) of its tokens' log-probabilities. chance:
    mean of 1 / candidates. null: accuracies of the whole procedure with random labels. kept: layer, neuron, pole, score (on
    support), test (on test questions; the fall from the score is the luck of choosing).
    """

    accuracy: float
    likelihood: float
    likelihood_per_token: float
    chance: float
    null: Float[np.ndarray, " draw"] = field(repr=False)
    kept: pd.DataFrame = field(repr=False)
    n_support: int
    n_test: int
    vote: str
    model: str

    @property
    def null_mean(self) -> float:
        """Mean accuracy under random labels; near `chance`."""
        return float(self.null.mean())

    @property
    def null_interval(self) -> tuple[float, float]:
        """Where 95 % of the accuracies under random labels lie."""
        low, high = np.quantile(self.null, [0.025, 0.975])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """(1 + draws at least as accurate) / (1 + draws): never below 1 / (1 + draws)."""
        return float((1 + (self.null >= self.accuracy - 1e-12).sum()) / (1 + len(self.null)))


@torch.no_grad()
def truth_vote(
    model: Transformer, questions: Sequence[str], candidates: Sequence[Sequence[str]], correct: Sequence[int], *,
    support: float = 0.5, n_keep: int = 64, vote: Literal["majority", "weighted"] = "majority", n_null: int = 20, seed: int = 0,
    batch_size: int = 16,
) -> TruthVote:  # fmt: skip
    """Accuracy of the neurons' vote on answers to multiple-choice questions, beside log-likelihood, chance and random labels.

    candidates: answers of each question, which may be differently many; the text is question + answer, so an answer brings its
    own leading space. correct: the true one's number. support: share of the questions for choosing neurons, at random by seed.
    n_keep: neurons that vote. vote: "majority" counts a vote each, "weighted" its score. n_null: draws of random labels, of
    support and test questions alike. batch_size: texts per forward pass (at least those of one question). Held: two bytes per
    question and neuron. Raises `TaskError` for questions that do not fit together, `OptionError` for options out of range.
    """
    canonical(model, "truth_vote")
    one_of(vote, ("majority", "weighted"), "way to vote")
    _check(questions, candidates, correct)
    n, n_neurons = len(questions), model.cfg.n_layers * model.cfg.d_mlp
    n_support = round(support * n)
    if not 0 < n_support < n:
        raise OptionError(f"a support share of {support} of {n} questions leaves none for choosing or none for judging")
    if not 1 <= n_keep <= 2 * n_neurons or n_null < 1:
        raise OptionError(f"cannot keep {n_keep} of {2 * n_neurons} neurons and poles, or draw {n_null} times")
    sizes = torch.tensor([len(each) for each in candidates])
    picks, log_p = _run(model, questions, candidates, batch_size)
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(n))
    chosen, test = order[:n_support].sort().values, order[n_support:].sort().values
    labels = torch.tensor([int(label) for label in correct])
    found, kept, score = _vote(picks, labels, sizes, chosen, test, n_keep, vote)
    null = []
    for _ in range(n_null):
        drawn = torch.from_numpy(rng.integers(sizes.numpy()))
        null.append(_vote(picks, drawn, sizes, chosen, test, n_keep, vote)[0])
    place = kept % n_neurons
    return TruthVote(
        accuracy=found, likelihood=_credit(log_p[0][test], labels[test], sizes[test]),
        likelihood_per_token=_credit(log_p[1][test], labels[test], sizes[test]),
        chance=float((1 / sizes[test].double()).mean()), null=np.array(null),
        kept=pd.DataFrame({
            "layer": (place // model.cfg.d_mlp).numpy(), "neuron": (place % model.cfg.d_mlp).numpy(),
            "pole": [POLES[i] for i in (kept // n_neurons).tolist()], "score": score.numpy(),
            "test": (picks[test][:, kept] == labels[test, None]).double().mean(0).numpy(),
        }),
        n_support=n_support, n_test=n - n_support, vote=vote, model=model.cfg.name,
    )  # fmt: skip


def _check(questions: Sequence[str], candidates: Sequence[Sequence[str]], correct: Sequence[int]) -> None:
    if not len(questions) == len(candidates) == len(correct):
        raise TaskError(
            f"{len(questions)} questions, {len(candidates)} lists of candidates and {len(correct)} true answers do not match"
        )
    for i, (answers, label) in enumerate(zip(candidates, correct, strict=True)):
        if not 2 <= len(answers) <= 127:
            raise TaskError(f"question {i} has {len(answers)} candidates, and a vote needs 2 to 127")
        if not 0 <= label < len(answers):
            raise TaskError(f"the true answer of question {i} is candidate {label} of {len(answers)}")


def _run(
    model: Transformer, questions: Sequence[str], candidates: Sequence[Sequence[str]], batch_size: int
) -> tuple[Int[Tensor, "question vector"], Float[Tensor, "measure question candidate"]]:
    """Each neuron's picks, first by argmax and then by argmin, -1 for none; sums and means of answers' log-probabilities."""
    widest = max(map(len, candidates))
    picks, log_p = [], []
    size = max(1, batch_size // widest)
    for start in range(0, len(questions), size):
        rows, begins, where = [], [], []
        for i, question in enumerate(questions[start : start + size]):
            asked = ids_of(model.tokenizer, question, prepend_bos=model.cfg.prepend_bos)
            for j, answer in enumerate(candidates[start + i]):
                ids = ids_of(model.tokenizer, question + answer, prepend_bos=model.cfg.prepend_bos)
                # a tokenizer may join the question's end with the answer: what is shared is the question
                pairs = enumerate(zip(asked, ids, strict=False))
                same = next((at for at, (a, b) in pairs if a != b), min(len(asked), len(ids)))
                if same == len(ids):
                    raise TaskError(f"candidate {j} of question {start + i} adds no token to the question")
                rows.append(ids)
                begins.append(max(same, 1))
                where.append((i, j))
        values, sums, means = _read(model, rows, begins)
        at = tuple(torch.tensor(where).T.to(values.device))
        shape = int(at[0].max()) + 1, widest
        part = []
        for sign in (1, -1):
            table = values.new_full((*shape, values.shape[1]), -torch.inf)
            table[at] = sign * values
            best = table.amax(1, keepdim=True)
            alone = (table == best).sum(1) == 1
            part.append(torch.where(alone, table.argmax(1), -1).to("cpu", torch.int8))
        picks.append(torch.cat(part, 1))
        scores = torch.full((2, *shape), -torch.inf, dtype=torch.float64)
        scores[:, at[0].cpu(), at[1].cpu()] = torch.stack([sums, means])
        log_p.append(scores)
    return torch.cat(picks), torch.cat(log_p, 1)


def _read(
    model: Transformer, rows: list[list[int]], begins: list[int]
) -> tuple[Float[Tensor, "row neuron"], Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Neurons of all layers at the last token; sum and mean log-probability of tokens from `begins` on."""
    tokens = pad(rows, pad_id(model.tokenizer)).to(model.device)
    lengths, first = (torch.tensor(x, device=model.device) for x in ([len(row) for row in rows], begins))
    at, values = (torch.arange(len(rows), device=model.device), lengths - 1), []
    hooks = [
        (f"blocks.{layer}.mlp.hook_post", lambda value, hook: values.append(value[at]))
        for layer in range(model.cfg.n_layers)
    ]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    index = torch.arange(tokens.shape[1], device=model.device)
    s, t = ((index >= first[:, None]) & (index < lengths[:, None])).nonzero(as_tuple=True)
    log_p = at_least_float32(logits[s, t - 1]).log_softmax(1)[torch.arange(len(s), device=s.device), tokens[s, t]]
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, s.cpu(), log_p.double().cpu())
    return torch.cat(values, 1), sums, sums / (lengths - first).cpu()


def _vote(
    picks: Int[Tensor, "question vector"], labels: Int[Tensor, " question"], sizes: Int[Tensor, " question"],
    support: Int[Tensor, " support"], test: Int[Tensor, " test"], n_keep: int, vote: str,
) -> tuple[float, Int[Tensor, " kept"], Float[Tensor, " kept"]]:  # fmt: skip
    """(accuracy on the test questions, vectors that voted, their scores on support)."""
    scores = (picks[support] == labels[support, None].to(picks.dtype)).sum(0) / len(support)
    scores = scores.double()
    kept = scores.argsort(descending=True, stable=True)[:n_keep]
    weights = scores[kept] if vote == "weighted" else torch.ones(n_keep, dtype=torch.float64)
    cast = picks[test][:, kept].long()
    votes = torch.zeros(
        len(test), int(sizes.max()) + 1, dtype=torch.float64
    )  # the last column takes those that do not vote
    votes.scatter_add_(1, cast % votes.shape[1], weights.expand_as(cast).contiguous())
    missing = torch.arange(votes.shape[1] - 1) >= sizes[test, None]
    return _credit(votes[:, :-1].masked_fill(missing, -torch.inf), labels[test], sizes[test]), kept, scores[kept]


def _credit(
    scores: Float[Tensor, "question candidate"], labels: Int[Tensor, " question"], sizes: Int[Tensor, " question"]
) -> float:
    """Accuracy of taking the best; of k that share the first place each is worth 1 / k."""
    best = scores >= scores.amax(1, keepdim=True) - 1e-12
    right = best[torch.arange(len(labels)), labels]
    return float((right.double() / best.sum(1)).mean())


def truth_vote_plot(found: TruthVote, *, title: str | None = None) -> go.Figure:
    """Accuracies under random labels as a histogram, with the vote's, the likelihood's and chance as lines."""
    figure = go.Figure(
        go.Histogram(x=found.null, name=f"{len(found.null)} draws of random labels", marker={"color": "#bbbbbb"})
    )
    lines = (("vote", found.accuracy, RAISES), ("log-likelihood", found.likelihood, LOWERS),
             ("log-likelihood per token", found.likelihood_per_token, "#d6604d"), ("chance", found.chance, INK))  # fmt: skip
    for name, value, colour in lines:
        figure.add_vline(x=value, line={"color": colour, "width": 2})
        figure.add_scatter(x=[None], y=[None], mode="lines", line={"color": colour}, name=f"{name} {value:.1%}")
    figure.update_xaxes(title=f"accuracy on {found.n_test} test questions", tickformat=".0%")
    figure.update_yaxes(title="draws")
    figure = finish(figure, title, height=400)
    # long names: above the picture they would lie over it
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1})
