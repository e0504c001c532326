"""What arrives: rows, tasks, and the stream they form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One example.

    `messages` are the turns before the answer, in the order they are shown to the model:
    (role, text) pairs with roles system, user, assistant; the last one is always a user turn.
    For a plain row that is the single user turn `{input}\\n{instruction}`.
    """

    id: str
    instruction: str  # what the codebook matches and the router routes by
    messages: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]  # outputs[0] is the training target; each one counts as a reference
    images: tuple[str, ...] = ()  # absolute paths
    source: str = ""  # "file:line", for error messages
    demonstrations: tuple[str, ...] = ()  # what a prompt that is too long can do without; see `with_demonstrations`
    every_answer: bool = False  # the assistant's turns behind a question in `messages` are learned as well

    @property
    def opening(self) -> Row:
        """The row up to its first question whose answer is learned."""
        if not self.every_answer:
            return self
        roles = [role for role, _ in self.messages]
        asked = roles.index("user")
        answered = next((place for place in range(asked, len(roles)) if roles[place] == "assistant"), len(roles))
        return replace(self, messages=self.messages[:answered])

    @property
    def user_text(self) -> str:
        """What the user sends last before the first answer that is learned: images are no part of it."""
        return self.opening.messages[-1][1]

    def with_demonstrations(self, count: int) -> Row:
        """The row with only the first `count` of its demonstrations left in its prompt, and these no longer optional.

        Demonstrations are texts that stand in the last user turn, one right behind the other.
        """
        if not self.demonstrations:
            return self
        role, text = self.messages[-1]
        text = text.replace("".join(self.demonstrations), "".join(self.demonstrations[:count]), 1)
        return replace(self, messages=(*self.messages[:-1], (role, text)), demonstrations=())


@dataclass(frozen=True)
class Task:
    """One instruction data set of the stream."""

    name: str
    instructions: tuple[str, ...]  # the distinct ones of the training rows, in order of appearance
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    scorer: str  # a key of lcia.stream.scorers.SCORERS

    @property
    def has_images(self) -> bool:
        return any(row.images for rows in (self.train, self.dev, self.test) for row in rows)


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they arrive."""

    name: str
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()  # what the loader decided and the user should see (splits drawn, rows skipped)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]
