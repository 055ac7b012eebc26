"""What a sparse autoencoder is made of: `SAEConfig`, frozen, and checked when it is made.

Conventions: squared errors are summed over d and averaged over tokens (as SAELens does; other codes average over d too, and
their coefficients are d times larger). A latent fires where its code is not 0.
"""

from dataclasses import dataclass
from typing import Literal

from interp.errors import OptionError, one_of

# name -> what the code is
ARCHITECTURES = {
    "standard": "ReLU, with an L1 penalty",
    "gated": "a gate decides which latents fire, a magnitude path how strongly",
    "topk": "the k largest pre-activations of each token",
    "abstopk": "the k largest in absolute value, signs kept",
    "batchtopk": "the (tokens x k) largest of a batch; a threshold at inference",
    "matryoshka": "batchtopk with nested dictionaries, each of which must reconstruct by itself",
    "jumprelu": "pre-activations above a learned threshold per latent",
    "top-afa": "as many of the largest as make the code as long as the input; no k",
}
NORMALIZATIONS = {
    "none": "inputs as they are",
    "expected_average_only_in": "one scalar so that the mean norm is sqrt(d); folded into the weights after training",
    "layer_norm": "each token less its mean, over its standard deviation; undone on the output",
    "constant_norm_rescale": "each token scaled to norm sqrt(d); undone on the output",
}
SPARSE = {"topk", "abstopk", "batchtopk", "matryoshka", "top-afa"}  # few latents fire from the first step on
WITH_K = SPARSE - {"top-afa"}


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder, or with `d_out` and `target_hook` a transcoder: its shape, its activation, its losses.

    architecture: one of `ARCHITECTURES`. k: latents per token (topk, abstopk, batchtopk, matryoshka).
    d_in, d_sae: channels of a token's activation, latents. d_out: channels of the output, if not d_in.
    hook, target_hook: where inputs (and a transcoder's targets) come from, by TransformerLens' hook names.
    skip: an affine path from input to output, started at 0 (transcoders).
    widths: matryoshka's nested widths, the last being d_sae (default: five, doubling).
    afa: "faithful" is the published top-AFA algorithm to the letter, "corrected" repairs it; see `interp.features.activations`.
    k_max: at most so many latents per token (corrected top-AFA).
    kron: (heads, m, n) with heads * m * n = d_sae makes the encoder KronSAE's: latent (head, i, j) is mAND of two projections.
    normalize: one of `NORMALIZATIONS`; the inputs that the weights see.
    apply_b_dec_to_input: encode x - b_dec instead of x; not for transcoders, whose b_dec lives elsewhere.
    unit_decoder: decoder rows stay of norm 1. Otherwise they are free, and latents are ranked and penalised by f |w|.
    tied: encoder rows keep norm 1 as well ("norm-frozen": an encoder that may shrink undoes top-AFA's selection).
    sparsity: the coefficient of the architecture's penalty: L1 (standard, gated, top-afa), L0 (jumprelu).
    target_l0: jumprelu only: the penalty is sparsity * (2 / target) * (L0 - target)^2 instead.
    afa_weight: lambda of (|f| - |x|)^2 (top-afa), in the published unit and at the lower end of the published range.
    aux_weight, k_aux, dead_after: AuxK: the k_aux (default d_in / 2) strongest of the latents that have not fired for
        `dead_after` tokens predict what is left over; in units of the inputs' variance.
    bandwidth, threshold_init: jumprelu's straight-through estimator and first threshold.
    detach_gate_decoder: gated: the auxiliary reconstruction leaves the decoder alone, as in the paper.
    """

    architecture: str = "topk"
    d_in: int
    d_sae: int
    d_out: int | None = None
    k: int | None = None
    hook: str | None = None
    target_hook: str | None = None
    skip: bool = False
    widths: tuple[int, ...] = ()
    afa: Literal["faithful", "corrected"] = "corrected"
    k_max: int | None = None
    kron: tuple[int, int, int] | None = None
    normalize: str = "none"
    apply_b_dec_to_input: bool = True
    unit_decoder: bool = True
    tied: bool = False
    sparsity: float = 0.0
    target_l0: float | None = None
    afa_weight: float = 1 / 128
    aux_weight: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 10_000_000
    bandwidth: float = 0.05
    threshold_init: float = 0.01
    detach_gate_decoder: bool = True

    def __post_init__(self) -> None:
        one_of(self.architecture, ARCHITECTURES, "kind of sparse autoencoder")
        one_of(self.normalize, NORMALIZATIONS, "way to normalise activations")
        one_of(self.afa, ("faithful", "corrected"), "mode of top-AFA")
        for name in ("d_in", "d_sae", "d_out", "k", "k_max", "k_aux"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, not {value}")
        if self.architecture in WITH_K and self.k is None:
            raise OptionError(f"{self.architecture} needs k, the number of latents per token")
        if self.k is not None and self.k > self.d_sae:
            raise OptionError(f"k = {self.k} latents per token, and d_sae has only {self.d_sae}")
        rising = list(self.widths) == sorted(set(self.widths))
        if self.widths and (not rising or self.widths[0] < 1 or self.widths[-1] != self.d_sae):
            raise OptionError(f"widths must rise from at least 1 to d_sae = {self.d_sae}, not {self.widths}")
        if self.k_max is not None and self.faithful:
            raise OptionError("k_max is not part of the published top-AFA: use afa='corrected'")
        if self.kron is not None:
            heads, m, n = self.kron
            if heads * m * n != self.d_sae:
                raise OptionError(f"kron = {self.kron} makes {heads * m * n} latents, and d_sae is {self.d_sae}")
            if self.architecture not in SPARSE:
                raise OptionError(
                    f"a kron encoder selects by size ({', '.join(sorted(SPARSE))}), not {self.architecture}"
                )
        if self.transcoder and self.apply_b_dec_to_input:
            raise OptionError("a transcoder's b_dec belongs to its output: set apply_b_dec_to_input=False")
        if self.transcoder and self.normalize in ("layer_norm", "constant_norm_rescale"):
            raise OptionError(f"normalize={self.normalize!r} is undone on the output, which a transcoder has elsewhere")
        if self.transcoder and self.architecture == "top-afa":
            raise OptionError(
                "top-afa makes the code as long as what it reconstructs, and a transcoder does not see that"
            )
        if self.skip and not self.transcoder:
            raise OptionError("skip is for transcoders: around an autoencoder it would copy the input")
        for name in ("sparsity", "afa_weight", "aux_weight", "dead_after"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} must not be negative, as {getattr(self, name)} is")
        for name in ("bandwidth", "target_l0"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise OptionError(f"{name} must be positive, not {value}")

    @classmethod
    def usual(
        cls, architecture: str, d_in: int, *, d_sae: int | None = None, k: int | None = None, afa: str = "corrected", **options
    ) -> "SAEConfig":  # fmt: skip
        """What one would start with: inputs scaled to norm sqrt(d_in) on average, 8 latents per channel, k an eighth of them.

        Top-AFA takes k as its upper bound, if there is one; published to the letter, it sees layer-normed inputs. options: of the
        config.
        """
        own: dict = {"normalize": "expected_average_only_in"}
        if architecture in WITH_K:
            own["k"] = max(1, d_in // 8) if k is None else k
        if architecture == "top-afa":
            own |= {"k_max": k} if afa == "corrected" else {"normalize": "layer_norm"}
        width = 8 * d_in if d_sae is None else d_sae
        return cls(**{"architecture": architecture, "d_in": d_in, "d_sae": width, "afa": afa, **own, **options})

    @property
    def transcoder(self) -> bool:
        """Whether the target is another activation than the input."""
        return self.target_hook is not None or self.d_out is not None

    @property
    def faithful(self) -> bool:
        """Whether this is the published top-AFA, to the letter."""
        return self.architecture == "top-afa" and self.afa == "faithful"

    @property
    def out(self) -> int:
        """Channels of the output."""
        return self.d_out or self.d_in

    @property
    def levels(self) -> tuple[int, ...]:
        """Matryoshka's nested widths; of any other architecture all latents at once."""
        if self.architecture != "matryoshka":
            return (self.d_sae,)
        return self.widths or tuple(dict.fromkeys(max(1, self.d_sae >> shift) for shift in (4, 3, 2, 1, 0)))

    @property
    def n_aux(self) -> int:
        """Dead latents that AuxK lets speak."""
        return min(self.k_aux or max(1, self.d_in // 2), self.d_sae)
