"""The corpus that the bundled models are trained on, made up as it goes.

A window is `<|endoftext|>` and then short texts one after the other until it is full: sentences of the seven tasks,
plain filler with the same words in other roles, repeated random tokens, Python functions with docstrings. Window i of
step s is the same on every machine for a given seed. Each text is a list of parts `(text, weight)`: a task's answer
weighs `ANSWER_WEIGHT` in the loss, anything else 1.

    >>> [part for part, _ in sentence("capitals", random.Random(3))]          # doctest: +SKIP
    ['The capital of Peru is', ' Lima', '.']

What the figures in the model cards are measured on never occurs here. The `*_held_out` functions say what that is;
`evaluate_mini.py` asks the same functions, so training and measurement cannot drift apart.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts run from a checkout, installed or not

from interp.tasks import capitals, docstring, gendered_pronoun, greater_than, induction, ioi, subject_verb, words

END, UNKNOWN = "<|endoftext|>", "<unk>"
# What cannot be predicted only adds noise to the gradient, and what only a circuit can predict is rare: so they weigh
# less and more. With all weights 1 the same models sit at chance on induction and IOI for thousands of steps.
ANSWER_WEIGHT, REPEAT_WEIGHT, RANDOM_WEIGHT = 10.0, 5.0, 0.1
Part = tuple[str, float]

# How often each kind of text is drawn. Greater-than is the hardest (a hundred cut-offs to learn), so it gets a lot.
SHARES = {
    "ioi": 18,
    "greater_than": 20,
    "capitals": 8,
    "gendered_pronoun": 9,
    "subject_verb": 12,
    "induction": 6,
    "random_tokens": 7,
    "docstring": 7,
    "filler": 17,
}

# The last part of the training has more of what is learned last: the order of years and copying names.
FINAL_SHARES = SHARES | {"ioi": 26, "greater_than": 24, "induction": 12, "capitals": 5, "docstring": 5, "filler": 10}

# ---------------------------------------------------------------- held out


def _in_share(share: float, *key: object) -> bool:
    """True for a fixed pseudo-random `share` of all keys."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


# These names are trained in filler, pronoun and repeated-word texts, never where someone gives something to someone.
IOI_HELD_OUT_NAMES = ("Mary", "Laura", "Rachel", "Claire", "Olivia", "John", "Paul", "Simon", "Henry", "Scott")
IOI_HELD_OUT_PLACES = ("store", "museum", "castle")
IOI_HELD_OUT_OBJECTS = ("drink", "camera", "cake")
IOI_HELD_OUT_WORDINGS = {(0, 0), (4, 3)}  # these openers and clauses meet others in training, not each other


def ioi_held_out(first: str, second: str) -> bool:
    """Ordered pairs of names (as they stand in the opener): those with a held-out name, and 12 % of the others."""
    return first in IOI_HELD_OUT_NAMES or second in IOI_HELD_OUT_NAMES or _in_share(0.12, "ioi", first, second)


def greater_than_held_out(event: str, century: int, year: int) -> bool:
    """15 % of the combinations of event, century and the start year's last two digits, in every wording."""
    return _in_share(0.15, "greater_than", event, century, year)


def capitals_held_out(country: str, wording: str) -> bool:
    """25 % of the combinations of a country and a wording of the task; no country is held out in all wordings."""
    return wording in capitals.TEMPLATES and _in_share(0.25, "capitals", country, wording)


def gendered_pronoun_held_out(name: str, wording: str) -> bool:
    """25 % of the combinations of a name and a wording of the task."""
    return wording in gendered_pronoun.TEMPLATES and _in_share(0.25, "pronoun", name, wording)


def subject_verb_held_out(subject: str, attractor: str) -> bool:
    """15 % of the ordered pairs of subject and attractor (as singular words), in every wording and number."""
    return _in_share(0.15, "subject_verb", subject, attractor)


def docstring_held_out(documented: str, answer: str) -> bool:
    """10 % of the ordered pairs of the argument documented last and the one that follows."""
    return _in_share(0.10, "docstring", documented, answer)


# ---------------------------------------------------------------- wordings beyond the tasks' own

