"""Human feedback as the reward: rounds of questions about the present policy, and the reward model they train."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf import distributed, precision, rewards
from rlhf.errors import UserError
from rlhf.human import annotator, answers, page, reward_model, terminal
from rlhf.human.questions import Ask, answer_keys, draw_questions, samples_per_question
from rlhf.sampling import Sampling


@dataclass(frozen=True)
class Settings:
    kind: str  # of the questions: good-bad, or best-of-N
    labels: int  # answers in all rounds together
    rounds: int  # of questions, evenly spread over the run
    file: Path  # of the answers
    metadata: dict  # columns of every answer in the file
    epochs: int  # passes over the answers in every round
    lr: float  # peak learning rate of these passes
    muon: bool  # Muon for the matrices inside the reward model, AdamW for the rest; otherwise AdamW for all
    seed: int


class HumanFeedback:
    """The rounds of questions in a run of `updates` PPO updates, and the reward model."""

    def __init__(self, model, tokenizer, ask: Ask, settings: Settings, updates: int):
        self.model, self.tokenizer, self._ask, self._settings = model, tokenizer, ask, settings
        self._round_starts = [1 + updates * i // settings.rounds for i in range(settings.rounds)]  # numbers of updates
        self.labels = 0  # answers that the reward model has learned from

    def is_due(self, update: int) -> bool:
        """Whether a round of questions comes before this update."""
        return update in self._round_starts

    def ask_and_learn(self, policy, policy_name: str, prompts, queries: list[str], sampling: Sampling, update: int):
        """Ask about the policy's texts before this update, and train on all answers. Returns the row of
        reward_model.csv."""
        settings, updates_done = self._settings, update - 1
        num_samples = samples_per_question(settings.kind)
        total = settings.labels * (self._round_starts.index(update) + 1) // settings.rounds
        predict_key = functools.partial(reward_model.predict_key, self.model, self.tokenizer)
        rows = answers.collect(
            draw_questions(policy, prompts, queries, num_samples, sampling, settings.seed + updates_done),
            settings.file,
            total,
            num_samples,
            self._ask,
            metadata={"policy": policy_name, **settings.metadata},
            predict_key=predict_key if updates_done else None,  # before the first round it has learned nothing
        )
        metrics = reward_model.train(
            self.model,
            self.tokenizer,
            rows[:total],
            epochs=settings.epochs,
            lr=settings.lr,
            muon=settings.muon,
            seed=settings.seed,
        )
        self.labels = total
        return {"update": updates_done, **metrics}

    def calibrate(self, reference_texts: list[str]) -> None:
        """Give a preference model's scores mean 0 and standard deviation 1 on the reference's texts, as in [1]."""
        if self._settings.kind != "good-bad":
            rewards.calibrate_head(self.model, self.tokenizer, reference_texts)

    def state_dict(self) -> dict:
        calibration = rewards.head_calibration(self.model)
        return {"weights": self.model.state_dict(), "calibration": calibration, "labels": self.labels}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.model.config.update(state["calibration"])
        self.labels = state["labels"]


def load(
    policy: str, settings: Settings, updates: int, device: torch.device, precision_name: str, *,
    annotator_spec: str | None, noise: float, gold: str, on_page: bool,
) -> HumanFeedback:  # fmt: skip
    """People, or an annotator in their place (annotator.load), and the reward model that will learn their answers.

    policy: what the reward model starts as. on_page: ask in the browser, not at the terminal.
    """
    if distributed.world_size() > 1:
        raise UserError("--reward human asks one person, in one process; start it without torchrun")
    there = answers.read(settings.file, samples_per_question(settings.kind))  # an error in it ends the run here
    answers.make_folder(settings.file)
    if there:
        by = ", ".join(sorted({str(row.get("annotator") or "people") for row in there}))
        print(f"{len(there)} answers are in {settings.file} already, by {by}; they count")
    model, tokenizer = reward_model.new_model(policy, settings.kind)
    precision.set_precision(model.to(device), precision.choose(precision_name, device, model))
    if annotator_spec:
        ask = annotator.load(annotator_spec, gold, noise, settings.seed, device, precision_name)
    elif on_page:
        ask = page.start(answer_keys(samples_per_question(settings.kind)))
    else:
        ask = terminal.ask
    return HumanFeedback(model, tokenizer, ask, settings, updates)
