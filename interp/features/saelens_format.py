"""SAELens' file format, both ways: a folder with `cfg.json` and `sae_weights.safetensors` (as SAELens 6.54.12 writes them).

    cfg.json                  architecture, d_in, d_sae, dtype, ... , metadata {model_name, hook_name, ...}, interp {...}
    sae_weights.safetensors   W_enc (d_in, h)   W_dec (h, d_out)   b_enc (h)   b_dec (d_out)   and what the architecture adds

What is written has the decoder's norms n and the input's scale s folded in, so that a reader needs to know of neither:

    W_enc <- s n W_enc      W_dec <- W_dec / (n s)      b_enc, theta <- n b_enc, n theta      b_dec <- b_dec / s

SAELens reads standard, gated, topk, abstopk and jumprelu as what they are. Of batchtopk and matryoshka it gets a jumprelu with
their one threshold for every latent, as in its own inference saves. Transcoders become transcoder, skip_transcoder,
jumprelu_transcoder or jumprelu_skip_transcoder. What SAELens lacks has the same files and keys under a name that it refuses:
top_afa, kron_topk (and other kron_...; W_enc has a column per projection), topk_transcoder, topk_skip_transcoder, gated_....

`interp` in cfg.json holds our whole `SAEConfig`: with it a folder gives back what was saved, bit for bit; SAELens ignores it (and
refuses tensors that it does not know, so everything else about an SAE has to stand in the metadata). Folders without it are read
by SAELens' keys alone, which do not say how the SAE was trained.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.errors import LoadError, OptionError, one_of
from interp.features.config import SAEConfig
from interp.files import check_writable, write_atomically

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
SAELENS_VERSION = "6.54.12"  # of the format; below 6, or without it, SAELens takes cfg.json for one of its old ones

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BATCH = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}  # ours -> SAELens' name for it
_KNOWN = (
    "standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk", "transcoder", "skip_transcoder",
    "jumprelu_transcoder", "jumprelu_skip_transcoder",
)  # fmt: skip
# what SAELens before 6 had beside the architecture's own keys, and now has under "metadata"
_OLD_METADATA = (
    "model_name", "hook_name", "hook_name_out", "hook_head_index", "hook_head_index_out", "model_class_name",
    "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice",
    "dataset_path", "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- writing


def write_folder(
    folder: str | Path, config: SAEConfig, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write a folded SAE's state (`SAE.folded().state_dict()`) to a folder, which is made if need be, and return the folder.

    A new folder appears whole; in one that exists, our two files are replaced, each at once, and others left alone.
    Raises `OptionError` where the weights are not folded, a dtype has no name in the format, metadata is not of JSON's types, or
    the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file, and a sparse autoencoder is saved as a folder")
    if not folder.exists():
        check_writable(folder)
    scaled = any(float(weights[name]) != 1 for name in ("scale_in", "scale_out"))
    if scaled or config.normalize == "expected_average_only_in" or not (config.unit_decoder or config.kron):
        raise OptionError("only folded weights can be saved, and these have a scale or norms beside them: use SAE.save")
    cfg = _cfg(config, weights, metadata)
    # the digest ties the two files together: half of one save is not read with half of another
    about = {"interp": _digest(cfg["interp"])}
    beside = folder if folder.exists() else folder.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{folder.name}.") as temporary:
        fresh = Path(temporary) / folder.name
        fresh.mkdir()
        write_atomically(fresh / CONFIG, json.dumps(cfg, indent=2) + "\n")
        save_file(_named(config, weights), fresh / WEIGHTS, metadata=about)
        shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)  # safetensors makes its files private
        if not folder.exists():
            fresh.rename(folder)
        else:
            for name in (WEIGHTS, CONFIG):
                os.replace(fresh / name, folder / name)
    return folder


def saelens_name(config: SAEConfig) -> str:
    """The architecture that cfg.json names: SAELens' where it has such a thing, else one that SAELens refuses."""
    base = config.architecture.replace("-", "_")
    if config.kron is not None:
        base = f"kron_{base}"
    elif config.architecture in _BATCH:
        base = "jumprelu"
    if not config.transcoder:
        return base
    return ("" if base == "standard" else f"{base}_") + ("skip_" if config.skip else "") + "transcoder"


