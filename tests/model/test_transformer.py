"""The canonical transformer: against a forward pass written out by hand, and the habits users have with it."""

import math
import socket
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens import ActivationCache, HookedRootModule

from interp import ModelConfig, Rules, Transformer
from interp.model.run import record

TEXT = "w0 w1 w2 w3 w4"


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- a forward pass by hand


def gpt2_by_hand(w: dict[str, torch.Tensor], cfg: ModelConfig, tokens: list[int]) -> torch.Tensor:
    """Logits [position, d_vocab] of one prompt, in loops over positions and heads, as in the paper."""

    def layer_norm(x, weight, bias):
        centred = x - sum(x) / len(x)
        return weight * centred / math.sqrt((centred @ centred).item() / len(x) + cfg.eps) + bias

    def gelu(x):  # as GPT-2 computes it (gelu_new)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    stream = [w["embed.W_E"][token] + w["pos_embed.W_pos"][i] for i, token in enumerate(tokens)]
    for layer in range(cfg.n_layers):
        p = {name.removeprefix(f"blocks.{layer}."): value for name, value in w.items()}
        normed = [layer_norm(x, p["ln1.w"], p["ln1.b"]) for x in stream]
        for i in range(len(tokens)):
            for head in range(cfg.n_heads):
                q = normed[i] @ p["attn.W_Q"][head] + p["attn.b_Q"][head]
                weights, mixed, total = [], torch.zeros(cfg.d_head, dtype=q.dtype), 0.0
                for j in range(i + 1):
                    k = normed[j] @ p["attn.W_K"][head] + p["attn.b_K"][head]
                    weights.append(math.exp((q @ k).item() / math.sqrt(cfg.d_head)))
                    total += weights[-1]
                for j in range(i + 1):
                    v = normed[j] @ p["attn.W_V"][head] + p["attn.b_V"][head]
                    mixed = mixed + weights[j] / total * v
                stream[i] = stream[i] + mixed @ p["attn.W_O"][head]
            stream[i] = stream[i] + p["attn.b_O"]
        for i, x in enumerate(stream):
            hidden = gelu(layer_norm(x, p["ln2.w"], p["ln2.b"]) @ p["mlp.W_in"] + p["mlp.b_in"])
            stream[i] = x + hidden @ p["mlp.W_out"] + p["mlp.b_out"]
    return torch.stack([layer_norm(x, w["ln_final.w"], w["ln_final.b"]) @ w["unembed.W_U"] for x in stream])


def test_gpt2_equals_a_forward_pass_by_hand(tiny):
    model = tiny("gpt2", torch.float64)
    tokens = some_tokens(9)
    by_hand = gpt2_by_hand(dict(model.named_parameters()), model.cfg, tokens.tolist())
    torch.testing.assert_close(model(tokens[None])[0], by_hand, rtol=1e-12, atol=1e-12)


def test_a_transformer_is_built_from_weights_alone():
    d, vocabulary = 4, 7
    cfg = ModelConfig(
        name="by hand", family="gpt2", n_layers=0, d_model=d, n_heads=1, n_kv_heads=1, d_head=d, d_mlp=1,
        d_vocab=vocabulary, n_ctx=5, norm="rms", eps=1e-6,
    )  # fmt: skip
    W_E = torch.randn(vocabulary, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Transformer(cfg, {"embed.W_E": W_E, "unembed.W_U": W_E.T})
    x = W_E[[2, 3]]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ W_E.T
    torch.testing.assert_close(model(torch.tensor([[2, 3]]))[0], expected)


# --------------------------------------------------------------------------------------------------------- forward


def test_text_is_tokenized_for_you(tiny):
    model = tiny("gpt2")
    assert torch.equal(model(TEXT), model(model.to_tokens(TEXT)))
    assert torch.equal(model([TEXT, "w5"]), model(model.to_tokens([TEXT, "w5"])))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "pythia"])
def test_read_at_is_the_full_logits_gathered(name, tiny):
    model, tokens, rows = tiny(name, torch.float64), some_tokens(4, 9), torch.arange(4)
    for read_at in (torch.tensor([8, 0, 3, 5]), torch.full((4,), 8)):
        full = model(tokens)[rows, read_at]
        torch.testing.assert_close(model(tokens, read_at=read_at), full, rtol=1e-12, atol=1e-12)


