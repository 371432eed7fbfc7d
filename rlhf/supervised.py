"""The supervised training loop of train_cls.py and train_nlg.py."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf import checkpoint, distributed
from rlhf.checkpoint import Keep
from rlhf.errors import UserError
from rlhf.optim import Muon, inner_matrices, set_lr
from rlhf.policy import token_logits
from rlhf.runtime import TOLERATED, progress

LEARNED = 0.05  # nats: the loss below which a row counts as learned


def encode(tokenizer, texts: list[str], max_length: int, end: bool = False) -> list[list[int]]:
    """Token ids of every text, cut to `max_length`; with `end`, an end-of-text token closes those that lack one."""
    rows = tokenizer(texts)["input_ids"]
    stop = tokenizer.eos_token_id
    rows = [[*row, stop] if end and row[-1:] != [stop] else row for row in rows]
    return [row[:max_length] for row in rows]


def pad(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows padded on the right: ids and mask, [B, T] each."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def lm_loss(model, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of texts [B, T] after their first token, and the number of tokens, [B] each."""
    predicted = mask[:, 1:]
    real = predicted.bool()
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    logits = token_logits(model, hidden[real], temperature=1.0)
    losses = cross_entropy(logits, ids[:, 1:][real], reduction="none")
    return torch.zeros(real.shape, device=ids.device).masked_scatter(real, losses).sum(1), predicted.sum(1)


