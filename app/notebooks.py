"""The lines of Python behind the pages Features and Neurons: given `interp` and `model`, they make the same numbers again."""

from app.dictionaries import N_CONTEXTS, SNMF, WINDOW, matrices
from app.steered import dictionary_code


def latent_code(source: str, n_texts: int, latent: int, *, writes: bool = True) -> str:
    """One latent's contexts and, where the way from it to the logits is fixed (`writes`), the tokens that it promotes."""
    lines = [*dictionary_code(source)]
    if not source.startswith(SNMF):  # an SNMF's own lines begin with these imports
        lines += ["from interp.bundled import bundled_text", "from interp.features.sources import read_texts", ""]
    lines += [
        f"texts = interp.Corpus.from_texts(model, read_texts(bundled_text())[:{n_texts}], name=bundled_text().name)",
        f"contexts = interp.top_contexts(model, dictionary, texts, n={N_CONTEXTS}, window={WINDOW})",
        f'print(contexts[contexts["latent"] == {latent}])',
    ]
    if writes and source.startswith(SNMF):
        lines.append(
            f"interp.direction_effects(model, dictionary.hook, dictionary.components_[{latent}:{latent + 1}], k=10)"
        )
    elif writes:
        lines.append(f"interp.logit_effects(model, dictionary, [{latent}], k=10)")
    return "\n".join(lines)


def neuron_code(
    model: str, place: tuple[int, int], *, prompt: str, value: float, site: str, search: str = "", matrix: str = "down",
    layer: int | None = None,
) -> str:  # fmt: skip
    """One neuron's tokens and what holding it at a value changes; with a token to search for, the search before them.

    place: (layer, neuron). value: as set on the page, at `site`. matrix, layer: where the search looks.
    """
    which = f"matrix={matrices(model)!r}"
    lines = []
    if search:
        layers = "" if layer is None else f"layers=[{layer}], "
        lines = [f"neurons = interp.decode_neurons(model, {which}, {layers}k=8, kurtosis=True)",
                 f"print(interp.find_neurons(neurons, {search!r}, matrix={matrix!r}, k=None))"]  # fmt: skip
    one, neuron = place
    return "\n".join([
        *lines,
        f"print(interp.decode_neurons(model, {which}, layers=[{one}], neurons=[{neuron}], k=10, kurtosis=True))",
        f"interp.clamp_effect(model, {prompt!r}, {{({one}, {neuron}): {value!r}}}, site={site!r}, k=10)",
    ])  # fmt: skip
