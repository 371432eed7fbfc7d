"""Supervised training: the losses of the generator and of the reward model, and the loop that minimises them.

Shapes: B rows of a batch, T tokens, N rows of a data set. A row is what one loss belongs to: a text, or several texts
of which one is the best. A row's targets are what the model predicts: the tokens of a text, or one choice.
"""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf import activations, distributed, lora, precision, recipes, runtime
from rlhf.checkpoint import Checkpoints, RandomState
from rlhf.errors import UserError
from rlhf.forward import classifier_logits, hidden_states
from rlhf.lora import TrainedWeights
from rlhf.optim import Optimizer, supervised_optimizer
from rlhf.recipes import Recipe
from rlhf.vocabulary import token_logprobs

LEARNED = 0.05  # nats: the loss below which a row counts as learned
WARMUP = 0.05  # the fraction of the steps over which the learning rate rises


def prepare(
    args: argparse.Namespace, model: nn.Module, recipe: Recipe, device: torch.device
) -> tuple[nn.Module, torch.dtype]:
    """The model on the device as the flags want it: its adapters, its activations, its precision, which it returns."""
    model.to(device)
    dtype = precision.choose(args.precision, device, model)
    runtime.print_device(device, dtype)
    print(recipes.summary(args, recipe, args.model))
    if args.lora:
        model = lora.with_adapters(precision.freeze(model, dtype), args.lora, args.model)
    if args.activation_checkpointing:
        activations.checkpoint_layers(model)
    precision.set_precision(model, dtype)
    return model, dtype


# token ids


def encode(tokenizer, texts: list[str], max_length: int, end_of_text: bool = False) -> list[list[int]]:
    """Token ids of every text, `max_length` at most. With `end_of_text`, the token of this name follows them."""
    rows = tokenizer(texts)["input_ids"]
    eos_id = tokenizer.eos_token_id
    rows = [[*row, eos_id] if end_of_text and row[-1:] != [eos_id] else row for row in rows]
    return [row[:max_length] for row in rows]


