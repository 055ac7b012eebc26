"""`SAE`: a sparse autoencoder or transcoder, ready to use.

    f = activation((x - b_dec) W_enc + b_enc)      xhat = f W_dec + b_dec   (+ x W_skip)

    sae = SAE.load("folder")                       # SAELens' format: cfg.json + sae_weights.safetensors
    f = sae.encode(x)                              # [token, latent]; sae.codes(x) has only what fires
    xhat = sae(x)

Inputs may be normalised (`config.normalize`) before the weights see them, and outputs back after; `folded()` gives the same
function with the scale and the decoder's norms inside the weights, which is what is saved. The encoder is held with one row per
latent, as the decoder is: `W_enc` is its transpose, in the field's layout.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interp.bundled import bundled_saes
from interp.errors import OptionError, one_of
from interp.features import activations
from interp.features.codes import Codes
from interp.features.config import SAEConfig
from interp.features.saelens_format import read_folder, write_folder


class SAE(nn.Module):
    """A sparse autoencoder made as `config` says, with random weights from `seed`; `SAE.load(folder)` for a trained one.

    Decoder rows start as random directions (of norm 1, or .1 where `unit_decoder` is off) and the encoder as the decoder's
    transpose; a transcoder's encoder starts independently. metadata: where it comes from, kept in its files.
    """

    def __init__(
        self, config: SAEConfig, *, seed: int | None = 0, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32, metadata: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config, self.metadata = config, dict(metadata or {})
        generator = None if seed is None else torch.Generator().manual_seed(seed)

        def directions(rows: int, columns: int) -> Tensor:
            if generator is None:  # weights that are about to be replaced
                return torch.empty(rows, columns, dtype=dtype, device=device)
            return F.normalize(torch.randn(rows, columns, generator=generator), dim=1).to(dtype)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        decoder = directions(config.d_sae, config.out) * (1.0 if config.unit_decoder else 0.1)
        self.W_dec = nn.Parameter(decoder.to(device))
        n_pre = config.d_sae if config.kron is None else config.kron[0] * sum(config.kron[1:])
        tied = config.kron is None and not config.transcoder
        self.encoder = nn.Parameter(self.W_dec.detach().clone() if tied else directions(n_pre, config.d_in).to(device))
        self.b_dec = zeros(config.out)
        if config.architecture == "gated":
            self.b_gate, self.b_mag, self.r_mag = zeros(config.d_sae), zeros(config.d_sae), zeros(config.d_sae)
        else:
            self.b_enc = zeros(n_pre)
        if config.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((config.d_sae,), config.threshold_init, device=device))
        if config.skip:
            self.W_skip = zeros(config.out, config.d_in)
        # float64 scalars: what batches teach (batchtopk's threshold), and the scale that inputs and targets are seen in
        for name, value in (("batch_threshold", 0.0), ("scale_in", 1.0), ("scale_out", 1.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64, device=device))
        self.requires_grad_(False)
        self.eval()

    def __repr__(self) -> str:
        c = self.config
        size = f"{c.d_in} -> {c.d_sae}" + (f" -> {c.out}" if c.transcoder else "")
        where = f" at {c.hook}" if c.hook else ""
        return f"SAE({c.architecture}{'' if c.k is None else f' k={c.k}'}, {size}{where})"

    @property
    def W_enc(self) -> Float[Tensor, "d_in n_pre"]:
        return self.encoder.T

    @property
    def hook(self) -> str | None:
        """The hook point that it reads."""
        return self.config.hook

    @property
    def n_features(self) -> int:
        """Latents: the name that all dictionaries share (`interp.features.codes.Dictionary`)."""
        return self.config.d_sae

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def norms(self) -> Float[Tensor, " latent"] | None:
        """Norms of decoder rows, by which latents are ranked; None where they are 1 (faithful top-AFA's are so only roughly)."""
        return None if self.config.unit_decoder and not self.config.faithful else self.W_dec.norm(dim=1)

    # ------------------------------------------------------------------------------------------- what the weights see

    def normalize(self, x: Float[Tensor, "token d_in"]) -> tuple[Float[Tensor, "token d_in"], tuple[Tensor, Tensor]]:
        """The inputs as the weights see them, and (factor, shift) that take outputs back."""
        kind = self.config.normalize
        if kind == "layer_norm":
            shift = x.mean(1, keepdim=True)
            factor = (x - shift).std(1, keepdim=True) + 1e-5
            return (x - shift) / factor, (factor, shift)
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        if kind == "constant_norm_rescale":
            factor = x.norm(dim=1, keepdim=True).clamp_min(1e-12) / x.shape[1] ** 0.5
            return x / factor, (factor, zero)
        return x * self.scale_in.to(x.dtype), (1 / self.scale_out.to(x.dtype), zero)

    @property
    def bias(self) -> Float[Tensor, " n_pre"]:
        """What is added to encoded inputs: of the published top-AFA nothing, whose encoder has a bias and leaves it unused."""
        if self.config.architecture == "gated":
            return self.b_gate
        return torch.zeros_like(self.b_enc) if self.config.faithful else self.b_enc

    @property
    def b_in(self) -> Float[Tensor, " d_in"] | None:
        """What is subtracted from the input before it is encoded."""
        return self.b_dec if self.config.apply_b_dec_to_input else None

    def pre_activations(
        self, x: Float[Tensor, "token d_in"], *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "token latent"]:
        """z of normalised inputs; a gated SAE's are its gate's. dtype: of the matrix product; z itself is like x."""
        bias = self.bias
        seen = x if self.b_in is None else x - self.b_in
        if dtype is None or dtype == x.dtype:
            z = F.linear(seen, self.encoder, bias)
        else:
            z = F.linear(seen.to(dtype), self.encoder.to(dtype)).to(x.dtype) + bias
        return z if self.config.kron is None else self.pair(z)

    def pair(self, z: Float[Tensor, "token n_pre"]) -> Float[Tensor, "token latent"]:
        """KronSAE: latent (head, i, j) is mAND(u_head,i, v_head,j)."""
        heads, m, n = self.config.kron
        u, v = z[:, : heads * m].unflatten(1, (heads, m, 1)), z[:, heads * m :].unflatten(1, (heads, 1, n))
        return activations.mand(u, v).flatten(1)

    def magnitudes(self, pre: Float[Tensor, "token latent"]) -> Float[Tensor, "token latent"]:
        """How strongly each latent would fire: z itself, and of a gated SAE its magnitude path."""
        if self.config.architecture != "gated":
            return pre
        return (pre - self.b_gate) * self.r_mag.exp() + self.b_mag

    # ------------------------------------------------------------------------------------------------------- using it

    def codes(self, x: Float[Tensor, "token d_in"], *, select: Literal["own", "afa"] = "own") -> Codes:
        """The latents that fire on each token; select="afa" lets top-AFA choose them, whatever the SAE was trained with."""
        one_of(select, ("own", "afa"), "way to select latents")
        self._check(x)
        x, _ = self.normalize(x)
        return self.select(x, self.pre_activations(x), afa=select == "afa")

    def select(self, x: Float[Tensor, "token d_in"], z: Float[Tensor, "token latent"], *, afa: bool = False) -> Codes:
        """The code at inference, given normalised inputs and their pre-activations."""
        config, norms = self.config, self.norms()
        kind = config.architecture
        if afa and config.transcoder:
            raise OptionError(
                "top-AFA makes the code as long as what it reconstructs, and a transcoder does not see that"
            )
        if afa or kind == "top-afa":
            length = (x if self.b_in is None else x - self.b_in).norm(dim=1)
            if config.faithful:
                return activations.afa(z, length, norms, sentinel=1e8)
            return activations.afa(self.magnitudes(z), length, norms, k_max=config.k_max)
        if kind == "topk":
            return activations.top_k(z, config.k, norms)
        if kind == "abstopk":
            return activations.abs_top_k(z, config.k, norms)
        if kind in ("batchtopk", "matryoshka"):
            return activations.above(z, self.batch_threshold.to(z.dtype), norms)
        if kind == "jumprelu":
            return activations.above(z, self.threshold.to(z.dtype))
        if kind == "gated":
            return Codes.where(z > 0, self.magnitudes(z).relu())
        return Codes.where(z > 0, z)

    def encode(
        self, x: Float[Tensor, "... d_in"], *, select: Literal["own", "afa"] = "own"
    ) -> Float[Tensor, "... latent"]:
        """The code of each activation, zeros included."""
        return self.codes(x.reshape(-1, x.shape[-1]), select=select).dense().reshape(*x.shape[:-1], self.config.d_sae)

    def decode(self, f: Float[Tensor, "... latent"]) -> Float[Tensor, "... d_out"]:
        """f W_dec + b_dec, in the scale of the data; a skip path, which needs the input, is `forward`'s alone.

        Raises `OptionError` if inputs are normalised by token, which cannot be undone here.
        """
        if self.config.normalize in ("layer_norm", "constant_norm_rescale"):
            raise OptionError(
                f"normalize={self.config.normalize!r} is undone with each token's own scale: call the SAE on inputs"
            )
        return (f @ self.W_dec + self.b_dec) / self.scale_out.to(f.dtype)

    def reconstruct(self, x: Float[Tensor, "token d_in"], codes: Codes) -> Float[Tensor, "token d_out"]:
        """xhat from codes of the inputs x, which a skip path and normalisation by token need as well."""
        seen, (factor, shift) = self.normalize(x)
        out = codes.decode(self.W_dec) + self.b_dec
        if self.config.skip:
            out = out + F.linear(seen, self.W_skip)
        return out * factor + shift

    def forward(
        self, x: Float[Tensor, "... d_in"], *, select: Literal["own", "afa"] = "own"
    ) -> Float[Tensor, "... d_out"]:
        """xhat."""
        flat = x.reshape(-1, x.shape[-1])
        return self.reconstruct(flat, self.codes(flat, select=select)).reshape(*x.shape[:-1], self.config.out)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_in:
            raise OptionError(f"this SAE reads {self.config.d_in} channels, and the activations have {x.shape[-1]}")

    # ------------------------------------------------------------------------------------------------ folding and files

    @torch.no_grad()
    def folded(self) -> "SAE":
        """The same function with input scale and decoder norms inside the weights.

        Scale: W_enc s_in, W_dec / s_out, b_dec / s_out, W_skip s_in / s_out; z and f stay. Norms n: W_dec / n, W_enc n and
        the encoder's biases and thresholds times n; f becomes f n. A kron encoder's norms stay where they are.
        """
        config = replace(
            self.config, normalize="none" if self.config.normalize.startswith("expected") else self.config.normalize
        )
        weights = {name: value.detach().clone() for name, value in self.state_dict().items()}
        s_in, s_out = weights["scale_in"].to(self.dtype), weights["scale_out"].to(self.dtype)
        if float(self.scale_in) != 1 or float(self.scale_out) != 1:
            weights["encoder"] *= s_in
            weights["W_dec"] /= s_out
            weights["b_dec"] /= s_out
            weights["batch_threshold"] /= weights["scale_out"]
            if config.skip:
                weights["W_skip"] *= s_in / s_out
            weights["scale_in"], weights["scale_out"] = torch.ones_like(self.scale_in), torch.ones_like(self.scale_out)
            config = replace(config, unit_decoder=False)
        if not config.unit_decoder and config.kron is None:
            n = weights["W_dec"].norm(dim=1)
            # a latent of norm 0 ranks last and keeps doing so: its encoder becomes 0, its decoder stays
            weights["W_dec"] /= torch.where(n > 0, n, 1.0)[:, None]
            weights["encoder"] *= n[:, None]
            for name in ("b_enc", "b_gate", "b_mag", "threshold"):
                if name in weights:
                    weights[name] *= n.to(weights[name].dtype)
            config = replace(config, unit_decoder=True)
        return SAE.of(config, weights, self.metadata)

    @classmethod
    def of(cls, config: SAEConfig, weights: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> "SAE":
        """An SAE from its state (`state_dict()`); the tensors become its own, without a second copy."""
        result = cls(config, seed=None, device="meta", metadata=metadata)
        result.load_state_dict(weights, assign=True)
        return result.requires_grad_(False)

    def save(self, folder: str | Path) -> Path:
        """Write SAELens' format, folded: `cfg.json` and `sae_weights.safetensors`. `load` gives `folded()` bit for bit."""
        folded = self.folded()
        return write_folder(folder, folded.config, folded.state_dict(), self.metadata)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str | None = None) -> "SAE":
        """Read a folder in SAELens' format, ours or SAELens' own, or a bundled one by name ("mini-gpt2/resid_post2").

        Raises `LoadError` naming what is missing or wrong.
        """
        return cls.of(*read_folder(bundled_saes().get(str(folder), folder), device=device))
