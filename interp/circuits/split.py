"""One layer with the input of every reader apart: what edges end at.

In a plain forward pass all heads of a layer, and their queries, keys and values, read the same residual stream. Here each
reads a stream of its own, so that one edge can carry something else than another. Keys and values have a reader per query
head, also where heads share their weights.

Axes: c circuit (several are run at once), p prompt, r reader (heads in order), t position, d d_model, h head, e d_head.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from interp.model import ops
from interp.model.transformer import Attention, Block, Norm, Places
from interp.rules import GRADIENT, Rules

Streams = Float[Tensor, "circuit reader prompt position d_model"]
Heads = Float[Tensor, "circuit prompt position head d_head"]
Written = Float[Tensor, "*batch position d_model"]


def head_outputs(
    block: Block, streams: Mapping[str, Streams], places: Places, rules: Rules = GRADIENT, *,
    heads: Sequence[int] | None = None, before: Float[Tensor, "prompt earlier d_model"] | None = None,
) -> Heads:  # fmt: skip
    """z of every head, its query, key and value read from streams["q"], ["k"] and ["v"], before any norm.

    heads: only these, one stream each (default: all). before: the residual stream at earlier positions, if the given ones are
    not the first; there all heads read the same.
    """
    attn, n_circuits, n_prompts = block.attn, len(streams["q"]), streams["q"].shape[2]
    heads = range(block.cfg.n_heads) if heads is None else heads
    n_before = 0 if before is None else before.shape[1]
    rotation = None if attn.rotary is None else places.rotations[attn.rotary]
    read = {}
    for x, stream in streams.items():
        here = rotation and tuple(table[n_before:] for table in rotation)
        read[x] = _read(attn, x, normed(block, "ln1", stream, rules), heads, here, rules)
        if n_before and x != "q":
            there = rotation and tuple(table[:n_before] for table in rotation)
            earlier = attn.project(x, normed(block, "ln1", before, rules))
            earlier = earlier if x == "v" else attn.place(x, earlier, there, rules)
            earlier = earlier[:, :, [h * earlier.shape[2] // block.cfg.n_heads for h in heads]]
            read[x] = torch.cat([earlier.repeat(n_circuits, 1, 1, 1), read[x]], 1)
    scores = ops.attention_scores(read["q"], read["k"], scale=attn.scale, softcap=attn.cfg.attn_softcap, rules=rules)
    scores = scores.masked_fill(places.masks[attn.window][n_before:], -torch.inf)
    z = ops.attention_mix(ops.attention_pattern(scores, rules), read["v"], rules)
    return z.unflatten(0, (n_circuits, n_prompts))


def attn_written(block: Block, z: Float[Tensor, "*batch position head d_head"], rules: Rules = GRADIENT) -> Written:
    """What heads with these outputs add to the residual stream together, after a post-norm where there is one."""
    written = block.attn.output(z)
    return _norm(block.ln1_post, written, rules) if block.cfg.post_norm else written


def mlp_written(block: Block, stream: Written, rules: Rules = GRADIENT) -> Written:
    """What the MLP adds to the residual stream when it reads this one."""
    x = normed(block, "ln1" if block.cfg.shared_norm else "ln2", stream, rules)
    written = block.mlp.output(block.mlp.neurons(x, rules))
    return _norm(block.ln2_post, written, rules) if block.cfg.post_norm else written


def heads_written(
    block: Block, z: Heads, heads: Sequence[int] | None = None
) -> Float[Tensor, "circuit head prompt position d_model"]:
    """What each of these heads writes, z W_O, before any post-norm and without the bias, which is no head's."""
    w_hed = block.attn.W_O if heads is None else block.attn.W_O[list(heads)]
    written = rearrange(z, "c p t h e -> c h (p t) e") @ w_hed
    return rearrange(written, "c h (p t) d -> c h p t d", p=z.shape[1])


def normed(block: Block, name: str, stream: Tensor, rules: Rules = GRADIENT) -> Tensor:
    """The stream after the block's norm of that name, where the model norms what it reads."""
    return _norm(getattr(block, name), stream, rules) if block.cfg.pre_norm else stream


def _norm(norm: Norm, x: Tensor, rules: Rules) -> Tensor:
    return norm.plain(x) if rules is GRADIENT else norm(x, rules)


def _read(
    attn: Attention,
    name: str,
    x_crptd: Tensor,
    heads: Sequence[int],
    rotation: tuple[Tensor, Tensor] | None,
    rules: Rules,
) -> Float[Tensor, "row position head d_head"]:
    """Queries, keys or values of these heads as attention takes them, each from its stream; a row is a circuit and a prompt."""
    n_readers, n_prompts = x_crptd.shape[1:3]
    w_hde, b_he = getattr(attn, f"W_{name.upper()}"), getattr(attn, f"b_{name.upper()}")
    own = [head * len(w_hde) // attn.cfg.n_heads for head in heads]
    if attn.cfg.qk_norm == "all" and name != "v":
        # such a norm spans all heads: each stream is projected for all of them, and one is kept
        every = attn.place(name, attn.project(name, x_crptd.flatten(0, 2)), rotation, rules)
        every = rearrange(every, "(c r p) t g e -> r g (c p) t e", r=n_readers, p=n_prompts)
        return every[torch.arange(n_readers), own].permute(1, 2, 0, 3)
    if own != list(range(len(w_hde))):
        w_hde, b_he = w_hde[own], None if b_he is None else b_he[own]
    read = rearrange(x_crptd.flatten(2, 3) @ w_hde, "c h (p t) e -> (c p) t h e", p=n_prompts)
    read = read if b_he is None else read + b_he
    return read if name == "v" else attn.place(name, read, rotation, rules)
