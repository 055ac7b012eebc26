"""`load_model`: a bundled name, a local folder or a hub name becomes a canonical `Transformer` that has proved itself.

TransformerLens' TransformerBridge loads the model; `interp.model.read` takes its configuration and views of its
weights; then both run on a random prompt and every hook value they share must agree, in the order of the forward pass,
and the logits too. A model that does not reproduce its original is refused, with the name of the first hook that
differs. The bridge is then let go: the weights stay where they were loaded.
"""

import contextlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from interp.bundled import bundled_models
from interp.errors import LoadError
from interp.model.read import check_supported, read_config, read_weights
from interp.model.transformer import Transformer

# How far a canonical value may be from the original's: |ours - theirs| / |theirs|, both as vectors. Float64 is not tighter
# than float32, since the originals compute norms, softmax and rotary angles in float32 whatever the model's dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}


def load_model(
    name_or_path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Transformer:  # fmt: skip
    """Load a model as a canonical `Transformer`, checked against the original.

    name_or_path: a bundled model ("mini-gpt2"), a folder in Hugging Face's layout, or a hub name ("gpt2").
    device: None means torch's current default device (the CPU unless you changed it).
    dtype: None means the dtype of the checkpoint.

    Raises `UnsupportedModel` for architectures the canonical transformer does not cover and `LoadError` for
    everything else that is wrong with the model, its files or the network.
    """
    path = _resolve(name_or_path)
    device, dtype = _device(device), _dtype(dtype)
    bridge = _boot(str(name_or_path), path, device=device, dtype=dtype, revision=revision)
    commit = getattr(bridge.original_model.config, "_commit_hash", None) or revision
    cfg = read_config(bridge, str(name_or_path) if path is None else path.name, commit)
    model = Transformer(cfg, read_weights(bridge, cfg), bridge.tokenizer)
    verify(model, bridge)
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.get_default_device()
    try:
        return torch.device(device)
    except RuntimeError:
        raise LoadError(f"{device!r} is not a torch device: write cpu, cuda, cuda:1, mps, ...") from None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named is not None and isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    if dtype is None:
        return None
    raise LoadError(f"{dtype!r} is not a floating-point dtype of torch: write float32, bfloat16, ...")


def _resolve(name_or_path: str | Path) -> Path | None:
    """The folder to load from, or None for a hub name."""
    bundled = bundled_models()
    if str(name_or_path) in bundled:
        return bundled[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"{path} has no config.json: not a model folder")
        return path
    if path.exists():
        raise LoadError(f"{path} is a file; a model is a folder with config.json, weights and a tokenizer")
    if str(name_or_path).count("/") > 1 or str(name_or_path).startswith((".", "/", "~")):
        raise LoadError(f"no folder {name_or_path} (bundled models: {', '.join(bundled) or 'none'})")
    return None


def _boot(name: str, path: Path | None, *, device, dtype, revision):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = name if path is None else str(path)
    where = {"revision": revision} if revision else {}
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(source, **where)
            check_supported(config)
            dtype = dtype or getattr(config, "dtype", None) or torch.float32
            hf_model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager", output_loading_info=True, **where
            )
            # from_pretrained fills what a file lacks with random numbers and goes on
            if absent := sorted(info["missing_keys"]) + sorted(map(str, info.get("mismatched_keys", ()))):
                raise LoadError(f"{source} lacks {len(absent)} weights its configuration asks for, first {absent[0]}")
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
                raise LoadError(f"{source} has no tokenizer: its files are missing or hold no vocabulary")
            from transformer_lens.model_bridge import TransformerBridge

            bridge = TransformerBridge.boot_transformers(
                source, hf_model=hf_model.to(device).eval(), tokenizer=tokenizer, device=str(device), dtype=dtype,
            )  # fmt: skip
    except LoadError:
        raise
    except json.JSONDecodeError as error:
        raise LoadError(f"{source}: config.json or tokenizer is not valid JSON ({error})") from error
    except Exception as error:
        # Loading runs three libraries' code on files we did not write; whatever it raises is about those files.
        raise LoadError(_explain(name, path, error)) from error
    return bridge