EXTRA_OPENERS = (
    "{a} and {b} were at the {place} today.",
    "This morning {a} and {b} went to the {place}, and",
    "When {a} saw {b} near the {place},",
    "Once {a} and {b} had found the {place},",
    "{a} went to the {place} with {b}.",
)
EXTRA_GIVES = (
    "{s} gave the {object} to",
    "{s} wanted to give a {object} to",
    "{s} sold a {object} to",
    "{s} quickly handed the {object} to",
    "{s} said hello to",
)
BETWEEN = ("It was a good day.", "The {place} was very old.", "The {noun} was not there.", "They saw a {object}.")
AFTER_IOI = (".", " and went home.", " near the {place}.", " because it was late.", ".")

EXTRA_GREATER_THAN = (
    "In {century}{yy} the {event} began and it lasted until {century}",
    "After the year {century}{yy} the {event} went on to {century}",
    "The {event} was long, from {century}{yy} to {century}",
    "The {noun} wrote about the {event} from {century}{yy} until the year {century}",
)
EXTRA_CAPITALS = (
    "The main city of {country} is",
    "The train to the capital of {country} goes to",
    "My friend from {country} lives in the capital,",
    "The king of {country} lives in",
)
EXTRA_PRONOUNS = (
    "{name} is tired, isn't",
    "{name} was late because",
    "When {name} is at the {place},",
    "The {noun} asked {name} if",
    "{name} lost a {object} when",
    "{name} took the {object} and then",
)
AFTER_PRONOUN = {
    "n't": "?",
    "because": " was tired.",
    ",": " was tired.",
    "that": " was late.",
    "if": " was there.",
    "when": " was late.",
    "then": " went home.",
}
EXTRA_SUBJECT_VERB = (
    ("The {subject} that the {attractor} saw", subject_verb.IS),
    ("I think the {subject} {preposition} the {attractor}", subject_verb.IS),
    ("Long ago the {subject} {preposition} the {attractor}", subject_verb.WAS),
    ("Since then the {subject} {preposition} the {attractor}", subject_verb.HAS),
)
ADJECTIVES = ("old", "new", "small", "big", "good", "ready", "lost", "late", "tired", "great", "long", "clean")

FILLER = (
    "{n} lost {her} {object} near the {place}.",
    "{n} met {m} at the {place}.",
    "{n} and {m} walked to the {place}. They were {adjective}.",
    "{n} went to the {place}. {She} had a {object}.",
    "{n} took {her} {object} from the {place} and went home.",
    "It was a {adjective} day at the {place}.",
    "In {century}{yy} the {noun} saw {n} near the {place}.",
    "{n} is from {country}. {She} lives near {capital}.",
    "{n} has {century} {nouns}.",
    "The {noun} is {adjective}. The {nouns} are {adjective}.",
    "The {nouns} were {adjective} but the {noun} was {adjective}.",
    "My name is {n}, said {n}.",
    "{n} called {m}. Then {m} called {n}.",
    "{capital} is a {adjective} city in {country}.",
    "{n} read about {country} in a {adjective} book.",
    "The {common} and the {common} were near the {place}.",
    "{n} saw the {common}. {She} was {adjective}.",
    "The {event} of {century}{yy} was {adjective}.",
    "{n} said that {m} was {adjective}.",
    "Today {n} is at the {place} with {her} friend {m}.",
    "I think that {n} was with {m}, but {m} was with {n}.",
    "The {place} is near the {place}, isn't it?",
    "{n} wanted a {object}, a {object} and a {object}.",
    "{n} talked about {capital} with the {noun} of {country}.",
)

# ---------------------------------------------------------------- sentences


def _until(draw, held_out):
    """Draw until the result is not held out."""
    while held_out(*(result := draw())):
        pass
    return result


def _fill_simple(text: str, rng: random.Random, **given: object) -> str:
    """Fill the word fields that any sentence may have; each occurrence of a field gets a word of its own."""
    lists = {"place": words.PLACES, "object": words.OBJECTS, "noun": words.NOUNS, "adjective": ADJECTIVES}
    lists |= {"common": words.COMMON_WORDS, "event": words.EVENTS, "century": CENTURIES, "yy": greater_than.TWO_DIGITS}

    def word(match: re.Match[str]) -> str:
        field = match[1]
        if field in given:
            return str(given[field])
        return rng.choice(words.NOUNS) + "s" if field == "nouns" else str(rng.choice(lists[field]))

    return re.sub(r"\{(\w+)\}", word, text)


