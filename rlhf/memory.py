"""An estimate of the memory of a PPO run from configurations alone: its models are made without weights, and what a
forward pass keeps for the gradient is counted.

Every response is taken to be as long as it may be. What Python, torch and the device's own libraries hold is left out.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from rlhf import activations, fast_path, lora, precision, vocabulary
from rlhf.muon import inner_matrices
from rlhf.policy import PolicyWithValue
from rlhf.sampling import make_room
from rlhf.vocabulary import logprobs_and_kl

GIB, FLOAT, HALF = 2**30, 4, 2  # bytes
LABELS = ("weights", "gradients", "optimizer", "rollout", "activations", "peak")


@dataclass(frozen=True)
class Settings:
    """The flags that decide about the memory of a process, besides those of its models."""

    device: str
    precision: str
    batch_size: int
    minibatches: int
    forward_batch: int
    query_length: int
    response_length: int
    optimizer: str
    lora: int | None
    activation_checkpointing: bool
    separate_value: bool

    @property
    def on(self) -> torch.device:
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")

    @property
    def rows(self) -> int:  # of a minibatch
        return -(-self.batch_size // self.minibatches)


@dataclass(frozen=True)
class Estimate:
    """Bytes. Not all of them are there at the same time."""

    weights: int  # of policy, reference, value network and reward models
    gradients: int
    optimizer: int
    rollout: int  # at most, while it is sampled
    activations: int  # kept of a forward batch for the gradient, the vocabulary's part included
    peak: int

    def table(self) -> str:
        rows = [f"{label:<12}{getattr(self, label) / GIB:8.2f} GiB" for label in LABELS]
        return "\n".join(rows)


class _WithoutMemory(FakeTensorMode):
    """Tensors made within it have shapes but no memory; a copy of one belongs to the same mode."""

    def __deepcopy__(self, memo: dict) -> "_WithoutMemory":
        return self


def estimate(config: PretrainedConfig, rewards: Sequence[PretrainedConfig], settings: Settings) -> Estimate:
    """The memory of finetuning_nlg.py with a policy and reward models of these configurations."""
    with warnings.catch_warnings(action="ignore"), _WithoutMemory():
        reference, trained, dtype, loading = _models(config, settings)
        weights = _bytes([reference, trained, *_computing(trained)]) + _output_layers(trained.model, dtype, settings)
        weights += sum(_reward_bytes(each, settings) for each in rewards)
        gradients, optimizer, of_a_step = _training(trained, settings)
        prompts = _prompts(_computing(trained)[0], settings)
        of_layers, of_vocabulary, at_work, first_gradients = _forward_batch(trained, reference, settings)
    sampled, kept = _rollout(config, dtype, settings)
    sampled = max(sampled, prompts)
    earlier_gradients = gradients if settings.rows > settings.forward_batch else first_gradients
    update = max(
        of_layers + of_vocabulary + at_work + earlier_gradients,  # the last backward pass begins
        gradients + first_gradients,  # it ends with the embeddings, whose gradient is as large as the output layer's
        gradients + of_a_step,
    )
    peak = max(loading, weights + optimizer + max(sampled, kept + update))
    return Estimate(weights, gradients, optimizer, sampled, of_layers + of_vocabulary, peak)


# models


def _models(config: PretrainedConfig, settings: Settings) -> tuple[nn.Module, PolicyWithValue, torch.dtype, int]:
    """As `task.load` makes them; and the bytes of the model as it is loaded, in float32."""
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # whatever it was saved in
        loading = _bytes([reference])
        dtype = _precision(reference, settings)
        model = lora.trained_beside(reference, dtype, settings.lora, base="")
    _put_on_cpu([reference, model])  # where attention is the one that a run takes; on meta it is another
    return reference, PolicyWithValue(model, settings.separate_value, dtype).eval(), dtype, loading


def _put_on_cpu(models: list[nn.Module]) -> None:
    """Move the weights and buffers of models, some of which they share, from meta to the CPU, still without memory."""
    moved = {}
    for layer in (layer for model in models for layer in model.modules()):
        for tensors in (layer._parameters, layer._buffers):
            for name, x in tensors.items():
                if x is not None and x.device.type == "meta":
                    new = torch.empty_like(x, device="cpu")
                    is_weight = tensors is layer._parameters
                    new = nn.Parameter(new, x.requires_grad) if is_weight else new
                    tensors[name] = moved.setdefault(id(x), new)


def _computing(trained: PolicyWithValue) -> list[nn.Module]:
    """The copies in bfloat16 of what trains, or the models themselves."""
    return [trained.in_precision(model) for model in (trained.model, trained.value_model) if model is not None]


def _reward_bytes(config: PretrainedConfig, settings: Settings) -> int:
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return _bytes([precision.freeze(model, _precision(model, settings))])


def _precision(model: nn.Module, settings: Settings) -> torch.dtype:
    """As precision.choose; a CUDA device that is not there multiplies bfloat16, as all that are sold do."""
    if settings.precision == "auto" and settings.on.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return precision.choose(settings.precision, settings.on, model)


def _output_layers(model: nn.Module, dtype: torch.dtype, settings: Settings) -> int:
    """What the output layers in bfloat16 take beyond those of a CPU, which hold float32: the frozen model's own, and
    the copy of one that trains."""
    if settings.on.type != "cuda" or dtype != torch.bfloat16:
        return 0
    weight = model.get_output_embeddings().weight
    is_tied = weight is model.get_input_embeddings().weight  # then the embeddings stay as they are
    frozen = HALF * weight.numel() - (0 if is_tied else FLOAT * weight.numel())
    return frozen + (0 if settings.lora else HALF * weight.numel())


def _bytes(modules: list[nn.Module]) -> int:
    """Of all their weights; shared ones count once."""
    weights = {id(weight): weight.nbytes for module in modules for weight in module.parameters()}
    return sum(weights.values())


def _training(trained: PolicyWithValue, settings: Settings) -> tuple[int, int, int]:
    """Bytes of gradients, of the optimizer's state, and of what a step of Muon needs while it is taken."""
    gradients = sum(FLOAT * weight.numel() for weight in trained.parameters() if weight.requires_grad)
    if settings.optimizer != "muon":
        return gradients, 2 * gradients, 0  # Adam's two moments
    matrices, by_shape = inner_matrices(trained.model), {}
    for matrix in matrices:
        shape = tuple(sorted(matrix.shape))
        by_shape[shape] = by_shape.get(shape, 0) + FLOAT * matrix.numel()
    of_matrices = sum(by_shape.values())
    return gradients, 2 * gradients - of_matrices, 4 * max(by_shape.values())  # updates, stacked, and two products


