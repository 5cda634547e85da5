"""What eval.py asks: models by any name, loaded one after the other.

    arms = find_arms(["toy", "runs/one", "adapter", "google/gemma-2-9b-it"])
    for arm, model in loaded(arms, shared_settings(arms)):

An arm is a run of train.py, an adapter in PEFT's layout, or a checkpoint (a folder, a hub
repository, "toy"). A run or an adapter by itself is compared with the model that it began with.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import lora
from data import Tokenizer, load_tokenizer
from model import PRESETS, Gemma2, load_config, load_model
from run import parallel
from run.files import InputError, locate, read_json
from run.places import check_places, is_gone, moved_settings
from run.session import FINISHED, limit_threads
from run.settings import (RECIPES, absolute, base_of, model_folder, resolve,
                          saved_settings)


@dataclass
class Arm:
    name: str                               # of its column
    base: str                               # a checkpoint: "toy", a folder, a hub repository
    adapter: str | None = None              # goes on top: a folder or repository in PEFT's layout
    run: SimpleNamespace | None = None      # the settings of a run of train.py

    @property
    def place(self) -> str:
        return self.adapter or self.base


def find_arms(places: Sequence[str], model: str | None = None, data: str | None = None
              ) -> list[Arm]:
    """An Arm for each place, each place once. `model` is the base of adapters (default: the one
    that they name). Of a single run or adapter: "base" and "adapter". `model` and `data` are also
    those of a run whose own have moved. Raises InputError."""
    arms = [find_arm(place, model, data) for place in dict.fromkeys(places)]
    if len(arms) == 1 and (arms[0].adapter or arms[0].run):
        arms[0].name = "adapter"
        base = arms[0].run.model if arms[0].run else arms[0].base
        return [Arm("base", base), *arms]
    names = [arm.name for arm in arms]
    for arm, place in zip(arms, dict.fromkeys(places)):
        if names.count(arm.name) > 1:       # runs/a/seed-0 and runs/b/seed-0
            arm.name = place
    return arms


def find_arm(place, model, data):
    path = Path(place).expanduser()
    name = path.name or place
    is_folder = path.is_dir() and place not in RECIPES
    # A run's config.json is not that of a checkpoint
    if is_folder and "settings" in read_json_if_there(path / "config.json"):
        if not (path / FINISHED).exists():
            raise InputError(f"{place} isn't finished: go on with `python train.py --resume "
                             f"{place}`")
        settings = saved_settings(path)
        moved = {"model": model, "data": data}
        moved = {name: absolute(now) for name, now in moved.items()
                 if now and is_gone(getattr(settings, name))}
        settings = moved_settings(path, moved)
        if settings.method == "full":
            return Arm(name, absolute(str(path / "model")), run=settings)
        return Arm(name, settings.model, absolute(place), settings)
    # Some checkpoints on the hub can't say that they hold no other file without a network
    if is_folder:
        is_adapter = (path / lora.CONFIG).exists()
    else:
        is_adapter = place not in RECIPES and not locate(place, "config.json", optional=True)
    if is_adapter:
        return Arm(name, absolute(model or base_of(place)), absolute(place))
    return Arm(name, absolute(place))


def read_json_if_there(path):
    return read_json(path) if path.exists() else {}


def shared_settings(arms: Sequence[Arm], device: str | None = None) -> SimpleNamespace:
    """Settings that all arms are asked under: the first run's; without a run, those of the recipe
    for a model of the first one's size. Raises InputError where runs differ in their format."""
    runs = [arm.run for arm in arms if arm.run]
    for run in runs:
        check_places(run, ("model", "data"))
    if len({run.format for run in runs}) > 1:
        raise InputError("some of these runs were trained with --format plain and some with chat, "
                         "so they can't be asked alike: give them one by one")
    if runs:
        settings = runs[0]
        settings.device = parallel.check_device(device or settings.device)
        return settings
    flags = Namespace(model=recipe_of(arms[0].base), device=device, more=None)
    return resolve(flags, needed=())[0]


def recipe_of(base: str) -> str:
    """The name of the first recipe for models of this size; the base itself if there is none."""
    if base in RECIPES:
        return base
    config = load_config(base)
    for name in RECIPES:
        known = PRESETS.get(name) or load_config(model_folder(name))
        if (known.hidden_size, known.num_hidden_layers) == (config.hidden_size,
                                                            config.num_hidden_layers):
            return name
    return base


def tokenizers_of(arms: Sequence[Arm]) -> dict[str, Tokenizer]:
    """{base: Tokenizer} of all arms."""
    return {base: load_tokenizer(model_folder(base))
            for base in dict.fromkeys(arm.base for arm in arms)}


def loaded(arms: Sequence[Arm], settings) -> Iterator[tuple[Arm, Gemma2]]:
    """Each arm with its model, of which one at a time has weights.

    An adapter goes on top of its base where that comes right before it.
    """
    stays = False
    for arm, following in zip(arms, [*arms[1:], None]):
        if not stays:
            with parallel.agreed():
                shard = parallel.shard if settings.shard else None
                model = load_model(model_folder(arm.base), getattr(torch, settings.dtype),
                                   settings.device, shard)
            limit_threads(model)
        if arm.adapter:
            lora.load_adapter(model, arm.adapter)
        yield arm, model
        stays = bool(following and following.base == arm.base and not arm.adapter)
        # Its weights are freed before others are read, whoever still holds the model
        if not stays:
            model.to("meta")
