"""A recipe: everything that is needed to make one dataset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset.

    env: the name of the environment in which the dataset is recorded. also: the names of other environments
    that it is meant for.

    episodes: the function (environment, transitions, seed, sources) -> episodes. It returns episodes as
    `datasets.write.write_minari` takes them. `sources` are the policies of `--policy`, or a list with the one
    object that `--demonstrations` gives.

    transitions: the default number of rows; 0 means that `episodes` decides.

    description, detail: what the metadata of the dataset say about it. What depends on the sources, or on how
    much was played, is a function (sources, episodes) -> text instead.

    policies: how many policy files the dataset can be made from; (0, 1) means that one file is optional.

    policy_sizes: the sizes (observation, action) that these policies must have; None means the environment's.

    demonstrations: "file" if the dataset is made from recorded demonstrations; "any" if successful episodes
    of a policy may replace them; "none" if it needs none.

    read: the function (path, environment) -> demonstrations, an object whose length is their number. It
    raises ValueError for files that do not fit.

    by_hand: whether making the dataset takes too long to do it on first loading. The user must then ask for
    it.
    """

    env: str
    episodes: Callable[..., list[dict]]
    transitions: int
    description: str | Callable[[list, list[dict]], str]
    detail: str = ""
    also: tuple[str, ...] = ()
    policies: tuple[int, ...] = (0,)
    policy_sizes: tuple[int, int] | None = None
    demonstrations: Literal["none", "file", "any"] = "none"
    read: Callable[..., Any] | None = None
    by_hand: bool = False

    def describe(self, sources: list, episodes: list[dict]) -> str:
        """The description of a dataset that was made from `sources` and has these `episodes`."""
        return self.description(sources, episodes) if callable(self.description) else self.description

    @property
    def made_on_first_use(self) -> bool:
        """Whether the first loading makes the dataset: it is quick, and needs no file from the user."""
        return not self.by_hand and 0 in self.policies and self.demonstrations == "none"
