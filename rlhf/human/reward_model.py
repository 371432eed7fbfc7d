"""The reward model that people's answers train, round after round ([1], section 2.2)."""

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rlhf import lora, models, rewards, supervised
from rlhf.errors import UserError
from rlhf.human.answers import label_in, question_in
from rlhf.human.questions import Question, samples_per_question

BATCH = 32  # answers per step


def new_model(policy: str, kind: str):
    """A reward model for questions of this kind, with the policy's weights and a random head as in [1], and its
    tokenizer."""
    if lora.base_of_folder(policy, "--policy"):
        raise UserError(f"--reward human learns as a copy of --policy, and {policy} is adapters: give it merged")
    outputs = 2 if samples_per_question(kind) == 1 else 1
    model, tokenizer = models.load_pretrained(
        AutoModelForSequenceClassification, policy, "--policy", new_head=True, num_labels=outputs
    )
    with torch.no_grad():
        model.score.weight.normal_(0, (model.score.in_features + 1) ** -0.5)
    return model, tokenizer


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` answers: those to train on, and the tenth that is held out.

    An answer is on the same side in every round, so that none of the held-out ones was ever trained on.
    """
    is_held_out = np.arange(count) % 10 == min(1, count - 1)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def train(model, tokenizer, rows: list[dict], *, epochs: int, lr: float, muon: bool, seed: int) -> dict:
    """Go on training the reward model, on these answers. Returns the best epoch's metrics on held-out answers."""
    device = model.device
    texts = [[query + sample for sample in samples] for query, samples in map(question_in, rows)]
    chosen = torch.tensor([label_in(row) for row in rows], device=device)
    train_indices, held_out_indices = split(len(rows))
    if not len(train_indices):
        raise UserError("one answer is too few to learn from; give more --labels")
    max_length = models.max_length(model, tokenizer)
    ids = [supervised.encode(tokenizer, candidates, max_length) for candidates in texts]

    def loss_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        indices = train_indices[batch]
        return supervised.choice_loss(model, [ids[i] for i in indices], chosen[indices], tokenizer.pad_token_id)

    def validate() -> dict[str, float]:
        flat = [text for i in held_out_indices for text in texts[i]]
        scores = rewards.log_odds(model, tokenizer, flat, device).reshape(len(held_out_indices), -1)
        return supervised.choice_errors(scores, chosen[held_out_indices].cpu().numpy())

    rewards.reset_head(model)
    history = supervised.fit(
        model,
        [sum(map(len, ids[i])) for i in train_indices],
        loss_of,
        validate,
        supervised.FitSettings(epochs=epochs, batch_size=BATCH, lr=lr, muon=muon, seed=seed, decay_fraction=0.3),
        stage="reward model",
        device=device,
    )
    best = min(history, key=lambda metrics: metrics["loss"])
    return {"labels": len(rows), "held_out_loss": best["loss"], "held_out_error": best["error"]}


def predict_key(model, tokenizer, question: Question) -> str:
    """The key that the reward model would press."""
    texts = [question.query + sample for sample in question.samples]
    scores = rewards.log_odds(model, tokenizer, texts, model.device)
    return ("g" if scores[0] > 0 else "b") if len(texts) == 1 else str(1 + scores.argmax())