def _explain(name: str, path: Path | None, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if path is not None:
        return f"{path} cannot be loaded ({type(error).__name__}: {reason[:400]})"
    return (
        f"{name!r} is neither a bundled model ({', '.join(bundled_models()) or 'none'}) nor a local folder, and the hub "
        f"did not give it ({type(error).__name__}: {reason[:400]}); check the name and the network, or download the "
        "model and pass its folder"
    )


@contextlib.contextmanager
def quiet_libraries():
    """Silence transformers' progress bars and notices inside the block only."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def run_both(model: Transformer, bridge, tokens: Tensor):
    """((logits, values by hook name) of the canonical model, the same of the bridge)."""
    logits, ours = model.run_with_cache(tokens, return_cache_object=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # some listed hook points raise when a hook is added unless a flag is set, so only ask for those we share
        listed = set(bridge.hook_dict) & set(ours)
        for part in bridge.modules():  # the bridge misses the eps of some families (norm_epsilon) and uses its own
            if hasattr(getattr(part, "config", None), "eps"):
                part.config.eps = model.cfg.eps
        original, theirs = bridge.run_with_cache(tokens, names_filter=lambda n: n in listed, return_cache_object=False)
    return (logits, ours), (original, theirs)


def verify(model: Transformer, bridge, *, tolerance: float | None = None, seed: int = 0) -> dict[str, float]:
    """Compare canonical and original on a random prompt; the relative difference by hook name, `logits` last.

    A difference is |ours - theirs| / |theirs| (Euclidean, over all entries); masked attention scores are left out, since
    implementations write different large negative numbers there. Raises `LoadError` naming the first hook, in forward
    order, whose difference exceeds `tolerance` (default: by dtype, see `TOLERANCE`).
    """
    cfg, tolerance = model.cfg, tolerance or TOLERANCE.get(model.dtype, 1e-4)
    length = min(cfg.n_ctx, 12)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(cfg.d_vocab, (2, length), generator=generator).to(model.device)
    (logits, ours), (original, theirs) = run_both(model, bridge, tokens)
    differences = {}
    for name, value in [*ours.items(), ("logits", logits)]:
        other = original if name == "logits" else _comparable(name, theirs)
        if other is None:
            continue
        differences[name] = worst = _difference(value, other)
        if not worst <= tolerance:
            raise LoadError(
                f"{cfg.name} ({cfg.family}) does not reproduce its original: the first difference is at {name} "
                f"({worst:.2g} relative, allowed {tolerance:.0e}); please report this model"
            )
    return differences


def _comparable(name: str, theirs: dict[str, Tensor]) -> Tensor | None:
    """The bridge's value under this name in our layout; None where it has no such value."""
    value = theirs.get(name)
    if value is None:
        return None
    if name.endswith("hook_attn_scores") and torch.equal(
        value, theirs.get(name.replace("attn_scores", "pattern"), value[:0])
    ):
        return None  # families whose attention the bridge leaves native: it hands out the pattern under both names
    if "q_norm" in name or "k_norm" in name:
        return value.transpose(1, 2) if value.ndim == 4 else value  # [batch, head, position, .] there
    return value


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if theirs.shape == ours.flatten(0, 1).shape:  # OPT's code runs its MLP on all positions of all prompts in one row
        theirs = theirs.reshape(ours.shape)
    if ours.shape != theirs.shape:
        return float("inf")
    wide = torch.promote_types(ours.dtype, torch.float32)
    a, b = ours.to(wide), theirs.to(wide)
    seen = ~torch.isneginf(a)  # masked attention scores: -inf here, some other very negative number there
    a, b = a[seen], b[seen]
    return ((a - b).norm() / b.norm().clamp_min(torch.finfo(wide).tiny)).item()
