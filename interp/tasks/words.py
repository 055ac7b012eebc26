"""Word lists for the prompt generators.

Every word is a single token of GPT-2's tokenizer when typed after a space (`" Mary"`, `" keys"`), so swapping one
word of a list for another never changes the length of a prompt. The bundled models give each word one token too,
so a pair that lines up on one lines up on the other. `tests/tasks/test_generators.py` checks it.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    """Mary Anna Emma Alice Sarah Laura Lisa Jessica Amy Julia Rachel Kate Helen Susan Karen Linda Jane Grace Lucy
    Claire Maria Elizabeth Jennifer Michelle Emily Rose Diana Victoria Anne Ruth Martha Rebecca Hannah Sophie Nancy
    Olivia Megan Sally Eva Ellen"""
)

MALE_NAMES = _words(
    """John Tom James Paul Mark David Peter Robert Michael Daniel Simon Kevin Brian Adam Jack George Henry Frank Eric
    Steve Thomas Richard Charles Andrew Joseph William Ben Luke Matthew Anthony Jason Ryan Justin Patrick Scott Roger
    Philip Jeff Martin Edward"""
)

NAMES = FEMALE_NAMES + MALE_NAMES

PLACES = _words(
    """store park school garden station library hospital restaurant museum beach office market church house farm river
    bridge castle hotel garage"""
)

# All begin with a consonant, so that "a {object}" is always right.
OBJECTS = _words(
    """drink ring book ball key letter basket kiss bottle phone camera hat coat gift ticket bag map pen cake
    knife"""
)

# Regular plurals only: singular + "s".
NOUNS = _words(
    """key cabinet door window picture book teacher doctor farmer lawyer boy girl king dog cat horse car ship friend
    driver author writer guard judge singer player student table chair road tree nurse pilot"""
)

# Things that last for years, for "The war lasted from the year 1732 to the year 17".
EVENTS = _words(
    """war siege voyage project journey dispute festival strike trial drought conflict debate alliance marriage
    campaign study plague treaty"""
)

CAPITALS = dict(
    pair.split("-")
    for pair in _words(
        """France-Paris Germany-Berlin Italy-Rome Spain-Madrid Portugal-Lisbon England-London Ireland-Dublin
    Scotland-Edinburgh Wales-Cardiff Austria-Vienna Greece-Athens Poland-Warsaw Hungary-Budapest Sweden-Stockholm
    Norway-Oslo Denmark-Copenhagen Finland-Helsinki Russia-Moscow Ukraine-Kiev Turkey-Ankara Egypt-Cairo Iran-Tehran
    Iraq-Baghdad Syria-Damascus Lebanon-Beirut Japan-Tokyo China-Beijing Thailand-Bangkok Indonesia-Jakarta
    Cuba-Havana Canada-Ottawa Peru-Lima Chile-Santiago Afghanistan-Kabul Australia-Canberra Belgium-Brussels
    Libya-Tripoli Tunisia-Tunis Pakistan-Islamabad Switzerland-Bern Jamaica-Kingston"""
    )
)
COUNTRIES = tuple(CAPITALS)

# Unrelated words for random sequences: nothing but their order tells what comes next.
COMMON_WORDS = _words(
    """apple stone water light paper music green yellow winter summer mountain silver copper metal cloud storm ocean
    forest island valley desert field grass flower leaf bird fish wolf bear mouse tiger lion snake bread butter cheese
    sugar salt coffee glass plate spoon fork lamp clock mirror carpet wall roof floor fence wheel engine train plane
    boat truck street city village soldier captain army flag sword shield arrow drum piano guitar song dance story
    poem circle square triangle shape shadow fire smoke dust sand snow rain wind star moon planet gold iron wood brick
    cotton silk leather"""
)

# Argument names of Python functions.
VARIABLES = _words(
    """files names path size index value data text line node item user list code image title label color width height
    count total start end offset limit mode type format order group page state token owner target source result parent
    score"""
)

FEMALE = frozenset(FEMALE_NAMES)


def gender(name: str) -> str:
    """`"female"` or `"male"`, by the list the name stands in."""
    if name in FEMALE:
        return "female"
    if name in MALE_NAMES:
        return "male"
    raise ValueError(f"{name!r} is in neither FEMALE_NAMES nor MALE_NAMES, so its pronoun is unknown")


def plural(noun: str) -> str:
    """The plural of one of `NOUNS`."""
    return noun + "s"
