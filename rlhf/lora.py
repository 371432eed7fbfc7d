"""LoRA (Hu et al. 2021, arXiv 2106.09685): beside every linear layer of a model's body trains a product of two thin
matrices, the adapter; all other weights stay as they were loaded, so a policy and its reference can share them.

The output layer of a language model stays as it is; a classifier's head and pooler train in full. Layers and files are
those of peft, which only a run with adapters imports.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from rlhf.errors import UserError
from rlhf.precision import freeze, sharing_copy

FOLDER = "adapter"  # inside the folder of the merged model
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
ALPHA = 2  # the adapter's product is multiplied by this: lora_alpha / rank
NAME = "default"  # peft's for the one adapter of a model


def with_adapters(model: nn.Module, rank: int, base: str) -> nn.Module:
    """A copy of a model with adapters, which at first change nothing; it shares all other weights, frozen, with it.

    base: the folder, file or hub name of the model, for the adapter's own folder.
    """
    import peft

    body, output = model.base_model, model.get_output_embeddings()
    linear = [(name, layer) for name, layer in body.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    names = "|".join(sorted({name.rpartition(".")[2] for name, _ in linear}))
    others = [(name, child) for name, child in model.named_children() if child not in (body, output)]
    heads = [name for name, child in others if list(child.parameters())]
    heads += ["pooler"] if getattr(body, "pooler", None) else []  # a checkpoint may lack it, and then it is new too
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if output is None else "CAUSAL_LM",
        r=rank,
        lora_alpha=ALPHA * rank,
        lora_dropout=0.0,
        target_modules=rf"{model.base_model_prefix}\.(.*\.)?({names})",
        modules_to_save=heads or None,
        fan_in_fan_out=isinstance(linear[0][1], Conv1D),
        base_model_name_or_path=base,
    )
    adapted = peft.inject_adapter_in_model(config, sharing_copy(model))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # whatever the layers under it are held in
    return adapted


def trained_beside(reference: nn.Module, dtype: torch.dtype, rank: int | None, base: str) -> nn.Module:
    """Freeze a reference in this precision. Returns the policy: with a rank the reference with adapters, or a copy."""
    model = None if rank else copy.deepcopy(reference)
    freeze(reference, dtype)
    return model or with_adapters(reference, rank, base)


def adapter_output(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer's adapter adds to its output for x."""
    return layer.lora_B[NAME](layer.lora_A[NAME](x)) * layer.scaling[NAME]


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def base_name(model: nn.Module) -> str:
    """The `base` of `with_adapters`."""
    return model.peft_config[NAME].base_model_name_or_path


class TrainedWeights:
    """The weights of a module that train, as an object with a state; without LoRA that is all there is in it."""

    def __init__(self, module: nn.Module):
        self._module = module

    def state_dict(self) -> dict[str, Tensor]:
        whole = self._module.state_dict(keep_vars=True)
        return {name: x.detach() for name, x in whole.items() if x.requires_grad or not isinstance(x, nn.Parameter)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != self.state_dict().keys():
            raise ValueError("its weights are those of another model")
        self._module.load_state_dict(state, strict=False)


def with_starting_weights(model: nn.Module, base: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The weights of a language model that train, each with what it was in `base`, from which the model started.

    Of adapters only the second matrix, which starts at 0: the product that is added to the base is linear in it.
    """
    if has_adapters(model):
        weights = [weight for name, weight in model.named_parameters() if ".lora_B." in name]
        return [(weight, torch.zeros_like(weight)) for weight in weights]
    return list(zip(model.parameters(), base.parameters(), strict=True))


# folders


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters, and a classifier's head, as peft does."""
    folder.mkdir()
    model.peft_config[NAME].save_pretrained(folder)
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(
        {f"base_model.model.{_without_adapters_name(name)}": weight for name, weight in weights.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )


def _without_adapters_name(name: str) -> str:
    return name.replace(f".modules_to_save.{NAME}", "").replace(f".{NAME}", "")


@torch.no_grad()
def merge(model: nn.Module, base: nn.Module) -> nn.Module:
    """Add the products of a model's adapters to the weights of `base`, a fresh copy of the model under them."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = base.get_submodule(name).weight
            weight += layer.get_delta_weight(NAME).to(weight)
        elif isinstance(layer, ModulesToSaveWrapper):
            base.get_submodule(name).load_state_dict(layer.modules_to_save[NAME].state_dict())
    base.config = copy.deepcopy(model.config)
    if base.can_generate():
        base.generation_config = model.generation_config
    return base


def base_of_folder(name: str, flag: str) -> str | None:
    """The model that a folder of adapters belongs to; None where this is no such folder."""
    file = Path(name) / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag} {name}: its {CONFIG_FILE} names no base model ({error!r})") from error


def merge_folder(base: nn.Module, name: str, flag: str) -> nn.Module:
    """A model with the adapters of a folder merged into it."""
    import peft

    try:
        with warnings.catch_warnings(action="ignore"):  # peft asks transformers by a deprecated name
            return peft.PeftModel.from_pretrained(base, name).merge_and_unload()
    except Exception as error:
        raise UserError(f"{flag} {name}: its adapters cannot be loaded: {error}") from error
