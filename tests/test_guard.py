"""The guard against over-optimisation: its steps by hand, and in a run that breaks."""

import math

import pandas as pd
import pytest
import torch

from rlhf import guard
from rlhf.checkpoint import cpu_copy
from rlhf.errors import UserError
from rlhf.run_log import RunLog
from tests.conftest import TINY_RUN, refused, run

LIMIT = 10.0


class Counter:
    """A training state: the number of the last update, in a tensor."""

    def __init__(self):
        self.number = torch.zeros(1)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def watched(kls, first=1, training=None, kl_guard=None) -> tuple:
    """What the guard does with these KLs, and the guard; before each of them the training makes an update."""
    training = training or Counter()
    kl_guard = kl_guard or guard.KLGuard(LIMIT, {"policy": training})
    actions = []
    for update, kl in enumerate(kls, first):
        training.number += 1  # in place, which a snapshot must not notice
        actions.append(kl_guard.watch(update, kl))
    return actions, kl_guard, training


def test_below_the_limit_it_does_nothing():
    actions, kl_guard, training = watched([0.0, 3.0, LIMIT] * 10)
    assert set(actions) == {None} and kl_guard.kl_factor == 1.0 and training.number == 30
    kl_guard.raise_if_stopped("models/x", "models/x_stopped", update=30)


def test_first_it_raises_the_coefficient_and_waits(capsys):
    actions, kl_guard, training = watched([1.0, 11.0, 12.0, 13.0, 9.0, 11.0])
    assert actions == [None, "raised", None, None, None, "raised"]  # again, after it had worked
    assert kl_guard.kl_factor == 4.0 and training.number == 6
    said = capsys.readouterr().err
    assert "update 2: the KL is 11.0 nats, above --kl-limit: the KL coefficient is now 2 times as high" in said


@pytest.mark.parametrize(
    ("good_updates", "back_to"),
    [
        (1, 0),  # there was no snapshot yet: the policy that the run began with
        (5, 0),  # of update 5 there is one, but its KL, seen in update 6, was above the limit
        (6, 5),
        (10, 5),
        (11, 10),
    ],
)
def test_then_it_goes_back_to_the_last_snapshot_whose_kl_was_below(good_updates, back_to):
    """Five updates above the limit after the coefficient was raised are too many."""
    assert (guard.PATIENCE, guard.SNAPSHOT_EVERY) == (5, 5)
    actions, kl_guard, training = watched([1.0] * good_updates + [11.0] * 6)
    assert actions == [None] * good_updates + ["raised", None, None, None, None, "went back"]
    assert training.number == back_to and kl_guard.kl_factor == 2.0


def test_what_is_brought_back_learns_on_without_changing_the_snapshot():
    above = [11.0] * 6
    actions, _, training = watched([1.0] * 6 + above + above)
    assert actions.count("went back") == 2 and training.number == 5


def test_after_three_times_it_stops():
    cycle = ["raised", None, None, None, None]
    actions, kl_guard, training = watched([1.0] * 6 + [11.0] * 24)
    assert actions == [None] * 6 + [*cycle, "went back"] * 3 + [*cycle, "stopped"]
    assert kl_guard.kl_factor == 16.0 and training.number == 5
    assert kl_guard.chosen == (5, "the last below --kl-limit", {"kl": 1.0})
    with pytest.raises(UserError, match=r"again after the run had gone back 3 times; .* update 4; x.checkpoint"):
        kl_guard.raise_if_stopped("x", "x_stopped", update=4)  # such as the best one of the evaluations


def test_a_run_that_never_was_below_the_limit_does_not_say_it_was():
    _, kl_guard, _ = watched([12.0] + [11.0] * 23)  # as with --start-from
    assert kl_guard.chosen == (0, "none was below --kl-limit", {"kl": 12.0})


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_too_high_and_not_waited_for(kl):
    actions, _, training = watched([1.0, kl, kl, 2.0, kl])
    assert actions == [None, "raised", "went back", None, "raised"] and training.number == 2


def test_without_a_limit_it_is_off():
    training = Counter()
    off = guard.KLGuard(None, {"policy": training})
    assert watched([1.0, 1e9, math.nan] * 10, training=training, kl_guard=off)[0] == [None] * 30
    assert off.state_dict()["good"] is None  # and takes no memory


