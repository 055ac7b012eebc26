"""interp: find out how a language model does what it does. The public names; each is imported when first used."""

import importlib

_HOME = {
    "load_model": "interp.model.load",
    "bundled_models": "interp.bundled",
    "Transformer": "interp.model.transformer",
    "ModelConfig": "interp.model.config",
    "Rules": "interp.rules",
    "PromptPairs": "interp.tasks.pairs",
    "load_task": "interp.tasks.named",
    "corrupt": "interp.tasks.corrupt",
    "METRICS": "interp.metrics",
    "activation_patching": "interp.patching",
    "edge_patching": "interp.circuits.exact",
    "attribution": "interp.node_attribution",
    "integrated_gradients": "interp.paths",
    "site_secants": "interp.paths",
    "atp_star": "interp.atp",
    "direct_logit_attribution": "interp.lens",
    "logit_lens": "interp.lens",
    "token_relevance": "interp.relevance",
    "norm_x_logit": "interp.relevance",
    "token_heatmap": "interp.token_plots",
    "compare": "interp.agreement",
    "spot_check": "interp.checking",
    "get_rules": "interp.rules",
    "node_faithfulness": "interp.circuits.node_faithfulness",
    "Circuit": "interp.circuits.circuit",
    "edge_scores": "interp.circuits.edges",
    "check_edges": "interp.circuits.checking",
    "acdc": "interp.circuits.search",
    "eliminate": "interp.circuits.search",
    "learn_mask": "interp.circuits.learned",
    "faithfulness": "interp.circuits.evaluate",
    "faithfulness_curve": "interp.circuits.evaluate",
    "smallest_circuit": "interp.circuits.evaluate",
    "completeness": "interp.circuits.evaluate",
    "minimality": "interp.circuits.evaluate",
    "check_sign": "interp.circuits.evaluate",
    "auroc": "interp.circuits.similarity",
    "compare_circuits": "interp.circuits.similarity",
    "stability": "interp.circuits.similarity",
    "SAE": "interp.features.sae",
    "load_sae": "interp.features.belonging",
    "check_belongs": "interp.features.belonging",
    "SAEConfig": "interp.features.config",
    "Training": "interp.features.train",
    "train_sae": "interp.features.train",
    "train_saes": "interp.features.train",
    "evaluate_sae": "interp.features.evaluate",
    "Corpus": "interp.features.sources",
    "ModelSource": "interp.features.sources",
    "cache_activations": "interp.features.cache",
    "top_contexts": "interp.features.contexts",
    "logit_effects": "interp.features.effects",
    "Edit": "interp.features.splice",
    "spliced": "interp.features.splice",
    "feature_attribution": "interp.features.attribution",
    "feature_patching": "interp.features.attribution",
    "feature_circuit": "interp.features.circuits",
    "ITDA": "interp.factorize.itda",
    "fit_itda": "interp.factorize.itda",
    "bundled_saes": "interp.bundled",
    "discover": "interp.discovery",
    "Discovery": "interp.discovery",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'interp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