def test_loss_is_the_mean_next_token_cross_entropy(tiny):
    model, tokens = tiny("llama", torch.float64), some_tokens(3, 7)
    probabilities = model(tokens).softmax(-1)
    by_hand = [
        -math.log(probabilities[row, i, tokens[row, i + 1]].item()) for row in range(3) for i in range(6)
    ]  # fmt: skip
    assert model(tokens, return_type="loss").item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_nothing_can_be_asked_for(tiny):
    assert tiny("gpt2")(some_tokens(1, 4), return_type=None) is None


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma3", "olmo2"])
def test_a_causal_model_never_sees_the_future(name, tiny):
    model, tokens = tiny(name), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = some_tokens(4, seed=9)
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])


@given(lengths=st.lists(st.integers(1, 10), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_padding_on_the_right_changes_no_prompts_logits(tiny, lengths, seed):
    model = tiny("mistral", torch.float64)
    prompts = [" ".join(f"w{(seed + 7 * row + i) % 30}" for i in range(n)) for row, n in enumerate(lengths)]
    together = model(prompts)
    for row, prompt in enumerate(prompts):
        alone = model(prompt)[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-12, atol=1e-12)


def test_a_batch_is_its_rows(tiny):
    model, tokens = tiny("qwen3", torch.float64), some_tokens(3, 6)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=1e-12, atol=1e-12)


def test_a_prompt_too_long_is_an_error_with_both_numbers(tiny):
    model = tiny("gpt2")
    model(some_tokens(1, 64))
    with pytest.raises(ValueError, match="65 tokens is longer than gpt2's 64"):
        model(some_tokens(1, 65))


def test_a_prompt_without_a_tokenizer_is_an_error(tiny):
    model = tiny("gpt2")
    bare = Transformer(model.cfg, dict(model.named_parameters()))
    assert torch.equal(bare(some_tokens(1, 4)), model(some_tokens(1, 4)))
    with pytest.raises(ValueError, match="no tokenizer"):
        bare(TEXT)
    assert bare.to_str_tokens(torch.tensor([5, 6])) == ["5", "6"]


def test_gradients_flow_to_activations_and_weights_ask_for_none(tiny):
    model, gradients = tiny("llama", torch.float64), {}

    def watch(value, hook):
        value = value.detach().requires_grad_()
        value.register_hook(lambda gradient: gradients.update({hook.name: gradient}))
        return value

    out = model.run_with_hooks(some_tokens(1, 5), fwd_hooks=[("blocks.1.hook_resid_pre", watch)])
    out[0, -1, 3].backward()
    assert gradients["blocks.1.hook_resid_pre"].abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ caching


def test_it_is_a_hooked_root_module(tiny):
    model = tiny("gpt2")
    assert isinstance(model, HookedRootModule)
    assert set(model.hook_dict) >= {"hook_embed", "hook_pos_embed", "blocks.2.attn.hook_pattern", "ln_final.hook_scale"}
    assert not model.training


def test_a_cache_without_a_filter_holds_every_hook_point(tiny):
    model = tiny("gemma2")
    logits, cache = model.run_with_cache(some_tokens(2, 5))
    assert isinstance(cache, ActivationCache)
    assert set(cache) == set(model.hook_dict)
    assert torch.equal(logits, model(some_tokens(2, 5)))
    assert torch.equal(cache["resid_post", 3], cache["blocks.3.hook_resid_post"])


@pytest.mark.parametrize(
    "names_filter",
    [
        "blocks.1.attn.hook_z",
        ["blocks.1.attn.hook_z", "hook_embed"],
        lambda name: name.endswith("hook_z"),
    ],
    ids=["name", "names", "callable"],
)
def test_a_filter_chooses_what_is_cached(names_filter, tiny):
    model, tokens = tiny("gpt2"), some_tokens(2, 5)
    _, everything = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=names_filter, return_cache_object=False)
    assert isinstance(cache, dict)
    wanted = (
        names_filter if callable(names_filter) else ([names_filter] if isinstance(names_filter, str) else names_filter)
    )
    expected = {n for n in everything if (wanted(n) if callable(wanted) else n in wanted)}
    assert set(cache) == expected
    assert all(torch.equal(cache[name], everything[name]) for name in cache)


