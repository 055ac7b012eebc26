"""Planted MLPs that scale what heads wrote: coefficients, intercepts and R^2 come back. And the fit is that of least squares."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from interp.diagnostics.recall import mlp_recall, recall_plot
from interp.errors import OptionError, TaskError, UnsupportedModel
from interp.model.run import record
from tests.small_pairs import refused

TASKS = {
    "even": [f" w{i} w{j} w{i + j} w2" for i in range(4) for j in range(0, 25, 5)],
    "odd": [f" w{i} w{2 * i + 1} w3" for i in range(12)],
}
LAYER = 1


@contextmanager
def planted(model, c: torch.Tensor, c_r: float, noise: float = 0.0):
    """The MLP of layer 1 writes c_h head_h + c_r resid_pre + b_task, the task being told by the prompt's last word."""
    seen, block = {}, model.blocks[LAYER]
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(2, model.cfg.d_model, generator=generator, dtype=torch.float64)

    def write(value, hook):
        heads = torch.einsum("bthe,hed->bthd", seen["z"], block.attn.W_O)
        if model.cfg.post_norm:
            parts = [head / seen["scale"] for head in heads.unbind(2)]
            gain = block.ln1_post.w + 1 if block.ln1_post.offset else block.ln1_post.w
            heads = torch.stack(parts, 2) * gain
        last = seen["tokens"][:, :, 0] == 0  # which task, broadcast from the marker below
        task = torch.where(last, 0, 1)
        eps = noise * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        return torch.einsum("h,bthd->btd", c, heads) + c_r * seen["x"] + b[task] + eps

    marker = model.W_E[model.tokenizer.encode(" w2", add_special_tokens=False)[0]]

    def embedded(value, hook):
        if model.cfg.embed_scale != 1.0:
            value = value / model.cfg.embed_scale
        same = torch.isclose(value, marker, rtol=1e-6, atol=1e-9).all(-1)
        seen["tokens"] = (~same).long()[..., None]

    path = f"blocks.{LAYER}"
    hooks = [
        ("hook_embed", embedded),
        (f"{path}.hook_resid_pre", lambda value, hook: seen.update(x=value)),
        (f"{path}.attn.hook_z", lambda value, hook: seen.update(z=value)),
        (f"{path}.hook_mlp_out", write),
    ]
    if model.cfg.post_norm:
        hooks.append((f"{path}.ln1_post.hook_scale", lambda value, hook: seen.update(scale=value)))
    with model.hooks(fwd_hooks=hooks):
        yield b


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia", "olmo2"])
def test_planted_coefficients_are_recovered(tiny, family):
    model = tiny(family, torch.float64)
    c = torch.linspace(-1.5, 2.0, model.cfg.n_heads, dtype=torch.float64)
    with planted(model, c, -0.3) as b:
        found = mlp_recall(model, TASKS, ridge=1e-10, batch_size=7).sel(layer=LAYER)
    np.testing.assert_allclose(found["coefficient"], c, atol=1e-6)
    assert float(found["resid"]) == pytest.approx(-0.3, abs=1e-6)
    np.testing.assert_allclose(found["intercept"].sel(task="even"), b[0], atol=1e-5)
    np.testing.assert_allclose(found["intercept"].sel(task="odd"), b[1], atol=1e-5)
    assert float(found["r2"]) == pytest.approx(1)
    assert float(found["r2_within"]) == pytest.approx(1)