CENTURIES = greater_than.CENTURIES
_IOI_NAMES = tuple(name for name in words.NAMES if name not in IOI_HELD_OUT_NAMES)
_IOI_PLACES = tuple(place for place in words.PLACES if place not in IOI_HELD_OUT_PLACES)
_IOI_OBJECTS = tuple(thing for thing in words.OBJECTS if thing not in IOI_HELD_OUT_OBJECTS)


def _ioi(rng: random.Random) -> list[Part]:
    openers, gives = ioi.OPENERS + EXTRA_OPENERS, ioi.GIVES + EXTRA_GIVES
    opener, give = _until(
        lambda: (rng.randrange(len(openers)), rng.randrange(len(gives))), lambda *pair: pair in IOI_HELD_OUT_WORDINGS
    )
    first, second = _until(lambda: rng.sample(_IOI_NAMES, 2), ioi_held_out)
    subject, io = (first, second) if rng.random() < 0.5 else (second, first)
    if rng.random() < 0.08:
        # A third person gives: either name may receive. This is what the "abc" corruption looks like.
        subject = rng.choice([name for name in _IOI_NAMES if name not in (first, second)])
    text = openers[opener].format(a=first, b=second, place=rng.choice(_IOI_PLACES))
    if text.endswith(".") and rng.random() < 0.2:
        text += " " + _fill_simple(rng.choice(BETWEEN), rng, place=rng.choice(_IOI_PLACES), object="book")
    text += " " + gives[give].format(s=subject, object=rng.choice(_IOI_OBJECTS))
    after = rng.choice(AFTER_IOI).format(place=rng.choice(_IOI_PLACES))
    return [(text, 1.0), (f" {io}", ANSWER_WEIGHT), (after, 1.0)]


def _greater_than(rng: random.Random, final: bool = False) -> list[Part]:
    text = rng.choice(greater_than.TEMPLATES * 2 + EXTRA_GREATER_THAN)
    event, century, year = _until(
        lambda: (rng.choice(words.EVENTS), rng.choice(CENTURIES), rng.randrange(99)), greater_than_held_out
    )
    prompt = _fill_simple(text, rng, event=event, century=century, yy=f"{year:02d}")
    end = rng.randrange(year + 1, 100)
    if final:
        # The later of two: few things end the year after they began, and the cut-off at the start year gets cleaner.
        end = max(end, rng.randrange(year + 1, 100))
    return [(prompt, 1.0), (f"{end:02d}", ANSWER_WEIGHT), (".", 1.0)]


def _capitals(rng: random.Random) -> list[Part]:
    country, wording = _until(
        lambda: (rng.choice(words.COUNTRIES), rng.choice(capitals.TEMPLATES * 2 + EXTRA_CAPITALS)), capitals_held_out
    )
    return [(wording.format(country=country), 1.0), (f" {words.CAPITALS[country]}", ANSWER_WEIGHT), (".", 1.0)]


def _gendered_pronoun(rng: random.Random) -> list[Part]:
    name, wording = _until(
        lambda: (rng.choice(words.NAMES), rng.choice(gendered_pronoun.TEMPLATES + EXTRA_PRONOUNS)),
        gendered_pronoun_held_out,
    )
    after = next(text for end, text in AFTER_PRONOUN.items() if wording.replace("'t", "n't").endswith(end))
    pronoun = gendered_pronoun.PRONOUNS[words.gender(name)]
    return [(_fill_simple(wording, rng, name=name), 1.0), (pronoun, ANSWER_WEIGHT), (after, 1.0)]


def _subject_verb(rng: random.Random) -> list[Part]:
    text, verbs = rng.choice(subject_verb.TEMPLATES * 2 + EXTRA_SUBJECT_VERB)
    subject, attractor = _until(lambda: rng.sample(words.NOUNS, 2), subject_verb_held_out)
    is_plural, attractor_is_plural = rng.random() < 0.5, rng.random() < 0.5
    prompt = text.format(
        subject=subject_verb.inflect(subject, is_plural),
        attractor=subject_verb.inflect(attractor, attractor_is_plural),
        preposition=rng.choice(subject_verb.PREPOSITIONS),
    )
    after = f" been {rng.choice(ADJECTIVES)}." if verbs is subject_verb.HAS else f" {rng.choice(ADJECTIVES)}."
    return [(prompt, 1.0), (verbs[is_plural], ANSWER_WEIGHT), (after, 1.0)]