def pad(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right: ids and mask, [B, T] each."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def reads_ahead(body) -> bool:
    """Whether a model's body is an encoder: what it says of a token depends on the tokens behind it."""
    states = body(torch.tensor([[0, 0], [0, 1]], device=body.device)).last_hidden_state[:, 0]
    return not torch.allclose(states[0], states[1], atol=1e-4)


# losses


def lm_loss(
    model, ids: Tensor, mask: Tensor, target_mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of texts [B, T], in nats, and its number of tokens, [B] each.

    target_mask [B, T]: the tokens that count, by default all; a text's first token never does.
    """
    target_mask = (mask if target_mask is None else target_mask)[:, 1:]
    is_target = target_mask.bool()
    rows, columns = is_target.nonzero(as_tuple=True)  # of the tokens before the targets
    states = hidden_states(model, ids, mask, rows * ids.shape[1] + columns)
    logprobs = token_logprobs(model, states, ids[:, 1:][is_target], temperature)
    by_position = torch.zeros(is_target.shape, device=ids.device).masked_scatter(is_target, logprobs)
    return -by_position.sum(1), target_mask.sum(1)


@torch.no_grad()
def perplexity(model, rows: list[list[int]], pad_id: int, device: torch.device, batch: int = 64) -> dict[str, float]:
    """Of texts, given as token ids: "loss" in nats per token, and "perplexity", its exponential."""
    rows, loss, tokens = sorted(rows, key=len), 0.0, 0
    for start in range(0, len(rows), batch):
        ids, mask = pad(rows[start : start + batch], pad_id, device)
        losses, counts = lm_loss(model, ids, mask)
        loss, tokens = loss + losses.sum().item(), tokens + counts.sum().item()
    if not tokens:
        raise UserError("language modelling needs texts of two tokens and more; give other texts, or --max-length 2")
    return {"loss": loss / tokens, "perplexity": float(np.exp(loss / tokens))}


def choice_loss(
    model, rows: list[list[list[int]]], chosen: Tensor, pad_id: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the choices `chosen` [B] in nats, and the number of choices (1), [B] each.

    A row holds the token ids of one text, whose label a model with two outputs predicts; or those of several texts,
    the best of which a model with one output predicts: softmax over their scores ([1], equation 1). The smallest loss
    is 0, whatever the smoothing.
    """
    ids, mask = pad([text for row in rows for text in row], pad_id, chosen.device)
    logits = classifier_logits(model, {"input_ids": ids, "attention_mask": mask}).float().view(len(rows), -1)
    options = logits.shape[1]
    smoothed = torch.full((options,), label_smoothing / options)
    smoothed[0] += 1 - label_smoothing
    smallest = float(torch.special.entr(smoothed).sum())
    losses = cross_entropy(logits, chosen, reduction="none", label_smoothing=label_smoothing) - smallest
    return losses, torch.ones_like(losses)


def choice_log_loss(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """-log softmax(scores)[chosen], [N], of scores [N, candidates]; of log-odds [N, 1], where label 1 is positive."""
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], 1)
    return np.logaddexp.reduce(scores, 1) - scores[np.arange(len(chosen)), chosen]


def choice_errors(scores: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """Of scores [N, candidates] or log-odds [N, 1]: "loss", the mean, and "error", the fraction of wrong choices."""
    predicted = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1)
    return {"loss": float(choice_log_loss(scores, chosen).mean()), "error": float(np.mean(predicted != chosen))}


# the loop


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains."""

    epochs: int  # an epoch is as many steps as all rows fill
    batch_size: int  # rows per step, of all processes together
    lr: float  # peak learning rate
    muon: bool  # Muon for the matrices inside the model, AdamW for the rest; otherwise AdamW for all
    seed: int  # of the order of the rows
    decay_fraction: float = 1.0  # the fraction of the steps, at the end, over which the learning rate falls to 0
    revisit: float = 1.0  # the probability that a pass takes a row that is learned
    select_by: str = "loss"  # the validation metric whose lowest value decides which epoch's weights are the result


def fit(
    model: nn.Module,
    lengths: list[int],
    loss_of: Callable[[list[int]], tuple[Tensor, Tensor]],
    validate: Callable[[], dict[str, float]],
    settings: FitSettings,
    *,
    stage: str,
    device: torch.device,
    checkpoints: Checkpoints | None = None,
) -> list[dict[str, float]]:
    """Train `model` on batches of row numbers. Returns the metrics of every epoch; the best epoch's weights remain.

    lengths: of all rows, in tokens. loss_of: row numbers -> the losses of these rows, each summed over the row's
    targets, and the numbers of targets, [B] each. validate: the validation metrics of the model as it is. stage: the
    name of this fit on the progress bar and in checkpoints.
    """
    optimizer, weights = supervised_optimizer(model, settings.lr, settings.muon), TrainedWeights(model)
    batches, progress = Batches(lengths, settings.batch_size, settings.revisit, settings.seed), Progress()
    state = {
        "model": weights,
        "optimizer": optimizer,
        "batches": batches,
        "progress": progress,
        "random": RandomState(),
    }
    if checkpoints:
        checkpoints.restore(state, stage)
    steps_per_epoch = -(-len(lengths) // settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    bar = runtime.progress(stage, "step", progress.steps_taken, steps)
    for step in bar:
        model.train()
        optimizer.set_lr(settings.lr * lr_factor(step - 1, steps, settings.decay_fraction))
        batch = batches.take()
        shard = distributed.shard(batch)
        row_losses, target_counts = loss_of(shard) if shard else no_losses(device)
        loss, is_finite = take_step(optimizer, row_losses, target_counts)
        if is_finite:
            batches.record(batch, distributed.gather((row_losses.detach() / target_counts).tolist()))
        progress.end_step(loss, is_finite)
        if progress.skipped == runtime.TOLERATED:
            what = "gradient" if row_losses.isfinite().all() else "loss"
            raise UserError(
                f"{stage}, step {step}: the {what} is not finite, {runtime.TOLERATED} times in a row; lower --lr"
            )
        epoch, steps_before = divmod(step - 1, steps_per_epoch)
        mean_loss = progress.epoch_loss / (steps_before + 1)
        bar.set_postfix_str(f"epoch {epoch + 1}/{settings.epochs}, loss {mean_loss:.3f}", refresh=False)
        if steps_before + 1 == steps_per_epoch:
            model.eval()
            metrics = {"epoch": epoch + 1, "train_loss": mean_loss} | validate()
            bar.write(f"{stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            progress.end_epoch(metrics, settings.select_by, weights)
        if checkpoints:
            checkpoints.after_step(step, state, stage)
    model.eval()
    if progress.best_weights is None:
        raise UserError(f"{stage}: the loss on validation texts is not finite after any epoch; lower --lr")
    weights.load_state_dict(progress.best_weights)
    return progress.history


def lr_factor(step: int, steps: int, decay_fraction: float) -> float:
    """The learning rate after `step` of `steps` steps, relative to its peak."""
    return min((step + 1) / (WARMUP * steps + 1), 1, (1 - step / steps) / decay_fraction)


def take_step(optimizer: Optimizer, row_losses: Tensor, target_counts: Tensor) -> tuple[float, bool]:
    """Take a step on the mean loss per target of the rows of all processes, of which this one has B.

    Returns the mean, and whether the gradient was finite; if it was not, the weights stay as they are.
    """
    targets = distributed.all_reduce(target_counts.detach().sum())
    (row_losses.sum() / targets).backward()
    is_finite = bool(optimizer.step().isfinite())
    return (distributed.all_reduce(row_losses.detach().sum()) / targets).item(), is_finite


def no_losses(device: torch.device) -> tuple[Tensor, Tensor]:
    """The losses and target counts of a process that has no rows of a batch."""
    return torch.zeros(0, device=device, requires_grad=True), torch.zeros(0, dtype=torch.long, device=device)


class Batches:
    """Random batches of row numbers, pass after pass, and the last loss of every row."""

    def __init__(self, lengths: list[int], batch_size: int, revisit: float, seed: int):
        self._lengths, self._batch_size, self._revisit = np.array(lengths), batch_size, revisit
        self._rng = np.random.default_rng(seed)
        self._waiting: list[list[int]] = []  # batches of the present pass
        self._losses = torch.full((len(lengths),), torch.inf, dtype=torch.float64)  # per target, when last seen

    def take(self) -> list[int]:
        """The next batch."""
        if not self._waiting:
            self._waiting = one_pass(self._lengths, self._losses.numpy(), self._batch_size, self._revisit, self._rng)
        return self._waiting.pop(0)

    def record(self, batch: list[int], losses: list[float]) -> None:
        """Note the losses per target of a batch's rows."""
        self._losses[batch] = torch.tensor(losses, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._rng.bit_generator.state, "waiting": self._waiting, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._waiting, self._losses = state["waiting"], state["losses"]


def one_pass(
    lengths: np.ndarray, losses: np.ndarray, batch_size: int, revisit: float, rng: np.random.Generator
) -> list[list[int]]:
    """Random batches of row numbers. The rows of a batch have similar lengths, so that little of it is padding.

    lengths, losses: of all rows, [N] each. A pass takes a row that is learned with probability `revisit`.
    """
    rows = np.flatnonzero((losses > LEARNED) | (rng.random(len(losses)) < revisit))
    rows = rng.permutation(rows if len(rows) else len(losses))
    pools = np.array_split(rows, max(1, len(rows) // (8 * batch_size)))
    rows = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.array_split(rows, -(-len(rows) // batch_size))
    return [batches[i].tolist() for i in rng.permutation(len(batches))]


class Progress:
    """How far a fit is, and its best weights so far."""

    def __init__(self):
        self.steps_taken = 0
        self.epoch_loss = 0.0  # sum of the losses of the present epoch's steps
        self.skipped = 0  # steps in a row that were skipped, up to the last one
        self.history: list[dict[str, float]] = []  # metrics of every epoch
        self.best_value = math.inf  # of the metric to select by
        self.best_weights: dict[str, Tensor] | None = None

    def end_step(self, loss: float, is_finite: bool) -> None:
        self.steps_taken += 1
        self.skipped = 0 if is_finite else self.skipped + 1
        if is_finite:
            self.epoch_loss += loss

    def end_epoch(self, metrics: dict[str, float], select_by: str, weights: TrainedWeights) -> None:
        """Note the metrics, and copy the weights if they are the best so far."""
        self.history.append(metrics)
        self.epoch_loss = 0.0
        if math.isfinite(metrics["loss"]) and metrics[select_by] < self.best_value:
            self.best_value, self.best_weights = metrics[select_by], copy.deepcopy(weights.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