def test_noise_lowers_the_held_out_score(tiny):
    model = tiny("gpt2", torch.float64)
    c = torch.tensor([1.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    scores = []
    for noise in (0.1, 1.0, 30.0):
        with planted(model, c, 0.0, noise):
            scores.append(mlp_recall(model, TASKS).sel(layer=LAYER))
    assert float(scores[0]["r2_within"]) > float(scores[1]["r2_within"]) > float(scores[2]["r2_within"])
    assert float(scores[2]["r2_within"]) < 0.1
    np.testing.assert_allclose(scores[0]["coefficient"], c, atol=0.1)
    assert all(float(each["r2"]) >= float(each["r2_within"]) - 0.05 for each in scores[:2])


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_fit_is_least_squares_with_a_column_per_intercept(tiny, family, earlier):
    """All rows (prompt, channel) written out, the penalty as extra rows, R^2 from residuals."""
    model = tiny(family, torch.float64)
    cfg, ridge, seed = model.cfg, 1e-2, 3
    found = mlp_recall(model, TASKS, earlier=earlier, ridge=ridge, seed=seed, batch_size=5)
    apart = []
    rng = np.random.default_rng(seed)
    for texts in TASKS.values():
        held = set(rng.permutation(len(texts))[: round(0.25 * len(texts))].tolist())
        apart += [i in held for i in range(len(texts))]
    apart, task = np.array(apart), np.repeat([0, 1], [len(texts) for texts in TASKS.values()])
    layer, heads, resid, mlp = 2, [], [], []
    layers = range(layer + 1) if earlier else [layer]
    for text in [text for texts in TASKS.values() for text in texts]:
        stream = f"blocks.{0 if earlier else layer}.hook_resid_pre"
        names = [stream, *(f"blocks.{at}.attn.hook_z" for at in layers), f"blocks.{layer}.hook_mlp_out"]
        names += [f"blocks.{at}.ln1_post.hook_scale" for at in layers if cfg.post_norm]
        values = {name: value[0, -1] for name, value in record(model, model.to_tokens(text), names).items()}
        written = []
        for at in layers:
            for z, W_O in zip(values[f"blocks.{at}.attn.hook_z"], model.blocks[at].attn.W_O, strict=True):
                head = z @ W_O
                if cfg.post_norm:
                    head = head / values[f"blocks.{at}.ln1_post.hook_scale"] * (1 + model.blocks[at].ln1_post.w)
                written.append(head.numpy())
        heads.append(np.stack(written))
        resid.append(values[stream].numpy())
        mlp.append(values[f"blocks.{layer}.hook_mlp_out"].numpy())
    x, y = np.concatenate([np.array(heads), np.array(resid)[:, None]], 1), np.array(mlp)
    train, d = ~apart, cfg.d_model
    centred = x[train] - np.stack([x[train & (task == t)].mean(0) for t in (0, 1)])[task[train]]
    size = ridge * np.mean((centred**2).sum((0, 2)))
    design = x[train].transpose(0, 2, 1).reshape(-1, x.shape[1])
    ones = np.zeros((train.sum() * d, 2 * d))
    ones[np.arange(len(ones)), np.repeat(task[train], d) * d + np.tile(np.arange(d), train.sum())] = 1
    penalty = np.concatenate([np.sqrt(size) * np.eye(x.shape[1]), np.zeros((x.shape[1], 2 * d))], 1)
    A = np.concatenate([np.concatenate([design, ones], 1), penalty])
    solution = np.linalg.lstsq(A, np.concatenate([y[train].ravel(), np.zeros(x.shape[1])]), rcond=None)[0]
    c, b = solution[: x.shape[1]], solution[x.shape[1] :].reshape(2, d)
    here = found.sel(layer=layer)
    np.testing.assert_allclose(here["coefficient"].values.ravel()[: len(c) - 1], c[:-1], atol=1e-8)
    assert float(here["resid"]) == pytest.approx(c[-1])
    np.testing.assert_allclose(here["intercept"], b, atol=1e-8)
    error = ((y[apart] - np.einsum("r,pri->pi", c, x[apart]) - b[task[apart]]) ** 2).sum()
    means = np.stack([y[train & (task == t)].mean(0) for t in (0, 1)])[task[apart]]
    assert float(here["r2"]) == pytest.approx(1 - error / ((y[apart] - y[train].mean(0)) ** 2).sum())
    assert float(here["r2_within"]) == pytest.approx(1 - error / ((y[apart] - means) ** 2).sum())
    assert found.attrs["n_held_out"] == apart.sum()


def test_later_heads_have_no_coefficient(tiny):
    found = mlp_recall(tiny("gpt2"), TASKS, earlier=True)["coefficient"]
    for layer in range(3):
        assert found.sel(layer=layer).notnull().all("head").values.tolist() == [at <= layer for at in range(3)]


def test_an_mlp_that_writes_nothing(tiny):
    model = tiny("gpt2")
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: torch.zeros_like(value))]):
        found = mlp_recall(model, TASKS).sel(layer=1)
    assert not found["coefficient"].any()
    assert not found["intercept"].any()
    assert np.isnan(float(found["r2"]))  # there is nothing to explain


def test_parallel_models_say_so(tiny):
    assert mlp_recall(tiny("pythia"), TASKS).attrs["mlp_reads_heads"] is False
    assert mlp_recall(tiny("gpt2"), TASKS).attrs["mlp_reads_heads"] is True


def test_pictures(tiny):
    found = mlp_recall(tiny("gpt2"), TASKS)
    figure = recall_plot(found, title="recall")
    np.testing.assert_array_equal(figure.data[0].z, found["coefficient"])
    with refused(OptionError, "a layer is for a fit on earlier heads"):
        recall_plot(found, layer=1)
    found = mlp_recall(tiny("gpt2"), TASKS, earlier=True)
    np.testing.assert_array_equal(recall_plot(found, layer=1).data[0].z, found["coefficient"].sel(layer=1))
    assert "MLP of layer 2" in recall_plot(found).layout.yaxis.title.text
    with refused(OptionError, "there are layers 0 to 2, not 3"):
        recall_plot(found, layer=3)


def test_refusals(tiny):
    model = tiny("gpt2")
    with refused(OptionError, "ridge must be positive"):
        mlp_recall(model, TASKS, ridge=0.0)
    with refused(OptionError, "a share between 0 and 1"):
        mlp_recall(model, TASKS, held_out=1.0)
    with refused(TaskError, "there is no task"):
        mlp_recall(model, {})
    with refused(TaskError, "task 'short' has 2 prompts"):
        mlp_recall(model, {**TASKS, "short": [" w1", " w2"]})
    with refused(UnsupportedModel, "load the model with load_model"):
        mlp_recall(torch.nn.Linear(2, 2), TASKS)