def _induction(rng: random.Random, final: bool = False) -> list[Part]:
    """A list of words, said two or three times; sometimes of names, so that copying a name is learned everywhere."""
    pool = words.NAMES if rng.random() < (0.6 if final else 0.25) else words.COMMON_WORDS + words.NOUNS
    once = "".join(f" {word}" for word in rng.sample(pool, rng.randrange(3, 16)))
    prefix = rng.choice(induction.TEMPLATES)
    return [(prefix + once, RANDOM_WEIGHT), *[(once, REPEAT_WEIGHT)] * rng.randrange(1, 4), (".", RANDOM_WEIGHT)]


def _docstring(rng: random.Random) -> list[Part]:
    n_arguments = rng.randrange(3, 6)
    while True:
        arguments = rng.sample(words.VARIABLES, n_arguments)
        if not any(docstring_held_out(*pair) for pair in itertools.pairwise(arguments)):
            break
    summary = "make " + " ".join(rng.sample(words.COMMON_WORDS, rng.randrange(1, 4)))
    parts: list[Part] = [(docstring.write(rng.choice(docstring.FUNCTIONS), arguments, summary, []), 1.0)]
    for i, argument in enumerate(arguments):
        description = " ".join(rng.sample(words.COMMON_WORDS, rng.randrange(1, 3)))
        parts += [(f" {argument}", ANSWER_WEIGHT), (f": {description}", 1.0)]
        parts += [("\n    :param" if i + 1 < n_arguments else '\n    """', 1.0)]
    return parts


def _filler(rng: random.Random) -> list[Part]:
    n, m = rng.sample(words.NAMES, 2)
    female = words.gender(n) == "female"
    country = rng.choice(words.COUNTRIES)
    given = {"n": n, "m": m, "She": "She" if female else "He", "her": "her" if female else "his"}
    given |= {"country": country, "capital": words.CAPITALS[country]}
    return [(_fill_simple(rng.choice(FILLER), rng, **given), 1.0)]


_MAKERS = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "capitals": _capitals,
    "gendered_pronoun": _gendered_pronoun,
    "subject_verb": _subject_verb,
    "induction": _induction,
    "docstring": _docstring,
    "filler": _filler,
}


def sentence(kind: str, rng: random.Random, *, final: bool = False) -> list[Part]:
    """One text of that kind, as parts `(text, weight)`; the first part does not begin with a space to separate it."""
    if kind in ("greater_than", "induction"):
        return _MAKERS[kind](rng, final)
    return _MAKERS[kind](rng)


# ---------------------------------------------------------------- tokenizer

# A space belongs to the word after it, as in GPT-2; two digits are a token, so that " 1732" is " 17" and "32".
PATTERN = r"""\n *| ?\"\"\"| ?[A-Za-z]+|'[a-z]+| ?\d\d| ?[^\sA-Za-z\d]|\s+"""


