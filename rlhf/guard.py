"""A guard against over-optimisation: what a run does when its KL passes a limit.

First it doubles the KL coefficient. If the KL stays above the limit, it goes back to the last good policy. If that
happens too often, it stops.
"""

import math
import sys

from tqdm import tqdm

from rlhf import distributed
from rlhf.checkpoint import Stateful, cpu_copy
from rlhf.errors import UserError
from rlhf.model_card import Chosen

RAISED, WENT_BACK, STOPPED = "raised", "went back", "stopped"
FACTOR = 2.0  # by which the KL coefficient is raised, each time
PATIENCE = 5  # updates above the limit after the coefficient was raised, before the run goes back
TIMES_BACK = 3  # before the run stops
SNAPSHOT_EVERY = 5  # updates


class KLGuard:
    """Watches the KL of a run; what it brings back are the states of `training`, policy and optimizer.

    limit: in nats a response; None: the guard is off.
    """

    def __init__(self, limit: float | None, training: dict[str, Stateful]):
        self._limit, self._training = limit, training
        self.kl_factor = 1.0  # of the KL coefficient
        self.chosen: Chosen | None = None  # the last good policy, once the run has stopped
        self._updates_above = self._times_back = 0  # in a row, the former
        self._good = self._snapshot(0) if limit else None
        self._candidate = None  # a snapshot whose KL is not known yet

    def watch(self, update: int, kl: float) -> str | None:
        """What the guard does after an update, if anything; kl: the mean of its rollout, which the policy before the
        update sampled. A KL that is not finite is above every limit."""
        if self._limit is None:
            return None
        if update == 1:  # the rollout of what the run began with, which --start-from may have brought far
            self._good["kl"] = kl
        if kl <= self._limit:
            self._updates_above = 0
            if self._candidate:
                self._good, self._candidate = self._candidate | {"kl": kl}, None
            if update % SNAPSHOT_EVERY == 0:
                self._candidate = self._snapshot(update)
            return None
        self._candidate = None
        self._updates_above += 1
        action = self._action(kl)
        if action:
            _say(f"update {update}: the KL is {kl:.1f} nats, above --kl-limit: {self._carry_out(action)}")
        return action

    def _action(self, kl: float) -> str | None:
        """What is due above the limit. With a KL that is not finite no step is taken, so waiting would be in vain."""
        if self._updates_above == 1:
            return RAISED
        if self._updates_above <= PATIENCE and math.isfinite(kl):
            return None
        return WENT_BACK if self._times_back < TIMES_BACK else STOPPED

    def _carry_out(self, action: str) -> str:
        """Do it, and say what was done."""
        if action == RAISED:
            self.kl_factor *= FACTOR
            return f"the KL coefficient is now {self.kl_factor:g} times as high"
        for name, each in self._training.items():
            each.load_state_dict(cpu_copy(self._good[name]))  # a copy of its own, which goes on learning
        self._updates_above = 0
        where = f"back to the policy after update {self._good['update']}"
        if action == WENT_BACK:
            self._times_back += 1
            return where
        reason = "the last below --kl-limit" if self._good["kl"] <= self._limit else "none was below --kl-limit"
        self.chosen = Chosen(self._good["update"], reason, {"kl": self._good["kl"]})
        return f"{where}, and the run stops"

    def _snapshot(self, update: int) -> dict:
        states = {name: each.state_dict() for name, each in self._training.items()}
        return {"update": update, "kl": None} | cpu_copy(states)

    def raise_if_stopped(self, out: str, saved_to: str, update: int) -> None:
        """End a run that the guard has stopped; the folder saved_to has its policy after this update."""
        if self.chosen:
            raise UserError(
                f"the KL passed --kl-limit {self._limit:g} again after the run had gone back {TIMES_BACK} times; raise "
                f"--kl-coef or lower --lr, and start anew. {saved_to} holds the policy after update "
                f"{update}; {out}.checkpoint, if there is one, the run as it was last saved"
            )

    def state_dict(self) -> dict:
        names = ("kl_factor", "_updates_above", "_times_back", "_good", "_candidate")
        return {name.strip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.kl_factor, self._updates_above, self._times_back = (
            state[name] for name in ("kl_factor", "updates_above", "times_back")
        )
        self._good, self._candidate = state["good"], state["candidate"]


def _say(message: str) -> None:
    if distributed.rank() == 0:
        tqdm.write(message, file=sys.stderr)  # which a progress bar survives
