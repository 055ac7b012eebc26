"""One canonical decoder-only transformer: the forward pass, written once, with TransformerLens' hook points.

`Transformer` is a `HookedRootModule`: `run_with_hooks`, `run_with_cache`, `hooks`, `add_hook` and the classic names
(`blocks.3.hook_resid_pre`, `blocks.3.attn.hook_z`, ...) work as everywhere in TransformerLens. What differs between
models is in `ModelConfig`; how a backward pass treats non-linearities is in the `Rules` handed to `forward`.

    model = load_model("mini-gpt2")
    logits = model("When Mary and John went to the store, John gave a drink to")
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))

Weights come in as a flat dictionary under TransformerLens' names (`blocks.0.attn.W_Q` is [head, d_model, d_head]) and
are kept as they are: views stay views.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from interp.errors import TaskError
from interp.model import ops, sampling, tokens
from interp.model.activations import ACTIVATIONS
from interp.model.config import ModelConfig, Rotary
from interp.model.nonlinearities import Nonlinearity, nonlinearities
from interp.precision import at_least_float32
from interp.rules import GRADIENT, Rules


@dataclass
class Places:
    """What a block must know about positions: computed once per forward, shared by all layers alike."""

    masks: dict[int | None, Tensor]  # by window: [query, key], True where attention is forbidden
    rotations: dict[Rotary, tuple[Tensor, Tensor]]  # cos, sin: [position, rotated channel]


def _take(weights: Mapping[str, Tensor], name: str) -> nn.Parameter | None:
    tensor = weights.get(name)
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class Norm(nn.Module):
    """LayerNorm or RMSNorm; statistics in float32 at least. `hook_normalized` is before weight and bias, as in TL."""

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Tensor], prefix: str, place: str = "norm"):
        super().__init__()
        self.centred, self.eps, self.offset = cfg.norm == "layer", cfg.eps, cfg.norm_offset
        self.place = place  # the method of `Rules` that decides: norms on queries and keys may have a rule of their own
        self.w, self.b = _take(weights, f"{prefix}.w"), _take(weights, f"{prefix}.b")
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "... d"], rules: Rules = GRADIENT) -> Float[Tensor, "... d"]:
        wide = at_least_float32(x)
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale(ops.norm_scale(wide, self.eps))
        y = self.hook_normalized(getattr(rules, self.place)(wide, scale))
        if self.w is not None:
            y = y * (1 + self.w if self.offset else self.w)
        if self.b is not None:
            y = y + self.b
        return y.to(x.dtype)

    def plain(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The same in one fused operation, past the hook points: for engines that need neither hooks nor rules."""
        if self.centred:
            weight = None if self.w is None else 1 + self.w if self.offset else self.w
            return F.layer_norm(x, x.shape[-1:], weight, self.b, self.eps)
        return self(x)