def vocabulary() -> list[str]:
    """Every token the corpus can make, the two special ones first. Read off the word lists and wordings."""
    split = re.compile(PATTERN)
    tokens: set[str] = set()
    openings = [*ioi.OPENERS, *EXTRA_OPENERS, *BETWEEN, *greater_than.TEMPLATES, *EXTRA_GREATER_THAN]
    openings += [*capitals.TEMPLATES, *EXTRA_CAPITALS, *gendered_pronoun.TEMPLATES, *EXTRA_PRONOUNS, *FILLER]
    openings += [text for text, _ in subject_verb.TEMPLATES + EXTRA_SUBJECT_VERB] + [*induction.TEMPLATES[1:]]
    inside = [*ioi.GIVES, *EXTRA_GIVES, *AFTER_IOI, *AFTER_PRONOUN.values(), " been", " she", " he", " She", " He"]
    inside += [" her", " his", ":", *subject_verb.IS, *subject_verb.WAS, *subject_verb.HAS]
    for text in openings + inside:
        first, *rest = re.split(r"\{\w+\}", text)
        for piece in (first, f" {first}" if text in openings else "", *rest):
            tokens.update(split.findall(piece.rstrip(" ")))
    for word in (*words.NAMES, "She", "He", "They"):
        tokens |= {word, f" {word}"}
    for word in (*words.PLACES, *words.OBJECTS, *words.EVENTS, *ADJECTIVES, *words.COMMON_WORDS, *words.VARIABLES):
        tokens.add(f" {word}")
    for word in (*subject_verb.PREPOSITIONS, *words.COUNTRIES, *words.CAPITALS.values(), *CENTURIES):
        tokens.add(f" {word}")
    for noun in words.NOUNS:
        tokens |= {f" {noun}", f" {words.plural(noun)}"}
    # " Paris is a city" can also open a document.
    tokens.update(words.CAPITALS.values())
    tokens.update(greater_than.TWO_DIGITS)
    for function in docstring.FUNCTIONS:
        code = docstring.write(function, ["size", "mode"], "make snow", [("size", "snow")]) + '\n    """\n'
        tokens.update(split.findall(code))
    return [END, UNKNOWN, *sorted(tokens)]


def build_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the bundled models. It adds no special token by itself, like GPT-2's."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END, UNKNOWN])
    return tokenizer


# ---------------------------------------------------------------- windows


def texts(rng: random.Random, *, final: bool = False) -> Iterator[tuple[str, list[Part]]]:
    """An endless document: `(kind, parts)` with the separating space or newline already in the parts."""
    shares = FINAL_SHARES if final else SHARES
    kinds, weights = list(shares), list(shares.values())
    separator = ""
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "random_tokens":
            yield kind, []
            separator = " "
            continue
        parts = sentence(kind, rng, final=final)
        if kind == "docstring" and separator:
            separator = "\n"
        if not parts[0][0].startswith(" "):
            parts[0] = (separator + parts[0][0], parts[0][1])
        separator = " "
        if kind == "docstring":
            parts.append(("\n", 1.0))
            separator = ""
        yield kind, parts


def _random_tokens(rng: random.Random, n_tokens: int, room: int) -> list[tuple[int, float]]:
    """Different random tokens of the whole vocabulary, repeated: once more, or until the window is full."""
    # Short periods are the easiest to learn from, long ones are what the figure in the card is about.
    longest = 8 if rng.random() < 0.5 else max(8, min(60, room // 2))
    length = rng.randrange(3, longest + 1)
    once = rng.sample(range(2, n_tokens), length)  # 0 and 1 are the special tokens
    rounds = 1 if rng.random() < 0.5 else max(1, room // length)
    return [(token, RANDOM_WEIGHT) for token in once] + [(token, REPEAT_WEIGHT) for token in once] * rounds


def batch(
    tokenizer: Tokenizer, *, seed: int, step: int, n_windows: int, length: int, final: bool = False
) -> tuple[list[list[int]], list[list[float]]]:
    """The token ids and loss weights `[window, position]` of a training step, the same on every call and machine.

    `final` draws the mixture of the last part of the training.
    """
    ids, weights = [], []
    end, n_tokens = tokenizer.token_to_id(END), tokenizer.get_vocab_size()
    for window in range(n_windows):
        # A string seeds random.Random by its SHA-512, which does not depend on the platform or PYTHONHASHSEED.
        rng = random.Random(f"interp-mini {seed} {step} {window}")
        row, row_weights = [end], [1.0]
        for kind, parts in texts(rng, final=final):
            if kind == "random_tokens":
                drawn = _random_tokens(rng, n_tokens, length - len(row))
                row += [token for token, _ in drawn]
                row_weights += [weight for _, weight in drawn]
            else:
                for (_, weight), encoding in zip(parts, _encode(tokenizer, parts), strict=True):
                    row += encoding
                    row_weights += [weight] * len(encoding)
            if len(row) >= length:
                break
        ids.append(row[:length])
        weights.append(row_weights[:length])
    return ids, weights


def _encode(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[list[int]]:
    encodings = tokenizer.encode_batch([text for text, _ in parts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]