def _cfg(config: SAEConfig, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    if (dtype := weights["W_dec"].dtype) not in names:
        raise OptionError(f"SAELens' format has no name for {dtype}: use one of {', '.join(_DTYPES)}")
    facts = {**metadata, "sae_lens_version": SAELENS_VERSION}
    facts.setdefault("sae_lens_training_version", None)
    hooks = {"hook_name": config.hook, "hook_name_out": config.target_hook}
    facts |= {key: hook for key, hook in hooks.items() if hook is not None}
    trained_as = facts.get("training_architecture") or config.architecture
    facts["training_architecture"] = _BATCH.get(trained_as, trained_as)
    if config.architecture in _BATCH:
        details = {"matryoshka_widths": list(config.levels)} if config.architecture == "matryoshka" else {}
        facts.setdefault("training_architecture_details", {"k": config.k, **details})
    heads_apart = not config.transcoder and str(facts.get("hook_name")).endswith("hook_z")
    reshape = facts.pop("reshape_activations", "hook_z" if heads_apart else "none")
    for key, value in facts.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise OptionError(f"metadata[{key!r}] is a {type(value).__name__}, which JSON cannot hold") from None
    cfg = {
        "architecture": saelens_name(config), "d_in": config.d_in, "d_sae": config.d_sae, "dtype": names[dtype], "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input, "normalize_activations": config.normalize,
        "reshape_activations": reshape,
    }  # fmt: skip
    if config.architecture in ("topk", "abstopk"):
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.transcoder:
        cfg["d_out"] = config.out
    # float64 numbers survive JSON; the threshold tensor beside it is rounded to the weights' dtype, as SAELens' is
    ours = {"config": asdict(config), "batch_threshold": float(weights["batch_threshold"])}
    return {**cfg, "metadata": facts, "interp": ours}


def _named(config: SAEConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the file has them."""
    tensors = {name: weights[name] for name in _shapes(config, saelens_name(config)) if name in weights}
    tensors["W_enc"] = weights["encoder"].T
    if config.architecture in _BATCH and config.kron is None:
        tensors["threshold"] = weights["batch_threshold"].to(weights["b_enc"].dtype).expand(config.d_sae)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _shapes(config: SAEConfig, name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture of cfg.json."""
    n_pre = config.d_sae if config.kron is None else config.kron[0] * sum(config.kron[1:])
    shapes = {"W_enc": (config.d_in, n_pre), "W_dec": (config.d_sae, config.out), "b_dec": (config.out,)}
    own = ("b_gate", "b_mag", "r_mag") if config.architecture == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(own, (n_pre,))
    if name.startswith("jumprelu"):
        shapes["threshold"] = (config.d_sae,)
    if name in _BATCH.values():
        shapes["topk_threshold"] = ()
    if config.skip:
        shapes["W_skip"] = (config.out, config.d_in)
    return shapes


def _digest(ours: Any) -> str:
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


def read_folder(
    folder: str | Path, *, device: torch.device | str | None = None
) -> tuple[SAEConfig, dict[str, Tensor], dict[str, Any]]:
    """(config, state for `SAE.of`, metadata) of a folder in SAELens' format. device: of the tensors, default the CPU.

    Ours come as they were saved. SAELens' come as the function that SAELens computes: decoder norms are folded in where it
    ranks by them (`rescale_acts_by_decoder_norm`) and otherwise left as they are, with unit_decoder=True for a topk, which then
    does not rank by them; a batchtopk's training save that does not comes as a jumprelu. A `scaling_factor` in the folder's
    activation_scaler.json is folded in; an input scale that the folder does not hold is taken as 1, as SAELens does, with a
    warning.
    Raises `LoadError` naming the file, and the field or tensor of it, that is missing, wrong, or of a kind that interp lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}")
    cfg = _Fields(folder / CONFIG)
    tensors, digest = _read_tensors(folder / WEIGHTS, device)
    if "interp" not in cfg.values:
        return _theirs(folder, cfg, tensors)
    ours = cfg.inside("interp")
    if digest != _digest(ours.values):
        raise LoadError(f"{folder / WEIGHTS} is not the file that {CONFIG} was written with: save it again")
    return _ours(folder, cfg, ours, tensors)


class _Fields:
    """The fields of cfg.json; one that is missing or of another type is a `LoadError` naming it and the file."""

    def __init__(self, path: Path, values: Any = None, prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix
        if values is None:
            try:
                self.values = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise LoadError(f"{path.parent} holds no sparse autoencoder: it has no {path.name}") from None
            except ValueError as error:
                raise LoadError(f"{path} is not JSON: {error}") from None
        if not isinstance(self.values, dict):
            raise LoadError(f"{prefix.rstrip('.') or 'the content'} of {path} must be an object")

    def get(self, name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        if name not in self.values:
            if default:
                return default[0]
            raise LoadError(f"{self.path} lacks the field {self.prefix}{name}")
        value = self.values[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise LoadError(f"{self.prefix}{name} in {self.path} must be {wanted}, not {value!r}")
        return value

    def inside(self, name: str) -> "_Fields":
        return _Fields(self.path, self.get(name, dict), f"{self.prefix}{name}.")


def _read_tensors(path: Path, device: torch.device | str | None) -> tuple[dict[str, Tensor], str | None]:
    if not path.is_file():
        raise LoadError(f"{path.parent} holds no weights: it has no {path.name}")
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("interp")  # noqa: SIM118
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged: {error}") from None


def _ours(
    folder: Path, cfg: _Fields, ours: _Fields, tensors: dict[str, Tensor]
) -> tuple[SAEConfig, dict[str, Tensor], dict[str, Any]]:
    said = ours.inside("config")
    values = {field.name: said.get(field.name, object) for field in fields(SAEConfig)}
    if unknown := sorted(said.values.keys() - values.keys()):
        raise LoadError(f"{cfg.path} has a field that this interp does not know: interp.config.{unknown[0]}")
    for name in ("widths", "kron"):
        values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    config = _config(cfg.path, values)
    _check_tensors(folder, tensors, _shapes(config, saelens_name(config)))
    state = _state(config, tensors, ours.get("batch_threshold", (int, float)))
    return config, state, _metadata(cfg, cfg.inside("metadata").values)


def _theirs(
    folder: Path, cfg: _Fields, tensors: dict[str, Tensor]
) -> tuple[SAEConfig, dict[str, Tensor], dict[str, Any]]:
    cfg = _modernised(cfg)
    name = cfg.get("architecture", str)
    if name not in _KNOWN:
        raise LoadError(
            f"{cfg.path} is of architecture {name!r}, which interp does not read (it reads {', '.join(_KNOWN)})"
        )
    normalize = cfg.get("normalize_activations", str)
    if normalize == "covariance_whitening":
        raise LoadError(
            f"{cfg.path} has normalize_activations covariance_whitening, which interp does not read: fold it first"
        )
    facts = _metadata(cfg, cfg.get("metadata", dict, {}))
    base = re.sub(r"_?(skip_)?transcoder$", "", name) or "standard"
    values = {
        "architecture": {theirs: ours for ours, theirs in _BATCH.items()}.get(base, base),
        "d_in": cfg.get("d_in", int),
        "d_sae": cfg.get("d_sae", int),
        "hook": facts.get("hook_name"),
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", bool),
        "normalize": "none" if normalize == "expected_average_only_in" else normalize,
        "unit_decoder": False,
    }
    if name.endswith("transcoder"):
        skip = name.endswith("skip_transcoder")
        values |= {"d_out": cfg.get("d_out", int), "target_hook": facts.get("hook_name_out"), "skip": skip}
    ranked_by_norms = False
    if base in ("topk", "abstopk"):
        ranked_by_norms = cfg.get(
            "rescale_acts_by_decoder_norm", bool, False
        )  # older files lack it, and this is what it was
        values |= {"k": cfg.get("k", int), "unit_decoder": True}
    elif base in _BATCH.values():
        ranked_by_norms = cfg.get("rescale_acts_by_decoder_norm", bool)
        values |= {"k": max(1, round(cfg.get("k", (int, float)))), "unit_decoder": ranked_by_norms}
        if base != "batchtopk":
            widths = cfg.get("matryoshka_widths", list)
            values["widths"] = tuple(dict.fromkeys([*widths, values["d_sae"]]))
    config = _config(cfg.path, values)
    _check_old_tensors(folder, tensors)
    _check_tensors(folder, tensors, _shapes(config, name))
    threshold = tensors.get("topk_threshold", torch.zeros(())).double()
    dtype = _DTYPES[one_of(cfg.get("dtype", str).removeprefix("torch."), _DTYPES, f"dtype of {cfg.path}", LoadError)]
    for key, tensor in tensors.items():  # thresholds are float32 at least, whatever the weights are
        tensors[key] = tensor.to(torch.promote_types(dtype, torch.float32) if key == "threshold" else dtype)
    if normalize == "expected_average_only_in" and (scale := _scale(folder)) is not None:
        tensors["W_enc"] *= scale
        tensors["W_dec"] /= scale
        tensors["b_dec"] /= scale
        threshold = threshold / scale if ranked_by_norms else threshold
    if ranked_by_norms:
        n = tensors["W_dec"].norm(dim=1)
        n = torch.where(n > 0, n, 1.0)
        tensors["W_dec"] /= n[:, None]
        tensors["W_enc"] *= n
        tensors["b_enc"] *= n
    elif base in _BATCH.values():
        tensors["threshold"] = torch.full((config.d_sae,), float(threshold), device=threshold.device)
        config = _config(cfg.path, {**values, "architecture": "jumprelu", "k": None, "widths": ()})
    return config, _state(config, tensors, float(threshold)), facts


def _modernised(cfg: _Fields) -> _Fields:
    """cfg.json of SAELens before 6 with the names and defaults that SAELens 6 reads it with."""
    inside = cfg.get("metadata", dict, {})
    version = re.match(r"\d+", str(cfg.values.get("sae_lens_version") or inside.get("sae_lens_version")))
    if version is not None and int(version[0]) >= 6:
        return cfg
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    old = _Fields(cfg.path, {renamed.get(name, name): value for name, value in cfg.values.items()})
    activation = old.get("activation_fn", str, "relu")
    if activation not in ("relu", "topk"):
        raise LoadError(f"{cfg.path} has the activation function {activation!r}, which interp does not read")
    new = {"architecture": "standard", "apply_b_dec_to_input": True, **old.values}
    if activation == "topk":
        new |= {"architecture": "topk", "k": old.inside("activation_fn_kwargs").get("k", int)}
    normalize = new.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in (new.get("hook_name") or "") else "none")
    new["metadata"] = {**inside, **{name: new[name] for name in _OLD_METADATA if name in new}}
    return _Fields(cfg.path, new)


def _metadata(cfg: _Fields, facts: dict[str, Any]) -> dict[str, Any]:
    """How heads were laid out is a fact about where activations come from, not about the function."""
    reshape = cfg.get("reshape_activations", str, "none")
    return dict(facts) if reshape == "none" else {**facts, "reshape_activations": reshape}


def _config(path: Path, values: dict[str, Any]) -> SAEConfig:
    try:
        return SAEConfig(**values)
    except (OptionError, TypeError, ValueError) as error:  # a wrong type is found where it is first compared
        raise LoadError(f"{path} describes no sparse autoencoder of interp: {error}") from None


def _check_old_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Names of older files."""
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors and not torch.allclose(f := tensors.pop("scaling_factor"), torch.ones_like(f)):
        raise LoadError(f"scaling_factor in {folder / WEIGHTS} is not 1, and SAELens 6 has no such factor any more")


def _check_tensors(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    path = folder / WEIGHTS
    if missing := [name for name in shapes if name not in tensors]:
        raise LoadError(f"{path} lacks the tensor {', '.join(missing)}")
    if surplus := sorted(tensors.keys() - shapes.keys()):
        raise LoadError(f"{path} has a tensor that the architecture of {CONFIG} has no use for: {', '.join(surplus)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise LoadError(
                f"{name} in {path} has shape {list(tensors[name].shape)}, and by {CONFIG} it is {list(shape)}"
            )


def _scale(folder: Path) -> float | None:
    """What inputs were multiplied by in training: SAELens' checkpoints have it beside the weights, until it is folded in."""
    if (folder / SCALER).is_file():
        return float(_Fields(folder / SCALER).get("scaling_factor", (int, float)))
    warnings.warn(
        f"{folder / CONFIG} was trained on inputs of mean norm sqrt(d_in), and the scale that does it is not in the folder: "
        "it is taken as 1",
        stacklevel=4,
    )
    return None


def _state(config: SAEConfig, tensors: dict[str, Tensor], batch_threshold: float) -> dict[str, Tensor]:
    state = {name: tensors[name] for name in tensors if name not in ("W_enc", "threshold", "topk_threshold")}
    state["encoder"] = tensors["W_enc"].T.contiguous()
    if config.architecture == "jumprelu":
        state["threshold"] = tensors["threshold"]
    for name, value in (("batch_threshold", batch_threshold), ("scale_in", 1.0), ("scale_out", 1.0)):
        state[name] = torch.tensor(value, dtype=torch.float64, device=state["W_dec"].device)
    return state
