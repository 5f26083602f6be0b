"""What a run has to say beside its result: notes on stderr, once each, and in the report."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.commands.stderr import say
from engine.model.text import PromptWarning


class Notes(list[str]):
    """Notes: printed to stderr as they come, each once, and kept for the report."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def add(self, note: str) -> None:
        """Keep a note; print it unless quiet."""
        if note not in self:
            self.append(note)
            if not self.quiet:
                say(f"note: {note}")

    def take(self, notes: list[str]) -> None:
        """Add the notes of a list, and empty it."""
        for note in notes:
            self.add(note)
        notes.clear()

    @contextmanager
    def of_prompts(self) -> Iterator[None]:
        """Add every PromptWarning from inside. Other warnings stay warnings."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", PromptWarning)
            others = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, PromptWarning):
                    self.add(str(message))
                else:
                    others(message, category, *where, **more)

            warnings.showwarning = show
            yield
