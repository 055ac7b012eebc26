"""The errors a user can mend: each message is one sentence that names the offender and says what would help.

The command line prints them without a traceback and exits with status 2.
"""


class InterpError(Exception):
    """Base of every error that is about what the user asked for, not about a bug."""


class LoadError(InterpError):
    """A model could not be loaded, or the loaded model is not what it claims to be."""


class UnsupportedModel(LoadError):
    """The model has something the canonical transformer lacks; the message says what."""


class TaskError(InterpError, ValueError):
    """A task, a prompt pair or a file of pairs is not usable."""


class SiteError(InterpError, ValueError):
    """A site, node or position that this model does not have."""


class MetricError(InterpError, ValueError):
    """A metric that is unknown, lacks what it needs, or came out non-finite."""


class PatchError(InterpError, RuntimeError):
    """A patch that did not do what a patch must do: a hook that never fired, or a self-patch that changed the result."""


class RulesError(InterpError, ValueError):
    """A rule set that is unknown, or that cannot be followed by this model or in this call."""


class OptionError(InterpError, ValueError):
    """An option whose value is not one of those allowed."""


def one_of(value: str, allowed, what: str, error: type[InterpError] = OptionError) -> str:
    """`value` if it is allowed, else an error that names it, its nearest allowed neighbour and all of them."""
    import difflib

    allowed = list(allowed)
    if value in allowed:
        return value
    allowed = [str(one) for one in allowed]
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    article = "an" if what[0] in "aeiou" else "a"
    raise error(f"{value!r} is not {article} {what} (choose from {', '.join(allowed)}){hint}")


def name_some(items: list, limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
