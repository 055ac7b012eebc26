"""What a canonical transformer is made of: one frozen value that the forward pass reads and nobody changes.

Every field answers one question about how dense decoder-only models differ (which norm, where; learned or rotary
positions; gated MLP or not; ...). `interp.model.load` fills it from a model's own configuration; nothing else does.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one layer.

    Angles are position * inv_freq; the first `2 * len(inv_freq)` channels of each head are rotated, the rest pass.
    """

    inv_freq: tuple[float, ...]  # radians per position
    pairs: Literal["half", "adjacent"] = "half"  # channel i rotates with i + dim/2 (Llama) or with i + 1 (GPT-J)
    scale: float = 1.0  # multiplies cos and sin (yarn-like scalings)


@dataclass(frozen=True)
class ModelConfig:
    """The shape and conventions of one model. Lengths are counts; per-layer fields are tuples of `n_layers` items."""

    name: str
    family: str  # the model type of its own configuration file, e.g. "gpt2"
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: Literal["layer", "rms"]
    eps: float
    norm_offset: bool = False  # the weight is stored as w - 1 (Gemma)
    pre_norm: bool = True  # a norm before attention and before the MLP
    post_norm: bool = False  # a norm on what attention and the MLP write (Gemma 2/3, OLMo 2)
    qk_norm: Literal["head", "all"] | None = None  # norm of q and k: per head, or over all heads at once (OLMo 2)
    parallel: bool = False  # attention and MLP both read resid_pre
    shared_norm: bool = False  # parallel models with one norm for both (GPT-J, Phi)
    activation: str = "gelu"
    gated: bool = False
    attn_scale: tuple[float, ...] = ()  # scores = attn_scale * q.k
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()  # a query sees itself and the window - 1 positions before it; None: all
    rotary: tuple[Rotary | None, ...] = ()
    position_offset: int | None = None  # learned positions: row of the table used for position 0; None: no table
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    tied: bool = False  # unembedding is the embedding
    prepend_bos: bool = True
    revision: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def group_size(self) -> int:
        """Query heads that read one key/value head."""
        return self.n_heads // self.n_kv_heads