@pytest.mark.parametrize(
    "names_filter",
    ["blocks.9.attn.hook_z", ["hook_embed", "blocks.9.attn.hook_z"], lambda name: "no such" in name, []],
    ids=["name", "names", "callable", "empty"],
)
def test_a_filter_that_matches_nothing_is_an_error(names_filter, tiny):
    with pytest.raises(
        ValueError, match=r"no hook point 'blocks\.9\.attn\.hook_z'|matches none of the \d+ hook points"
    ):
        tiny("gpt2").run_with_cache(some_tokens(1, 4), names_filter=names_filter)


def test_the_stream_is_the_sum_of_what_was_written(tiny):
    model = tiny("gemma3", torch.float64)
    _, cache = model.run_with_cache(some_tokens(2, 9))
    total = cache["hook_embed"]
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(cache["resid_pre", layer], total)
        total = total + cache["attn_out", layer] + cache["mlp_out", layer]
    torch.testing.assert_close(cache["resid_post", model.cfg.n_layers - 1], total)
    torch.testing.assert_close(model.unembed_resid(total), model(some_tokens(2, 9)))


def test_heads_add_up_to_what_attention_writes(tiny):
    model = tiny("pythia", torch.float64)
    _, cache = model.run_with_cache(some_tokens(1, 6))
    for layer, block in enumerate(model.blocks):
        heads = torch.einsum("bthe,hed->bthd", cache["z", layer], block.attn.W_O)
        torch.testing.assert_close(heads.sum(2) + block.attn.b_O, cache["attn_out", layer])


# -------------------------------------------------------------------------------------------------------------- hooks


def test_a_hook_edits_what_comes_after_it(tiny):
    model, tokens = tiny("gpt2", torch.float64), some_tokens(2, 6)
    _, cache = model.run_with_cache(tokens)

    def remove(value, hook):
        return torch.zeros_like(value)

    edited, after = {}, model.cfg.n_layers - 1
    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            (f"blocks.{after}.hook_mlp_out", remove),
            (f"blocks.{after}.hook_resid_post", lambda value, hook: edited.update({"post": value})),
        ],
    )
    torch.testing.assert_close(edited["post"], cache["resid_mid", after])


@pytest.mark.parametrize(
    "hook", ["attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_q", "attn.hook_z", "mlp.hook_post"]
)
@pytest.mark.parametrize("name", ["gpt_neo", "gptj", "opt", "llama"])  # of these the bridge ignores edits of patterns
def test_every_hook_has_an_effect(name, hook, tiny):
    model, tokens = tiny(name), some_tokens(1, 6)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{hook}", lambda value, hook: value * 0.5)])
    assert (edited - model(tokens)).abs().max() > 1e-3


def test_hooks_are_gone_after_the_run_even_if_it_failed(tiny):
    model, tokens = tiny("gpt2"), some_tokens(1, 6)
    before = model(tokens)

    def fail(value, hook):
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        model.run_with_hooks(
            tokens, fwd_hooks=[("hook_embed", lambda value, hook: value * 0), ("blocks.1.hook_resid_pre", fail)]
        )
    assert torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError, match="from the hook"), model.hooks(fwd_hooks=[("hook_embed", fail)]):
        model(tokens)
    assert torch.equal(model(tokens), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_failed_caching_run_leaves_no_hooks(tiny):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="longer"):
        model.run_with_cache(some_tokens(1, 65))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


# --------------------------------------------------------------------------------------------------------- generation


def test_greedy_generation_is_an_argmax_loop(tiny):
    model, ids = tiny("llama"), some_tokens(2, 3)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(model.generate(ids, 6, stop_at_eos=False), expected)