@pytest.mark.parametrize("stop", range(1, 30))
def test_its_state_is_all_there_is(stop):
    kls = [1.0] * 6 + [11.0] * 24
    whole, whole_guard, _ = watched(kls)
    first, before, training = watched(kls[:stop])
    resumed, again = Counter(), guard.KLGuard(LIMIT, {"policy": (fresh := Counter())})
    fresh.load_state_dict(cpu_copy(training.state_dict()))
    again.load_state_dict(cpu_copy(before.state_dict()))
    rest, again, resumed = watched(kls[stop:], first=stop + 1, training=fresh, kl_guard=again)
    assert first + rest == whole and again.chosen == whole_guard.chosen
    assert resumed.number == 5 and again.kl_factor == whole_guard.kl_factor


def test_a_copy_is_apart_and_keeps_ties():
    weight = torch.ones(3)
    copied = cpu_copy({"a": weight, "b": [weight.view(3), {"steps": 1}]})
    weight += 1
    assert copied["a"].tolist() == [1, 1, 1] and copied["b"][1] == {"steps": 1}
    copied["a"] += 5
    assert copied["b"][0].tolist() == [6, 6, 6]


def test_a_copy_of_parts_of_a_tensor_has_their_shapes_and_no_gradients():
    whole = torch.arange(6.0).view(2, 3).requires_grad_()
    copied = cpu_copy((whole.detach().T, torch.empty(0, dtype=torch.int64), whole.detach()[1]))
    assert [part.tolist() for part in copied] == [[[0, 3], [1, 4], [2, 5]], [], [3, 4, 5]]
    assert copied[1].dtype == torch.int64 and not any(part.requires_grad for part in copied)


# in a run

BREAKS = ["--optimizer", "adam", "--lr", "0.3", "--kl-limit", "3", "--response-length", "8", "--missing-stop-score", 0]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 1)
    monkeypatch.setattr(guard, "TIMES_BACK", 1)


def test_a_run_that_breaks_and_one_that_is_stopped_in_the_middle_of_it(chain, impatient, monkeypatch):
    home = chain[0]

    def flags(name):
        where = ["--run", name, "--out", f"models/{name}", "--save-every", 1]
        return [*TINY_RUN, "--eval-every", 1, "--episodes", 160, *BREAKS, *where]

    said = run("finetuning_nlg", *flags("broken"), cwd=home, code=2)
    log = pd.read_csv(home / "data_results" / "broken" / "log.csv")
    steps = log.guard.fillna("").tolist()
    assert steps == ["", "raised", "went back", "", "raised", "stopped"]
    assert said.stderr.count("above --kl-limit: ") == 4
    assert log.kl_coef[2] > 1.5 * log.kl_coef[1]  # doubled, while --kl-start falls
    assert log.eval_kl[2] > 3  # of the policy that this update made, not of the one that came back
    assert abs(log.kl[3]) < 1e-3 and log.kl[[1, 2, 4, 5]].min() > 3  # the policy is the reference again

    error = said.stderr.strip().splitlines()[-1]
    assert error.startswith("error: the KL passed --kl-limit 3 again") and "raise --kl-coef or lower --lr" in error
    assert "models/broken_stopped holds the policy after update 0; models/broken.checkpoint" in error
    assert not (home / "models" / "broken").exists()  # a run that failed is not done
    before, kept = (home / "models" / name / "model.safetensors" for name in ("nlg", "broken_stopped"))
    assert kept.read_bytes() == before.read_bytes()
    card = (home / "models" / "broken_stopped" / "README.md").read_text(encoding="utf-8")
    assert "PPO: after update 0, the last below --kl-limit" in card

    check = RunLog.check

    def dies_after_the_third(log, *args):
        check(log, *args)
        if log.last_row["update"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "check", dies_after_the_third)
        run("finetuning_nlg", *flags("guarded_again"), cwd=home)
    run("finetuning_nlg", *flags("guarded_again"), "--resume", cwd=home, code=2)
    timings = [name for name in log if "second" in name]
    again = pd.read_csv(home / "data_results" / "guarded_again" / "log.csv")
    pd.testing.assert_frame_equal(again.drop(columns=timings), log.drop(columns=timings))


def test_without_a_coefficient_it_is_off_and_says_so(chain):
    flags = [*TINY_RUN, "--episodes", 48, *BREAKS, "--kl-coef", 0, "--run", "free", "--out", "models/free"]
    said = run("finetuning_nlg", *flags, cwd=chain[0])
    assert "the KL guard is off: with --kl-coef 0" in said.stdout
    assert said.stderr.count("above --kl-limit: the texts may be broken") == 1
    assert pd.read_csv(chain[0] / "data_results" / "free" / "log.csv").guard.isna().all()


def test_the_limit_is_a_positive_number(chain):
    assert "--kl-limit" in refused("finetuning_nlg", "--kl-limit", 0, cwd=chain[0])
