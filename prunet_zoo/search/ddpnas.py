"""DDPNAS: dynamic distribution pruning (arXiv 1905.13543; IJCV 2023). No torch: it searches any table of accuracies.

Published: each layer holds choices. A *phase* makes T passes; a pass draws k sub-networks, in every layer each of the k
survivors once, trains and validates each, and records the accuracy V (a fraction) for the choices that were in it.
E = mean over passes of softmax over choices of 100·V. Then θ ← E + ½·θ (first version) or, with momentum,
v ← γ·v + (1 − γ)·E, θ ← θ + v (later version); every layer loses its survivor with the least θ; until one is left. That
makes T·(K + (K − 1) + … + 2) sub-networks, 105 for K = 8 and T = 3.

Ours: the record V is freed of partners (``credit='sample'`` is the published one), the draws are balanced, layers may
have different numbers of choices, and everything about the budget but the knapsack itself; see `DDPNASearch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prunet_zoo.cost import Cost
from prunet_zoo.errors import LatencyError, SpecError, TrainingError
from prunet_zoo.search.ddpnas_choices import choice_costs, space_choices
from prunet_zoo.search.ddpnas_credit import Evaluation, main_effects, mean_softmax
from prunet_zoo.search.ddpnas_draws import SAFE, Draws, Picks, cheapest_or_best
from prunet_zoo.search.knapsack import Option, best_in_interval
from prunet_zoo.space import SearchSpace
from prunet_zoo.spec import stable_hash

Update = Literal["first", "momentum"]
Credit = Literal["sample", "adjusted"]

_FLOORS = (1.0, 0.9, 0.8)  # of `lowest`: tried one after another


@dataclass(frozen=True)
class Removal:
    """A choice that was taken away: after which phase, its layer and index, its θ and its mean softmax E."""

    phase: int
    layer: int
    choice: int
    theta: float
    probability: float


class DDPNASearch:
    """The search as questions and answers: `ask` for a sub-network, `tell` its accuracy; `run` does both.

    Layers with different numbers of choices (ours): k counts down from the largest number; layers with k survivors
    lose one, the others' choices are drawn in turns, so that all layers come to one survivor together.

    Draws (ours but for "without replacement"): any two choices of different layers meet about alike often, see `Draws`.

    Budget (ours but for the knapsack): sub-networks over the budget are never drawn. Before a removal a grouped
    knapsack picks the survivors with the greatest Σθ within the budget; these are not removed, so there is always a
    network within the budget, and the last survivors are one. Choices that no network within the budget can have are
    removed at once.

    Args:
        choices: a `SearchSpace`, or the choices of each layer, at least one each.
        passes: T, passes in a phase.
        update: rule for θ.
        gamma: γ of the momentum (the value is ours).
        seed: of the draws.
        budget: greatest cost of a network; None, or infinite: there is none.
        cost: for a space a `Cost`; else the additive cost of each choice of each layer.
        widths: for a space, how many widths of a candidate's grid are offered, evenly spaced from end to end.
        credit: what V is. 'sample': the accuracy of the sub-networks that had the choice, as published; 'adjusted'
            (ours): less the main effects of the other choices in them, see `ddpnas_credit`. `docs/ddpnas.md` compares.
        lowest: cost that the result should at least have: what the knapsack keeps from being removed has it, as far as
            choices allow (ours).

    Attributes:
        choices: of each layer; for a space (candidate, width) or None (skip).
        survivors: of each layer, indices into `choices`.
        theta: θ of each choice, of a removed one as it was then.
        removed: what was removed, in order.
        evaluated: every sub-network, in order.

    Raises:
        SpecError: a setting out of range, or a cost of the wrong kind.
        LatencyError: the budget is below the cheapest network, a cost is not finite, or there is a budget and the
            space's cost is no sum over layers.
    """

    def __init__(
        self,
        choices: SearchSpace | Sequence[Sequence[Any]],
        passes: int = 3,
        update: Update = "first",
        gamma: float = 0.9,
        seed: int = 0,
        budget: float | None = None,
        cost: Cost | Sequence[Sequence[float]] | None = None,
        widths: int = 3,
        credit: Credit = "adjusted",
        lowest: float = 0.0,
    ) -> None:
        check_settings(passes, update, gamma, widths, credit)
        self.adjusts = credit == "adjusted"
        self.space = choices if isinstance(choices, SearchSpace) else None
        self.choices: list[list[Any]] = (
            space_choices(choices, widths) if isinstance(choices, SearchSpace) else [list(layer) for layer in choices]
        )
        if not self.choices or not all(self.choices):
            raise SpecError("DDPNAS: every layer needs at least one choice")
        self.passes, self.update, self.gamma, self.seed = passes, update, gamma, seed
        self.credit = credit
        budget = None if budget == math.inf else budget
        self.costs, fixed = choice_costs(self.space, self.choices, cost, budget)
        # of networks, where it is no sum over layers
        self._whole: Cost | None = cost if self.costs is None else None  # type: ignore[assignment]
        self.budget, self.lowest = budget, lowest
        sizes = [len(layer) for layer in self.choices]
        self.draws = Draws(seed, sizes, self.costs, None if budget is None else budget - fixed)
        self.fixed = fixed
        self.survivors = [list(range(n)) for n in sizes]
        self.theta = [[0.0] * n for n in sizes]
        self.velocity = [[0.0] * n for n in sizes]
        self.removed: list[Removal] = []
        self.evaluated: list[Evaluation] = []
        self._check_budget()
        self._remove_unreachable(0)
        self.first = self.count = max(len(layer) for layer in self.survivors)  # k, counting down
        self._plan: list[list[Picks]] = []  # the phase's passes
        self._at = 0  # sub-networks of the phase that were evaluated
        self._asked = False  # whether one was given out that is to be told of
        self._start_phase()

    @property
    def total(self) -> int:
        """Sub-networks of the whole schedule: T·(K + … + 2)."""
        return self.passes * sum(range(2, self.first + 1))

    @property
    def done(self) -> bool:
        """Whether one choice is left in every layer."""
        return all(len(layer) == 1 for layer in self.survivors)

    def ask(self) -> Picks:
        """The sub-network to be trained and validated next: an index into each layer's choices. Asked again before
        `tell`, it is the same."""
        if self.done:
            raise TrainingError("DDPNAS has ended: one choice is left in every layer; take best()")
        self._asked = True
        return self._next()

    def _next(self) -> Picks:
        return self._plan[self._at // self.count][self._at % self.count]

    def tell(self, accuracy: float) -> list[Removal]:
        """Credit the sub-network that `ask` gave with its accuracy, a fraction; returns what that made go.

        Raises:
            TrainingError: the accuracy is no fraction (percent, NaN), or nothing was asked for.
        """
        accuracy = float(accuracy)  # NumPy's and torch's numbers are no JSON
        if not 0.0 <= accuracy <= 1.0:
            raise TrainingError(f"DDPNAS needs an accuracy as a fraction from 0 to 1, got {accuracy!r}")
        if not self._asked:
            raise TrainingError("DDPNAS was told an accuracy that it did not ask for: call ask() once for each tell()")
        self._asked = False
        self.evaluated.append(
            Evaluation((self.first - self.count) * self.passes + self._at // self.count, self._next(), accuracy)
        )
        self._at += 1
        return self._end_phase() if self._at == self.passes * self.count else []

    def run(self, evaluate: Callable[[Any], float], tell: Callable[[str], None] = lambda line: None) -> Any:
        """Search to the end; returns `decode` of the best.

        Args:
            evaluate: accuracy (a fraction) of a `NetSpec` for a space, else of the tuple of choices.
            tell: called with a line of text after every phase.
        """
        while not self.done:
            gone = self.tell(evaluate(self.decode(self.ask())))
            if gone:
                tell(f"{len(self.evaluated)} of {self.total} sub-networks, {len(gone)} choices removed")
        return self.decode(self.best())

    def best(self) -> Picks:
        """The survivors with the greatest Σθ within the budget, and above `lowest` as far as they can be."""
        groups = [
            [Option(c, self.theta[i][c], self.costs[i][c] if self.costs else 0.0) for c in layer]
            for i, layer in enumerate(self.survivors)
        ]
        if self.draws.budget is None:
            return tuple(max(group, key=lambda o: o.worth).key for group in groups)  # type: ignore[misc]
        for share in _FLOORS if self.lowest else ():
            picks = best_in_interval(groups, self.draws.budget * SAFE, share * self.lowest - self.fixed)
            if picks is not None:
                return tuple(group[i].key for group, i in zip(groups, picks, strict=True))  # type: ignore[misc]
        return cheapest_or_best(groups, self.draws.budget)

    def encoding(self, picks: Sequence[int]) -> tuple[Any, ...]:
        """The choices that picks stand for."""
        return tuple(layer[p] for layer, p in zip(self.choices, picks, strict=True))

    def decode(self, picks: Sequence[int]) -> Any:
        """The `NetSpec` of picks, or the tuple of choices where there is no space."""
        encoding = self.encoding(picks)
        return encoding if self.space is None else self.space.decode(encoding)

    def cost(self, picks: Sequence[int]) -> float:
        """Cost of a network (0 where none was given)."""
        return self.fixed + self.draws.cost(picks) if self._whole is None else self._whole(self.decode(picks))

    def single(self, label: str) -> Picks:
        """A sub-network of survivors within the budget that is no part of the schedule (for a warm-up)."""
        return self.draws.single(self.survivors, label)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as plain JSON data."""
        return {
            "settings": self._settings(),
            "survivors": self.survivors,
            "theta": self.theta,
            "velocity": self.velocity,
            "removed": [asdict(r) for r in self.removed],
            "evaluated": [[e.turn, list(e.picks), e.accuracy] for e in self.evaluated],
            "at": self._at,
            "asked": self._asked,
            "plan": [[list(picks) for picks in one] for one in self._plan],
            "owed": self.draws.owed,
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of a search with the same settings.

        Raises:
            TrainingError: it is of a search over other choices, or with other settings.
        """
        if [len(layer) for layer in state["theta"]] != [len(layer) for layer in self.choices]:
            raise TrainingError("this state of DDPNAS is of a search over other choices; start anew")
        theirs, own = state["settings"], self._settings()
        other = [f"{name} {theirs.get(name)}, here {value}" for name, value in own.items() if theirs.get(name) != value]
        if other:
            raise TrainingError(f"this state of DDPNAS is of another search ({'; '.join(other)}); start anew")
        self.survivors = [list(layer) for layer in state["survivors"]]
        self.theta = [list(layer) for layer in state["theta"]]
        self.velocity = [list(layer) for layer in state["velocity"]]
        self.removed = [Removal(**r) for r in state["removed"]]
        self.evaluated = [Evaluation(turn, tuple(picks), accuracy) for turn, picks, accuracy in state["evaluated"]]
        self._at, self._asked = state["at"], state["asked"]
        self._plan = [[tuple(picks) for picks in one] for one in state["plan"]]
        self.draws.owed = [list(layer) for layer in state["owed"]]
        self.count = state["count"]

    def _settings(self) -> dict[str, Any]:
        """What decides how a search goes on."""
        names = ("passes", "update", "credit", "gamma", "seed", "budget", "lowest")
        space = None if self.space is None else self.space.hash
        among = [space, [[_label(choice) for choice in layer] for layer in self.choices], self.costs, self.fixed]
        return {**{name: getattr(self, name) for name in names}, "choices": stable_hash(among)}

    def _start_phase(self) -> None:
        """Draw all sub-networks of the phase: they do not depend on what they will be found to be worth."""
        self._at = 0
        self._plan = [] if self.done else self.draws.phase(self.survivors, self.count, self.passes)

    def _scores(self) -> list[dict[int, float]]:
        """E of the survivors of each layer."""
        phase = self.evaluated[len(self.evaluated) - len(self._plan) * self.count :]
        effects = main_effects(self.evaluated, [len(layer) for layer in self.choices]) if self.adjusts else None
        found = []
        for i, layer in enumerate(self.survivors):
            passes: dict[int, list[tuple[int, float]]] = {}
            for e in phase:
                partners = 0.0 if effects is None else sum(float(f[p]) for f, p in zip(effects, e.picks, strict=True))
                own = 0.0 if effects is None else float(effects[i][e.picks[i]])
                passes.setdefault(e.turn, []).append((e.picks[i], e.accuracy - (partners - own)))
            found.append(mean_softmax(list(passes.values()), layer))
        return found

    def _end_phase(self) -> list[Removal]:
        """Update θ and remove; the next phase starts."""
        scores = self._scores()
        for i, layer in enumerate(self.survivors):
            for c in layer:
                self._learn(i, c, scores[i][c])
        gone = []
        keep = self.best()
        for i, layer in enumerate(self.survivors):
            if len(layer) >= self.count:
                worst = min((c for c in layer if c != keep[i]), key=lambda c: self.theta[i][c])
                gone.append(self._remove(i, worst, scores[i][worst]))
        gone += self._remove_unreachable(self.first - self.count + 1)
        self.count -= 1
        self._start_phase()
        return gone

    def _learn(self, layer: int, choice: int, score: float) -> None:
        if self.update == "first":
            self.theta[layer][choice] = score + 0.5 * self.theta[layer][choice]
        else:
            v = self.gamma * self.velocity[layer][choice] + (1 - self.gamma) * score
            self.velocity[layer][choice] = v
            self.theta[layer][choice] += v

    def _remove(self, layer: int, choice: int, probability: float, phase: int | None = None) -> Removal:
        self.survivors[layer].remove(choice)
        phase = self.first - self.count + 1 if phase is None else phase
        self.removed.append(Removal(phase, layer, choice, self.theta[layer][choice], probability))
        return self.removed[-1]

    def _remove_unreachable(self, phase: int) -> list[Removal]:
        """Remove what no network within the budget can have; the cheapest of a layer always stays."""
        if self.costs is None or self.draws.budget is None:
            return []
        cheapest = [min(self.costs[i][c] for c in layer) for i, layer in enumerate(self.survivors)]
        slack = self.draws.budget - sum(cheapest)
        over = [
            (i, c)
            for i, layer in enumerate(self.survivors)
            for c in layer
            if self.costs[i][c] > cheapest[i] and self.costs[i][c] - cheapest[i] > slack
        ]
        return [self._remove(i, c, 0.0, phase) for i, c in over]

    def _check_budget(self) -> None:
        if self.costs is None or self.budget is None:
            return
        least = self.fixed + sum(min(layer) for layer in self.costs)
        if not math.isfinite(self.budget) or least > self.budget:
            raise LatencyError(f"DDPNAS: the cheapest network costs {least:.4g}, the budget is {self.budget:.4g}")


def _label(choice: Any) -> str:
    """What tells a choice from others in another process too; of an object that is no plain data, its class."""
    return repr(choice) if isinstance(choice, str | int | float | tuple | None) else type(choice).__qualname__


def check_settings(passes: int, update: str, gamma: float, widths: int, credit: str = "adjusted") -> None:
    """Raise `SpecError` for a setting out of range."""
    if passes < 1 or widths < 2:
        raise SpecError(f"DDPNAS: passes must be 1 or more and widths 2 or more, got {passes} and {widths}")
    if update not in ("first", "momentum"):
        raise SpecError(f"DDPNAS: update must be 'first' or 'momentum', got {update!r}")
    if credit not in ("sample", "adjusted"):
        raise SpecError(f"DDPNAS: credit must be 'sample' or 'adjusted', got {credit!r}")
    if not 0 <= gamma < 1:
        raise SpecError(f"DDPNAS: gamma must be from 0 to under 1, got {gamma!r}")