def choice_loss(
    model, rows: list[list[list[int]]], chosen: Tensor, pad_id: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of choices [B], and how many choices that is, [B] each.

    A row holds the token ids of one text, whose label a model with two outputs chooses, or of several candidates, the
    best of which a model with one output chooses: softmax over the candidates' scores, [1], equation 1. A choice that
    is learned has loss 0, whatever the smoothing.
    """
    inputs, mask = pad([ids for row in rows for ids in row], pad_id, chosen.device)
    logits = model(input_ids=inputs, attention_mask=mask).logits.float().view(len(rows), -1)
    kinds = logits.shape[1]
    smoothed = torch.full((kinds,), label_smoothing / kinds)
    smoothed[0] += 1 - label_smoothing
    least = float(torch.special.entr(smoothed).sum())
    losses = cross_entropy(logits, chosen, reduction="none", label_smoothing=label_smoothing) - least
    return losses, torch.ones_like(losses)


def choice_log_loss(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """-log softmax(scores)[chosen] of scores [N, candidates], [N]; of log-odds [N, 1], with label 1 for positive."""
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], 1)
    return np.logaddexp.reduce(scores, 1) - scores[np.arange(len(chosen)), chosen]


def choice_errors(scores: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """What `fit` asks after an epoch: the mean loss and the share of wrong choices."""
    said = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1)
    return {"loss": float(choice_log_loss(scores, chosen).mean()), "error": float(np.mean(said != chosen))}


def make_optimizers(model: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon`, Muon for the matrices of the model's body.

    Whether an act is right depends on two things together, which a small new model is slow to see; Muon hurries it.
    """
    matrices = inner_matrices(model) if muon else []
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    if not matrices:
        return [adamw]
    return [Muon(matrices, lr, weight_decay=0.01), adamw]


def one_pass(
    lengths: np.ndarray, losses: np.ndarray, batch_size: int, revisit: float, order: np.random.Generator
) -> list[list[int]]:
    """Row numbers in random batches of rows of similar length, so that little of a batch is padding.

    Of the rows whose last loss says that they are learned, a pass takes only the share `revisit`.
    """
    rows = np.flatnonzero((losses > LEARNED) | (order.random(len(losses)) < revisit))
    rows = order.permutation(rows if len(rows) else len(losses))
    pools = np.array_split(rows, max(1, len(rows) // (8 * batch_size)))
    rows = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = np.array_split(rows, -(-len(rows) // batch_size))
    return [batches[i].tolist() for i in order.permutation(len(batches))]


def fit(
    model: nn.Module,
    lengths: list[int],
    loss_of: Callable[[list[int]], tuple[Tensor, Tensor]],
    validate: Callable[[], dict[str, float]],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    muon: bool,
    device: torch.device,
    seed: int,
    decay: float,
    label: str,
    keep: Keep,
    saved: dict | None,
    revisit: float = 1.0,
    lowest: str = "loss",
) -> list[dict[str, float]]:
    """Train `model` on batches of row numbers.

    `lengths` are those of all rows; loss_of a batch is the loss of each of its rows, summed over what the row has to
    predict, and how much that is, [B] each.
    An epoch is as many steps as all rows fill. The learning rate rises over the first twentieth of the steps, and
    falls to 0 over the last part, `decay`, of them. `keep` is called after every step, and `saved` is what it saved of
    a fit with this label, to go on from; one of another label changes nothing.
    Returns what `validate` said after every epoch; the model ends with the weights for which `lowest` of it was lowest.
    """
    optimizers, per_epoch = make_optimizers(model, lr, muon), -(-len(lengths) // batch_size)
    steps, lengths, order = epochs * per_epoch, np.array(lengths), np.random.default_rng(seed)
    losses = torch.full((len(lengths),), torch.inf, dtype=torch.float64)  # of every row when it was last seen
    run = {"done": 0, "total": 0.0, "skipped": 0, "waiting": [], "history": [], "best": None, "losses": losses}
    if saved and saved["label"] == label:
        run = restore(saved, model, optimizers, order)

    def state() -> dict:
        """What a checkpoint holds."""
        own = {"label": label, "model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers]}
        return run | own | {"order": order.bit_generator.state, "random": checkpoint.random_states()}

    bar = progress(label, "step", run["done"], steps)
    for step in bar:
        model.train()
        set_lr(optimizers, lr * share_of_lr(step - 1, steps, decay))
        run["waiting"] = run["waiting"] or one_pass(lengths, run["losses"].numpy(), batch_size, revisit, order)
        batch = run["waiting"].pop(0)
        mine = distributed.share(batch)
        row_losses, predicted = loss_of(mine) if mine else nothing(device)
        loss, finite = learn(model, optimizers, row_losses, predicted)
        run["skipped"] = 0 if finite else run["skipped"] + 1
        if run["skipped"] == TOLERATED:
            what = "gradient" if row_losses.isfinite().all() else "loss"
            raise UserError(f"{label}, step {step}: the {what} is not finite, {TOLERATED} times in a row; lower --lr")
        if finite:
            seen = distributed.gather((row_losses.detach() / predicted).tolist())
            run["losses"][batch] = torch.tensor(seen, dtype=torch.float64)
            run["total"] += loss
        epoch, count = divmod(step - 1, per_epoch)
        bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {run['total'] / (count + 1):.3f}", refresh=False)
        if count + 1 == per_epoch:
            model.eval()
            found = {"epoch": epoch + 1, "train_loss": run["total"] / per_epoch} | validate()
            bar.write(f"{label}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
            end_epoch(run, model, found, lowest)
        run["done"] = step
        keep(step, state)
    model.eval()
    model.load_state_dict(run["best"][1])
    return run["history"]


def end_epoch(run: dict, model: nn.Module, found: dict[str, float], lowest: str) -> None:
    """Notes what was found, and keeps the weights if `lowest` of it is the lowest so far."""
    run["history"].append(found)
    run["total"] = 0.0
    if run["best"] is None or found[lowest] < run["best"][0]:
        run["best"] = found[lowest], copy.deepcopy(model.state_dict())


def restore(saved: dict, model: nn.Module, optimizers: list[torch.optim.Optimizer], order: np.random.Generator) -> dict:
    """Puts everything back as it was, and returns how far it was."""
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    order.bit_generator.state = saved["order"]
    checkpoint.set_random_states(saved["random"])
    return {name: saved[name] for name in ("done", "total", "skipped", "waiting", "history", "best", "losses")}


def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """The losses of a process that has no rows of a batch, and how much these had to predict."""
    return torch.zeros(0, device=device, requires_grad=True), torch.zeros(0, dtype=torch.long, device=device)


def share_of_lr(step: int, steps: int, decay: float) -> float:
    """The learning rate after `step` of the steps, as a share of its peak."""
    return min((step + 1) / (0.05 * steps + 1), 1, (1 - step / steps) / decay)


def learn(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], row_losses: Tensor, predicted: Tensor
) -> tuple[float, bool]:
    """One step on the losses of B rows, each summed over `predicted` things, [B]: the mean, and whether it was taken.

    A step that is not finite never reaches the weights. The rows of other processes count too.
    """
    parameters = list(model.parameters())
    all_predicted = distributed.total(predicted.detach().sum())
    (row_losses.sum() / all_predicted).backward()
    distributed.add_gradients(parameters)
    finite = bool(nn.utils.clip_grad_norm_(parameters, 1.0).isfinite())
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    return (distributed.total(row_losses.detach().sum()) / all_predicted).item(), finite


@torch.no_grad()
def perplexity(model, rows: list[list[int]], pad_id: int, device: torch.device, batch: int = 64) -> dict[str, float]:
    """Of texts given as token ids: "loss" in nats a token, and its exponential."""
    rows, total, count = sorted(rows, key=len), 0.0, 0
    for start in range(0, len(rows), batch):
        ids, mask = pad(rows[start : start + batch], pad_id, device)
        losses, predicted = lm_loss(model, ids, mask)
        total, count = total + losses.sum().item(), count + predicted.sum().item()
    return {"loss": total / count, "perplexity": float(np.exp(total / count))}