class Attention(nn.Module):
    """Causal self-attention: all heads, grouped keys and values, optional q/k norms, rotary, soft-cap, window."""

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Tensor], layer: int):
        super().__init__()
        self.cfg, prefix = cfg, f"blocks.{layer}.attn"
        self.scale, self.window, self.rotary = cfg.attn_scale[layer], cfg.windows[layer], cfg.rotary[layer]
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            setattr(self, name, _take(weights, f"{prefix}.{name}"))
        self.q_norm = Norm(cfg, weights, f"{prefix}.q_norm", "qk_norm") if cfg.qk_norm else None
        self.k_norm = Norm(cfg, weights, f"{prefix}.k_norm", "qk_norm") if cfg.qk_norm else None
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = HookPoint(), HookPoint(), HookPoint(), HookPoint()
        if self.rotary is not None:
            self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()

    def project(
        self, name: Literal["q", "k", "v"], x: Float[Tensor, "... d_model"]
    ) -> Float[Tensor, "... head d_head"]:
        """Queries, keys or values of all heads, before any q/k norm or rotation."""
        w_hde, b_he = getattr(self, f"W_{name.upper()}"), getattr(self, f"b_{name.upper()}")
        # all heads side by side: a view whenever the layout allows, so that one matrix product serves all of them
        flat = F.linear(x, rearrange(w_hde, "h d e -> (h e) d"), None if b_he is None else b_he.flatten())
        return flat.unflatten(-1, (w_hde.shape[0], w_hde.shape[2]))

    def place(
        self,
        name: Literal["q", "k"],
        x_bthe: Float[Tensor, "batch position head d_head"],
        rotation: tuple[Tensor, Tensor] | None,
        rules: Rules,
    ) -> Float[Tensor, "batch position head d_head"]:
        """Queries or keys as they enter the scores: after their norm and rotation (cos, sin), where the model has them."""
        norm = getattr(self, f"{name}_norm")
        if norm is not None:
            per_head = self.cfg.qk_norm == "head"
            x_bthe = (
                norm(x_bthe, rules) if per_head else norm(x_bthe.flatten(-2), rules).unflatten(-1, x_bthe.shape[-2:])
            )
        return x_bthe if rotation is None else ops.rotate(x_bthe, *rotation, self.rotary.pairs, rules)

    def output(self, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... d_model"]:
        """What the heads write together: sum over heads of z W_O, plus b_O."""
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)

    def forward(
        self, x: Float[Tensor, "batch position d_model"], places: Places, rules: Rules
    ) -> Float[Tensor, "batch position d_model"]:
        q, k, v = (
            self.hook_q(self.project("q", x)),
            self.hook_k(self.project("k", x)),
            self.hook_v(self.project("v", x)),
        )
        rotation = None if self.rotary is None else places.rotations[self.rotary]
        q, k = self.place("q", q, rotation, rules), self.place("k", k, rotation, rules)
        if self.rotary is not None:
            q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        scores = ops.attention_scores(q, k, scale=self.scale, softcap=self.cfg.attn_softcap, rules=rules)
        scores = self.hook_attn_scores(scores.masked_fill(places.masks[self.window], -torch.inf))
        pattern = self.hook_pattern(ops.attention_pattern(scores, rules))
        return self.output(self.hook_z(ops.attention_mix(pattern, v, rules)))


