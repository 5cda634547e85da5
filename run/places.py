"""A run's inputs: which files it reads, what is in them, and where they are after a move."""

import os
from pathlib import Path
from types import SimpleNamespace

from run.files import InputError, content_hash, data_file, read_json
from run.settings import PLACES, flag, model_folder, saved_settings
from run.weights import weight_files
from sae import find_sae, layers_in


ALL = ("model", "sae", "data")


def contents(settings: SimpleNamespace, places=ALL) -> dict[str, str]:
    """{place: SHA-256 of what the files there hold}. Raises InputError where one is missing."""
    check_places(settings, places)
    hashes = {}
    if "model" in places:
        hashes["model"] = content_hash(weight_files(model_folder(settings.model)))
    if "sae" in places and settings.sae:
        layers = settings.layers or layers_in(settings.sae)
        files = [find_sae(settings.sae, layer, settings.width, settings.l0)[0] for layer in layers]
        hashes["sae"] = content_hash(files)
    if "data" in places:
        path = data_file(settings.data)
        # A folder stands for its files
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        hashes["data"] = content_hash(files, sampled=False)
    return hashes


def moved_settings(run: str | Path, given: dict) -> SimpleNamespace:
    """Settings of a run whose model, SAEs, data and sets may lie elsewhere now: `given` says where.

    Raises InputError for other settings, and where a place holds other files than the run read.
    """
    if other := given.keys() - {*PLACES, "device"}:
        raise InputError(f"{', '.join(map(flag, other))}: {run} has its own, which stays")
    settings = saved_settings(run)
    sets = (settings.sets or {}) | given.get("sets", {})
    vars(settings).update(given | {"sets": sets})
    old = read_json(Path(run).expanduser() / "config.json").get("contents", {})
    for name, value in contents(settings, given.keys() & old.keys()).items():
        if value != old[name]:
            raise InputError(f"{flag(name)} {given[name]} holds something else than {run} has read")
    return settings


def check_places(settings: SimpleNamespace, needed=ALL):
    """Raise InputError where a run's model, SAEs or data are gone."""
    for name in needed:
        if is_gone(place := getattr(settings, name)):
            raise InputError(f"{place}: no such file or folder: {flag(name)} says where it is now")


def is_gone(place: str | None) -> bool:
    """Whether a file or folder that was here isn't there any more."""
    return os.path.isabs(place or "") and not os.path.exists(place or "")
