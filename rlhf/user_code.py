"""Functions of the user's own, named as FILE.py:FUNCTION: loading them, and telling their mistakes in one line."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.errors import UserError


def is_function(spec: str) -> bool:
    return ".py:" in spec or spec.endswith(".py")


def file_and_function(spec: str, flag: str) -> tuple[str, str]:
    """The file, which is there, and the function of FILE.py:FUNCTION."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        lacking = "it names no function" if Path(spec).is_file() else f"there is no file {file or spec}"
        raise UserError(f"{flag} {spec}: {lacking}; give FILE.py:FUNCTION")
    return file, name


def load_function(spec: str, flag: str) -> Callable:
    """FILE.py:FUNCTION"""
    file, name = file_and_function(spec, flag)
    module_spec = importlib.util.spec_from_file_location(f"rlhf_user_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses look for the module that they are defined in
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise UserError(f"{flag} {spec} cannot be loaded: {error!r}") from error
    if not callable(function):
        raise UserError(f"{flag} {spec}: {name} is {function!r}, not a function; name one of {file}")
    return function


def load_judge_function(spec: str) -> Callable[[list[str]], np.ndarray]:
    """The function from texts to verdicts [N, 2] of FILE.py:FUNCTION, which takes one text and returns (valid, label).

    The label is 1 for an ethical text. A UserError says where the function fails or returns something else.
    """
    function = guarded(load_function(spec, "--gold"), f"--gold {spec}")

    def verdict(text: str) -> tuple[float, float]:
        answer = function(text)
        try:
            valid, label = answer
            numbers = float(valid), float(label or 0)  # an invalid text may have the label None
        except (TypeError, ValueError):
            numbers = (np.nan, np.nan)
        if not np.isfinite(numbers).all():
            raise UserError(f"--gold {spec} gave {answer!r} for the text {text!r}; it must return (valid, label)")
        return numbers

    def judge(texts: list[str]) -> np.ndarray:
        return np.array([verdict(text) for text in texts], dtype=float).reshape(-1, 2)

    return judge


def checked(score: Callable[..., Any], name: str) -> Callable[..., np.ndarray]:
    """The same, with a UserError, which begins with `name`, where it fails or does not give one finite number for every
    text. The texts are its last argument."""
    numbers = guarded(lambda *arguments: np.asarray(score(*arguments), dtype=float), name)

    def checked_score(*arguments: list[str]) -> np.ndarray:
        scores, texts = numbers(*arguments), arguments[-1]
        if scores.shape != (len(texts),):
            raise UserError(f"{name} gave scores of shape {scores.shape} for {len(texts)} texts")
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))[0]
            raise UserError(f"{name} gave {scores[bad]} for the text {texts[bad]!r}")
        return scores

    return checked_score


def guarded(function: Callable, name: str) -> Callable:
    """The same, with a UserError, which begins with `name`, where it fails: it may be the user's own code."""

    def guarded_function(*arguments):
        try:
            return function(*arguments)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(f"{name} failed: {error!r}") from error

    return guarded_function