# the update


def _forward_batch(trained: PolicyWithValue, reference, settings: Settings) -> tuple[int, int, int, int]:
    """Of a forward batch, in bytes: what the layers keep, what the vocabulary keeps, what is in work when the backward
    pass begins, and the gradients of the output layer, which come first."""
    rows = min(settings.forward_batch, settings.rows)
    shape = rows, settings.query_length + settings.response_length
    real = rows * settings.response_length
    bodies, of_layers, of_one_layer = _computing(trained), 0, 0
    for model in bodies:
        count = model.config.num_hidden_layers
        plain = _saved_bytes(lambda model=model: _states(model, shape, real), [model])
        of_one_layer = max(of_one_layer, plain // count)
        if settings.activation_checkpointing:
            activations.checkpoint_layers(model)
            plain = _saved_bytes(lambda model=model: _states(model, shape, real), [model])
        of_layers += plain
    states = torch.empty(real, reference.config.hidden_size, requires_grad=True)
    ids, totals = torch.zeros(real, dtype=torch.long), torch.empty(real)
    says = states, reference, states.detach(), totals, ids
    of_vocabulary = _saved_bytes(lambda: logprobs_and_kl(bodies[0], *says, 1.0)[0], [bodies[0], reference])
    head = bodies[0].get_output_embeddings().weight
    of_head = FLOAT * head.numel() if trained.model.get_output_embeddings().weight.requires_grad else 0
    logits = FLOAT * real * len(head)
    chunk = min(vocabulary.CHUNK_BYTES[settings.on.type], logits)
    waiting = min(vocabulary.KEPT_BYTES, 2 * logits) if of_head else 0  # as in HeadGradient, and joined
    recomputed = of_one_layer if settings.activation_checkpointing else 0
    return of_layers, of_vocabulary, max(2 * chunk + waiting, of_one_layer + recomputed), of_head


def _states(model, shape: tuple[int, int], real: int) -> Tensor:
    """The hidden states at `real` of the tokens of a batch of this shape, without padding."""
    ids = torch.zeros(shape, dtype=torch.long)
    positions, places = torch.arange(shape[1]).expand(shape), torch.arange(real)
    if fast_path.is_supported(model.base_model):
        every = torch.arange(ids.numel())
        return fast_path.packed_states(model.base_model, ids.flatten(), positions.flatten(), every, places, shape)
    out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return fast_path.Take.apply(out.last_hidden_state.flatten(0, 1), places)


def _saved_bytes(forward: Callable[[], Tensor], models: list[nn.Module]) -> int:
    """What a forward pass of these models keeps for the backward pass, without their weights."""
    weights = {weight.untyped_storage()._cdata for model in models for weight in model.parameters()}
    kept = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:  # of a weight a view may be kept
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(note, lambda x: x):
        result = forward()  # while it is there, nothing that it keeps is freed
    del result
    return sum(kept.values())


# the rollout


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors while they are there, but for weights; `peak` is the most so far."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.peak, self._now, self._known = 0, 0, weights

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self._now += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(x.untyped_storage(), self._freed, key, x.untyped_storage().nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)  # another tensor may get it
        self._now -= size


def _prompts(model, settings: Settings) -> int:
    """Bytes while all queries of a batch go through the model at once, as `sampling.sample` begins."""
    ids = torch.zeros(settings.batch_size, settings.query_length, dtype=torch.long)
    positions = torch.arange(settings.query_length).expand_as(ids)
    with _Live({weight.untyped_storage()._cdata for weight in model.parameters()}) as live, torch.no_grad():
        out = model.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=True
        )
        make_room(out.past_key_values, settings.response_length)
    return live.peak


def _rollout(config: PretrainedConfig, dtype: torch.dtype, settings: Settings) -> tuple[int, int]:
    """Bytes while the responses are sampled (cache, states, and the logits of a token), and of what stays."""
    text = config.get_text_config()
    rows, tokens = settings.batch_size, settings.query_length + settings.response_length
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * rows * tokens * heads * width * dtype.itemsize
    states = FLOAT * rows * settings.response_length * text.hidden_size
    logits = 3 * FLOAT * rows * text.vocab_size  # logits, their softmax and its cumulative sum
    kept = states + FLOAT * rows * (8 * settings.response_length + settings.query_length * text.hidden_size)
    return cache + states + logits, kept