class MLP(nn.Module):
    """Plain: W_out f(W_in x). Gated: W_out (f(W_gate x) * W_in x); then `hook_pre` is the gate's pre-activation."""

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Tensor], layer: int):
        super().__init__()
        self.activation = ACTIVATIONS[cfg.activation]
        for name in ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"):
            setattr(self, name, _take(weights, f"blocks.{layer}.mlp.{name}"))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if cfg.gated:
            self.hook_pre_linear = HookPoint()

    def neurons(self, x: Float[Tensor, "... d_model"], rules: Rules) -> Float[Tensor, "... d_mlp"]:
        """Activations of the neurons, before `hook_post`."""
        if self.W_gate is None:
            return rules.activation(self.hook_pre(F.linear(x, self.W_in.T, self.b_in)), self.activation)
        gate = rules.activation(self.hook_pre(F.linear(x, self.W_gate.T, self.b_gate)), self.activation)
        return rules.product(gate, self.hook_pre_linear(F.linear(x, self.W_in.T, self.b_in)))

    def output(self, post: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d_model"]:
        """What the neurons write together."""
        return F.linear(post, self.W_out.T, self.b_out)

    def forward(
        self, x: Float[Tensor, "batch position d_model"], rules: Rules
    ) -> Float[Tensor, "batch position d_model"]:
        return self.output(self.hook_post(self.neurons(x, rules)))


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream. `hook_attn_out` and `hook_mlp_out` are what is added
    to the stream (after a post-norm, where there is one)."""

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Tensor], layer: int):
        super().__init__()
        self.cfg, prefix = cfg, f"blocks.{layer}"
        self.attn, self.mlp = Attention(cfg, weights, layer), MLP(cfg, weights, layer)
        if cfg.pre_norm:
            self.ln1 = Norm(cfg, weights, f"{prefix}.ln1")
            if not cfg.shared_norm:
                self.ln2 = Norm(cfg, weights, f"{prefix}.ln2")
        if cfg.post_norm:
            self.ln1_post, self.ln2_post = (Norm(cfg, weights, f"{prefix}.{n}") for n in ("ln1_post", "ln2_post"))
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()
        if not cfg.parallel:
            self.hook_resid_mid = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch position d_model"], places: Places, rules: Rules
    ) -> Float[Tensor, "batch position d_model"]:
        cfg = self.cfg
        resid = self.hook_resid_pre(resid)
        x = self.ln1(resid, rules) if cfg.pre_norm else resid
        attn_out = self.attn(x, places, rules)
        attn_out = self.hook_attn_out(self.ln1_post(attn_out, rules) if cfg.post_norm else attn_out)
        if cfg.parallel:
            mlp_in, resid = resid, resid + attn_out
        else:
            mlp_in = resid = self.hook_resid_mid(resid + attn_out)
        if not cfg.shared_norm:
            x = self.ln2(mlp_in, rules) if cfg.pre_norm else mlp_in
        mlp_out = self.mlp(x, rules)
        mlp_out = self.hook_mlp_out(self.ln2_post(mlp_out, rules) if cfg.post_norm else mlp_out)
        return self.hook_resid_post(resid + mlp_out)


class Embed(nn.Module):
    """Token embedding table W_E [d_vocab, d_model]."""

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.W_E = _take(weights, "embed.W_E")


class PosEmbed(nn.Module):
    """Learned position table W_pos [n_ctx + offset, d_model]."""

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.W_pos = _take(weights, "pos_embed.W_pos")


class Unembed(nn.Module):
    """W_U [d_model, d_vocab], a view of W_E's transpose when the model ties them; b_U [d_vocab] or None."""

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.W_U, self.b_U = _take(weights, "unembed.W_U"), _take(weights, "unembed.b_U")


class Transformer(HookedRootModule):
    """A canonical transformer with hook points. Build one with `interp.load_model`, or from a config and weights.

    `weights` uses TransformerLens' names; biases that are missing are not applied. Parameters do not require
    gradients: analyses differentiate with respect to activations.
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Tensor], tokenizer=None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed, self.unembed = Embed(weights), Unembed(weights)
        self.hook_embed = HookPoint()
        if cfg.position_offset is not None:
            self.pos_embed, self.hook_pos_embed = PosEmbed(weights), HookPoint()
        self.blocks = nn.ModuleList([Block(cfg, weights, layer) for layer in range(cfg.n_layers)])
        self.ln_final = Norm(cfg, weights, "ln_final")
        self.setup()
        self.eval()

    def __repr__(self) -> str:
        c = self.cfg
        return (
            f"Transformer({c.name}: {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads"
            f"{f' ({c.n_kv_heads} key/value)' if c.n_kv_heads != c.n_heads else ''}, d_mlp {c.d_mlp}, "
            f"vocabulary {c.d_vocab}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return self.embed.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.W_E.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    def nonlinearities(self) -> list[Nonlinearity]:
        """Every place whose backward step a rule set may decide; see `Rules.coverage`."""
        return nonlinearities(self.cfg)

    def places(self, n_positions: int) -> Places:
        """Masks and rotations for positions 0..n_positions-1, on the model's device and in its dtype."""
        index = torch.arange(n_positions, device=self.device)
        return Places(
            masks={w: ops.causal_mask(index, index, w) for w in set(self.cfg.windows)},
            rotations={
                r: ops.rotary_tables(r, n_positions, device=self.device, dtype=self.dtype)
                for r in set(self.cfg.rotary)
                if r is not None
            },
        )

    def embed_tokens(self, token_ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]:
        """The residual stream before layer 0: token embeddings (scaled as the model does) plus learned positions."""
        if token_ids.shape[-1] > self.cfg.n_ctx:
            raise TaskError(
                f"a prompt of {token_ids.shape[-1]} tokens is longer than {self.cfg.name}'s {self.cfg.n_ctx}"
            )
        resid = self.embed.W_E[token_ids]
        if self.cfg.embed_scale != 1.0:
            # rounded to the embedding's dtype first, as the published models were trained with it
            resid = resid * torch.tensor(self.cfg.embed_scale, dtype=resid.dtype, device=resid.device)
        resid = self.hook_embed(resid)
        if self.cfg.position_offset is not None:
            first = self.cfg.position_offset
            positions = self.pos_embed.W_pos[first : first + token_ids.shape[-1]]
            resid = resid + self.hook_pos_embed(positions.expand_as(resid))
        return resid

    def unembed_resid(
        self,
        resid: Float[Tensor, "... d_model"],
        rules: Rules = GRADIENT,
        *,
        columns: Int[Tensor, " column"] | None = None,
    ) -> Float[Tensor, "... d_vocab"] | Float[Tensor, "... column"]:
        """Logits of a final residual stream: final norm, unembedding, the model's logit scale and soft-cap.

        columns: only these tokens' logits.
        """
        weight, bias = self.unembed.W_U.T, self.unembed.b_U
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        logits = F.linear(self.ln_final(resid, rules), weight, bias)
        if self.cfg.logit_scale != 1.0:
            logits = logits * self.cfg.logit_scale
        if self.cfg.logit_softcap is not None:
            logits = rules.soft_cap(logits, self.cfg.logit_softcap)
        return logits

    def forward(
        self,
        tokens: Int[Tensor, "batch position"] | str | list[str],
        *,
        rules: Rules | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
        read_at: Int[Tensor, " batch"] | None = None,
        n_layers: int | None = None,
    ) -> Float[Tensor, "batch position d_vocab"] | Float[Tensor, "batch d_vocab"] | Float[Tensor, ""] | None:
        """Logits [batch, position, d_vocab]; with `read_at`, only at one position of each row: [batch, d_vocab].

        Rows shorter than the batch are padded on the right, which a causal model never sees. `return_type="loss"`
        gives the mean next-token cross-entropy in nats. `n_layers` stops after so many layers, for `return_type=None`.
        """
        rules = rules or GRADIENT
        if not isinstance(tokens, Tensor):
            tokens = self.to_tokens(tokens)
        resid = self.embed_tokens(tokens.to(self.device))
        places = self.places(tokens.shape[-1])
        for block in self.blocks[:n_layers]:
            resid = block(resid, places, rules)
        if return_type is None:
            return None
        if read_at is not None:
            resid = resid[torch.arange(len(resid), device=resid.device), read_at.to(resid.device)]
        logits = self.unembed_resid(resid, rules)
        if return_type == "loss":
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device))
        return logits

    def run_with_cache(self, *args, names_filter=None, return_cache_object: bool = True, **kwargs):
        """(output, cache). As in TransformerLens; a filter that matches no hook point is an error, not an empty cache."""
        if names_filter is not None and not callable(names_filter):
            wanted = {names_filter} if isinstance(names_filter, str) else set(names_filter)
            if missing := sorted(wanted - set(self.hook_dict)):
                raise ValueError(f"{self.cfg.name} has no hook point {missing[0]!r}")
            names_filter = wanted.__contains__
        if names_filter is not None and not any(names_filter(name) for name in self.hook_dict):
            raise ValueError(f"names_filter matches none of the {len(self.hook_dict)} hook points of {self.cfg.name}")
        out, cache = super().run_with_cache(*args, names_filter=names_filter, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> Int[Tensor, "batch position"]:
        """Token ids, padded on the right; `prepend_bos=None` does what the model was trained with."""
        prepend = self.cfg.prepend_bos if prepend_bos is None else prepend_bos
        return tokens.encode(self.tokenizer, text, prepend_bos=prepend).to(self.device)

    def to_str_tokens(self, text: str | Int[Tensor, "*one position"], prepend_bos: bool | None = None) -> list[str]:
        """The text of each token, leading spaces kept."""
        ids = self.to_tokens(text, prepend_bos)[0] if isinstance(text, str) else text.reshape(-1)
        return tokens.token_strings(self.tokenizer, ids.tolist())

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; ValueError if it is several."""
        return tokens.single_token(self.tokenizer, text)

    def generate(
        self, prompt: str | Int[Tensor, "batch position"], max_new_tokens: int = 20, *, temperature: float = 0.0,
        top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop_at_eos: bool = True,
    ) -> str | Int[Tensor, "batch longer"]:  # fmt: skip
        """Continue a prompt: text for text, token ids for token ids. `temperature=0` is greedy; see `sampling.sample`.

        Hooks act on every step, since each step is a whole forward pass over the text so far.
        """
        ids = self.to_tokens(prompt) if isinstance(prompt, str) else prompt
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop_at_eos": stop_at_eos}
        ids, _ = sampling.sample(self, ids, max_new_tokens, **options)
        return self.tokenizer.decode(ids[0].tolist()) if isinstance(prompt, str) else ids
