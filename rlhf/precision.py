"""Matrix products in bfloat16, on every device that multiplies it fast, with float32 around them.

A model's body multiplies in bfloat16; its residual stream, norms and embeddings stay float32. What comes after the body
is float32 too: the vocabulary projection multiplies bfloat16 and sums in float32, because logits lie so far from 0 that
bfloat16 would round them by more than PPO's clip range.

Weights that train are float32. A frozen model holds its matrices in bfloat16 (`freeze`). A policy has a copy that does,
refreshed when its weights have changed (`LowPrecisionCopy`).
"""

import contextlib
import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

PRECISIONS = ("auto", "float32", "bfloat16")
LARGE_ENOUGH = 4_000_000  # parameters from which bfloat16 is faster on a CPU that has it (benchmarks/RESULTS.md)


def is_fast(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 faster than float32.

    Intel's avx512_bf16 does not: without AMX, which a virtual machine may hide, float32 is 1.6 times as fast.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or (known.get("avx512_bf16") and "Intel" not in known.get("cpu_name", "")))


def choose(name: str, device: torch.device, model: nn.Module) -> torch.dtype:
    """One of PRECISIONS -> the precision of this model on this device."""
    if name == "auto":
        large = device.type == "cuda" or sum(weight.numel() for weight in model.parameters()) >= LARGE_ENOUGH
        return torch.bfloat16 if large and is_fast(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def dtype_name(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


# a model's body


class _LowPrecisionBody:
    """Mixed into the class of a body: its products are in bfloat16, and what it returns is float32."""

    def forward(self, *args, **kwargs):
        with low_precision_products(self):
            out = super().forward(*args, **kwargs)
        for name, value in out.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                out[name] = value.float()
        return out


def is_bfloat16(model: nn.Module) -> bool:
    """Whether the model's body multiplies in bfloat16."""
    return isinstance(model.base_model, _LowPrecisionBody)


def body_class(body: nn.Module) -> type:
    """The class that a body has in transformers."""
    return type(body).__bases__[1] if is_bfloat16(body) else type(body)


def set_precision(model: nn.Module, precision: torch.dtype) -> None:
    """Lets the body of a model multiply in this precision; its weights stay as they are."""
    body = model.base_model
    if precision == torch.bfloat16 and not is_bfloat16(model):
        body.__class__ = type(type(body).__name__, (_LowPrecisionBody, type(body)), {})


def low_precision_products(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within it, products are in the model's precision: for code that calls a body's layers instead of the body.

    Autocast without its cache, which would keep the weights of before an optimizer step.
    """
    if is_bfloat16(model):
        return torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


# weights in bfloat16


def _matrices(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The weights and biases of the linear layers of a body: layer, name, parameter.

    On CUDA a language model's output layer is among them. On a CPU it stays float32, which oneDNN rounds while it
    multiplies: it has no product of two bfloat16 matrices with a float32 result.
    """
    layers = [layer for layer in model.base_model.modules() if isinstance(layer, (nn.Linear, Conv1D))]
    if model.device.type == "cuda" and isinstance(model.get_output_embeddings(), nn.Linear):
        layers.append(model.get_output_embeddings())
    return [(layer, name, weight) for layer in layers for name, weight in layer.named_parameters(recurse=False)]


def freeze(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """A model that will not be trained, its matrices held in this precision; returns it."""
    model.eval().requires_grad_(False)
    set_precision(model, precision)
    if is_bfloat16(model):
        for layer, name, weight in _matrices(model):
            setattr(layer, name, nn.Parameter(weight.bfloat16(), requires_grad=False))
    return model


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares all of its weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


class LowPrecisionCopy:
    """A copy of a model that trains, with the matrices that train in bfloat16 and all other weights shared with it.

    Gradients of the copy's matrices are added, in float32, to those of the model's.
    """

    def __init__(self, model: nn.Module):
        self._copy = sharing_copy(model)
        set_precision(self._copy, torch.bfloat16)
        self._weights, self._low_weights = [], []
        self.is_stale = False  # to be set when the model's weights have changed
        for layer, name, weight in _matrices(self._copy):  # these are the model's own, until replaced here
            if weight.requires_grad:  # under adapters it is frozen, and in bfloat16 already
                low = nn.Parameter(weight.detach().bfloat16())
                low.register_post_accumulate_grad_hook(_hand_over_to(weight))
                setattr(layer, name, low)
                self._weights.append(weight)
                self._low_weights.append(low)

    @torch.no_grad()
    def refreshed(self) -> nn.Module:
        """The copy, with the model's weights as they are now."""
        if self.is_stale:
            for low, weight in zip(self._low_weights, self._weights, strict=True):
                low.copy_(weight)
            self.is_stale = False
        return self._copy


def _hand_over_to(weight: nn.Parameter):
    def hook(low: nn.Parameter) -> None:
        weight.grad = low.grad.float() if weight.grad is None else weight.grad.add_(low.grad)
        low.grad = None

    return hook


# products with float32 sums


def product(x: Tensor, y: Tensor) -> Tensor:
    """x [I, J] @ y [J, K] in float32, of factors rounded to bfloat16 where the device multiplies that fast."""
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda":
            return torch.mm(x.bfloat16(), y.bfloat16(), out_dtype=torch.float32)
        with _rounded_factors():
            return x.float() @ y.float()


@contextlib.contextmanager
def _rounded_factors():
    """Lets oneDNN round float32 factors to bfloat16 where the processor has instructions for it."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
