"""What is being looked at: a model and a behaviour, as one frozen value that the address bar, the cache and the pages share.

A behaviour is a named task (n prompt pairs drawn by a seed) or two prompts of one's own with a right and a wrong answer. It is
checked here, on the server: limits of widgets are only the browser's.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from interp import PromptPairs, load_task
from interp.errors import TaskError, one_of
from interp.tasks.named import TASKS

OWN = "my own prompts"
MAX_PROMPTS, MAX_CHARACTERS = 64, 2000
EXAMPLE = {
    "clean": "When Mary and John went to the store, John gave a drink to",
    "corrupt": "When Mary and John went to the store, Mary gave a drink to", "answer": " Mary", "wrong": " John",
}  # fmt: skip


@dataclass(frozen=True)
class Behaviour:
    """A model's name and the pairs to ask it. task: a named task, or OWN with prompts and answers as typed."""

    model: str = "mini-gpt2"
    task: str = "ioi"
    n: int = 8
    seed: int = 0
    clean: str = EXAMPLE["clean"]
    corrupt: str = EXAMPLE["corrupt"]
    answer: str = EXAMPLE["answer"]
    wrong: str = EXAMPLE["wrong"]

    def checked(self) -> "Behaviour":
        """The same, or `TaskError` naming what is wrong."""
        one_of(self.task, (*TASKS, OWN), "task", TaskError)
        if not 1 <= self.n <= MAX_PROMPTS:
            raise TaskError(
                f"the dashboard takes 1 to {MAX_PROMPTS} pairs, not {self.n}: run more with the interp command"
            )
        for name in ("clean", "corrupt"):
            text = getattr(self, name)
            if self.task == OWN and not text.strip():
                raise TaskError(f"type a {name} prompt")
            if len(text) > MAX_CHARACTERS:
                raise TaskError(
                    f"the {name} prompt has {len(text):,} characters, and the dashboard takes {MAX_CHARACTERS:,}"
                )
        if self.task == OWN and not (self.answer and self.wrong):
            raise TaskError("type a right and a wrong answer, with the space in front that they have in the text")
        return self

    def pairs(self, model) -> PromptPairs:
        """Its prompt pairs, as the library makes them."""
        self.checked()
        if self.task != OWN:
            return load_task(self.task, model, n=self.n, seed=self.seed)
        return PromptPairs.from_text(
            model, clean=[self.clean], corrupt=[self.corrupt], answers=[self.answer], wrong_answers=[self.wrong]
        )

    def to_query(self) -> dict[str, str]:
        """What differs from the default, as strings for the address bar; prompts only where they are used."""
        own = {"clean", "corrupt", "answer", "wrong"} if self.task != OWN else {"n", "seed"}
        defaults = asdict(Behaviour())
        return {k: str(v) for k, v in asdict(self).items() if k not in own and v != defaults[k]}

    @classmethod
    def from_query(cls, query: dict[str, Any]) -> "Behaviour":
        """The behaviour of an address; what it does not say, or says wrongly, is the default."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in query:
                try:
                    found[field.name] = type(field.default)(query[field.name])
                except ValueError:
                    continue
        try:
            return cls(**found).checked()
        except TaskError:
            return cls()

    def code(self) -> str:
        """The lines of Python that make `model` and `pairs`."""
        lines = ["import interp", "", f"model = interp.load_model({self.model!r})"]
        if self.task != OWN:
            lines.append(f"pairs = interp.load_task({self.task!r}, model, n={self.n}, seed={self.seed})")
        else:
            lines += [
                "pairs = interp.PromptPairs.from_text(", f"    model, clean=[{self.clean!r}], corrupt=[{self.corrupt!r}],",
                f"    answers=[{self.answer!r}], wrong_answers=[{self.wrong!r}],", ")",
            ]  # fmt: skip
        return "\n".join(lines) + "\n"