def test_text_in_text_out(tiny):
    model = tiny("gpt2")
    text = model.generate(TEXT, 4, stop_at_eos=False)
    assert isinstance(text, str)
    assert TEXT in text
    assert text == model.tokenizer.decode(model.generate(model.to_tokens(TEXT), 4, stop_at_eos=False)[0])


def test_sampling_is_repeatable_by_seed(tiny):
    model, ids = tiny("gpt2"), some_tokens(1, 3)
    state = torch.get_rng_state()
    once, again, other = (model.generate(ids, 12, temperature=1.5, seed=s, stop_at_eos=False) for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(torch.get_rng_state(), state)  # and it draws from a generator of its own


def test_sampling_follows_the_models_probabilities(tiny):
    model, ids = tiny("gpt2"), some_tokens(1, 3)
    drawn = model.generate(ids.expand(4000, 3), 1, temperature=2.0, stop_at_eos=False)[:, -1]
    probabilities = (model(ids)[0, -1] / 2.0).softmax(-1)
    shares = torch.bincount(drawn, minlength=64) / 4000
    assert (shares - probabilities).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_generation_stops_at_the_end_token_and_at_the_context(tiny):
    model = tiny("gpt2")
    eos = model.tokenizer.eos_token_id

    def say_eos(value, hook):
        return value * 0 + 1e3 * model.W_U[:, eos] / model.W_U[:, eos].norm()

    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", say_eos)]):
        ids = model.generate(some_tokens(2, 3), 10)
    assert ids.shape[1] < 13
    assert (ids[:, -1] == eos).all()
    assert model.generate(some_tokens(1, 60), 10, stop_at_eos=False).shape == (1, 64)


def test_stories_writes_english(stories):
    text = stories.generate("Once upon a time, there was a", 12)
    assert "Once upon a time, there was a" in text
    assert any(word in text for word in ("girl", "boy", "little"))


# ----------------------------------------------------------------------------------------------- what it says it is


def test_repr_shows_sizes_and_asks_no_network(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert repr(tiny("gpt2")) == (
        "Transformer(gpt2: 3 layers, d_model 32, 4 heads, d_mlp 80, vocabulary 64, float32 on cpu)"
    )
    assert "4 heads (2 key/value)" in repr(tiny("llama3"))
    assert "float64" in repr(tiny("llama3", torch.float64))


def test_sizes_are_those_of_the_weights(tiny):
    model = tiny("llama3", torch.float64)
    cfg, attn = model.cfg, model.blocks[0].attn
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert model.W_E.shape == (cfg.d_vocab, cfg.d_model)
    assert model.W_U.shape == (cfg.d_model, cfg.d_vocab)
    assert attn.W_Q.shape == (cfg.n_heads, cfg.d_model, cfg.d_head)
    assert attn.W_K.shape == attn.W_V.shape == (cfg.n_kv_heads, cfg.d_model, cfg.d_head)
    assert attn.W_O.shape == (cfg.n_heads, cfg.d_head, cfg.d_model)
    assert model.blocks[0].mlp.W_in.shape == model.blocks[0].mlp.W_gate.shape == (cfg.d_model, cfg.d_mlp)
    assert model.blocks[0].mlp.W_out.shape == (cfg.d_mlp, cfg.d_model)
    assert cfg.group_size == 2


# -------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Counted(Rules):
    """The plain gradient written out again, counting."""

    name: str = "counted"
    calls: Counter = field(default_factory=Counter, compare=False)

    def norm(self, x, scale):
        self.calls["norm"] += 1
        return x / scale

    def qk_norm(self, x, scale):
        self.calls["qk_norm"] += 1
        return x / scale

    def rotate(self, x):
        self.calls["rotate"] += 1
        return x

    def activation(self, x, function):
        self.calls["activation"] += 1
        return function(x)

    def product(self, a, b):
        self.calls["product"] += 1
        return a * b

    def scores(self, q, k):
        self.calls["scores"] += 1
        return q @ k.transpose(-1, -2)

    def softmax(self, scores):
        self.calls["softmax"] += 1
        return scores.softmax(dim=-1)

    def mix(self, pattern, v):
        self.calls["mix"] += 1
        return pattern @ v

    def soft_cap(self, x, cap):
        self.calls["soft_cap"] += 1
        return cap * torch.tanh(x / cap)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_every_nonlinearity_asks_the_rules(name, tiny):
    model, tokens, rules = tiny(name), some_tokens(2, 7), Counted()
    assert torch.equal(model(tokens, rules=rules), model(tokens))
    assert torch.equal(model(tokens, rules=Rules()), model(tokens))
    cfg = model.cfg
    per_layer = {
        "norm": {"gptj": 1, "gemma2": 4, "gemma3": 4}.get(name, 2),  # olmo2's two stand behind instead of before
        "qk_norm": 2 if name in ("qwen3", "gemma3", "olmo2") else 0,
        "rotate": 0 if name == "gpt2" else 2,
        **{"activation": 1, "scores": 1, "softmax": 1, "mix": 1, "product": int(cfg.gated)},
    }
    expected = {rule: count * cfg.n_layers for rule, count in per_layer.items()}
    expected["norm"] += 1  # the final one
    expected["soft_cap"] = cfg.n_layers + 1 if name == "gemma2" else 0
    assert rules.calls == Counter(expected)


def test_rules_do_not_outlive_their_run(tiny):
    model, tokens = tiny("llama"), some_tokens(1, 5)

    @dataclass(frozen=True)
    class Blind(Rules):
        def softmax(self, scores):
            return scores.softmax(-1).detach() * 0

    before = model(tokens)
    assert not torch.equal(model(tokens, rules=Blind()), before)
    assert torch.equal(model(tokens), before)


def test_with_every_rule_linear_the_stream_is_linear(tiny):
    """What the rules do not reach is linear: with all of them frozen, gradient times input is the output itself."""
    model, tokens = tiny("llama", torch.float64), some_tokens(1, 6)  # without biases: linear, not just affine

    class Frozen(Rules):
        """Forward as always; backward as if scales, gates and patterns were constants."""

        def norm(self, x, scale):
            return x / scale.detach()

        def activation(self, x, function):
            return x * (function(x) / x).detach()

        def product(self, a, b):
            return (a * b.detach() + a.detach() * b) / 2

        def softmax(self, scores):
            return scores.softmax(-1).detach()

    resid = model.embed_tokens(tokens).detach().requires_grad_()
    out = model.run_with_hooks(tokens, rules=Frozen(), fwd_hooks=[("blocks.0.hook_resid_pre", lambda v, hook: resid)])
    torch.testing.assert_close(out, model(tokens))
    out[0, -1, 7].backward()
    torch.testing.assert_close((resid.grad * resid).sum(), out[0, -1, 7])


def test_embedding_gradients_agree_with_finite_differences(tiny):
    model, tokens, step = tiny("gemma2", torch.float64), some_tokens(1, 5), 1e-6
    resid = model.embed_tokens(tokens).detach()
    direction = F.normalize(
        torch.randn(resid.shape, dtype=resid.dtype, generator=torch.Generator().manual_seed(0)), dim=-1
    )

    def logit(value: torch.Tensor) -> torch.Tensor:
        swap = [("blocks.0.hook_resid_pre", lambda _, hook: value)]
        return model.run_with_hooks(tokens, fwd_hooks=swap)[0, -1, 7]

    slope = (logit(resid + step * direction) - logit(resid - step * direction)) / (2 * step)
    start = resid.clone().requires_grad_()
    logit(start).backward()
    assert (start.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_recording_runs_no_layer_behind_the_last_one_recorded(tiny):
    model, reached = tiny("gpt2"), []
    tokens = torch.tensor([[1, 2, 3]])
    _, cache = model.run_with_cache(tokens)
    for names, layers in (
        (["hook_embed"], []),
        (["blocks.0.hook_resid_post"], [0]),
        (["blocks.1.hook_resid_pre"], [0, 1]),
    ):
        reached.clear()
        seen = [(f"blocks.{i}.hook_resid_pre", lambda value, hook: reached.append(hook.layer())) for i in range(2)]
        values = record(model, tokens, names, seen)
        assert reached == layers
        assert all(torch.equal(values[name], cache[name]) for name in names)
