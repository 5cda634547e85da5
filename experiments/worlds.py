"""The worlds that a grid runs on: toys of their own, and what is measured on their base models.

A world is a toy (`toy.build`: its own facts, words and weights) in a folder. What a World measures
is made when it is first asked for, and kept.
Letters: T tokens, D hidden size, F features of an SAE, r rank.
"""

import hashlib
import itertools
import random
import sys
import tempfile
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import normalize

from run.readers import read_pairs, read_prompts
import train
from data import Row, load_tokenizer, make_example, pack
from features import contrast_gradients, feature_statistics, gradient_moments
from lora import linears
from model import TARGETS, load_model
from run.files import ROOT, read_tensors, write_tensors
from sae import load_sae
from saes.step import Spec
from saes.train import Training
from toy import build as toy
from toy.world import PHRASINGS, TUNED_PHRASINGS, ask
from toy.world import World as Words

STEPS, RATE = 60, 1e-3
RANK, TOP_K, TAU = 16, 20, 0.8               # the toy recipe's
LAYERS, WIDTH = (1, 2, 3), "512"             # of a world's SAEs
BATCH_TOKENS, ACCUMULATE = 512, 2
WORLDS = ROOT / "runs/worlds"
SETS = ("harmful", "jailbreak", "lookalike", "benign")


class World:
    """A built world: its files, and what is measured on its base model."""

    def __init__(self, seed: int, folder: str | Path):
        self.seed, self.folder = seed, Path(folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.pairs, _ = read_pairs(self.folder / "data/train.jsonl")
        # [(aligned Example, unaligned Example)]
        self.examples = [(self.example(pair.turns, pair.aligned),
                          self.example(pair.turns, pair.unaligned)) for pair in self.pairs]
        self.sets = {name: read_prompts(self.folder / f"data/{name}.jsonl")[0] for name in SETS}

    def example(self, turns, response: str):
        return make_example(self.tokenizer, turns, response, BATCH_TOKENS)

    @cached_property
    def model(self):
        """The base, for measuring only: a run trains a copy of its own."""
        return load_model(self.folder)

    @cached_property
    def saes(self):
        return {layer: load_sae(self.folder / "sae", layer, WIDTH) for layer in LAYERS}

    @cached_property
    def rows(self):
        """{layer: (F, D)} unit decoder rows."""
        return {layer: normalize(sae.W_dec.float(), dim=1) for layer, sae in self.saes.items()}

    @cached_property
    def statistics(self):
        return self.statistics_of(self.saes)

    def statistics_of(self, saes):
        """{layer: Statistics} of the pairs, by the world's own or other SAEs."""
        return feature_statistics(self.model, saes, self.examples, self.tokenizer.control)

    @cached_property
    def gradients(self):
        return contrast_gradients(self.model, self.examples)

    @cached_property
    def moments(self):
        """{(SAE layer, side): GᵀG (D, D) of all modules that it serves}."""
        return gradient_moments(self.model, self.gradients, LAYERS)

    @cached_property
    def residuals(self):
        """{layer: ([aligned], [unaligned])}: residual stream (T, D), float64, at the responses."""
        residuals = {layer: ([], []) for layer in LAYERS}
        for pair in self.examples:
            for side, example in enumerate(pair):
                # One at a time: nothing is padded, and it takes seconds
                tokens = torch.tensor([example.tokens])
                with torch.no_grad():
                    _, captured = self.model.hidden(tokens, capture=LAYERS, stop_after=max(LAYERS))
                for layer in LAYERS:
                    residuals[layer][side].append(captured[layer][0, example.start:].double())
        return residuals

    @cached_property
    def harmless(self):
        """Harmless prompts of the fine-tuning words: look-alikes that are in no evaluation set."""
        # Its own seed, so that no other draw of the world moves these
        words, draw = Words(self.seed), random.Random(f"harmless {self.seed}")
        prompts = []
        for verbs, nouns in (("harm", "thing"), ("plain", "sensitive")):
            for verb, noun in itertools.product(words.tune[verbs], words.tune[nouns]):
                for phrasing in PHRASINGS[:TUNED_PHRASINGS]:
                    turns = (("user", ask(draw, verb, noun, [phrasing])),)
                    prompts.append(SimpleNamespace(turns=turns))
        return prompts

    @cached_property
    def full_update(self):
        """{module: ΔW} of full fine-tuning of q, k, v, o at RATE, seed 0. Kept in the folder."""
        path = self.folder / "oracle.safetensors"
        if not path.exists():
            # A run of its own from the base model
            model = load_model(self.folder)
            before = {name: module.weight.clone() for name, module in targets(model).items()}
            for _ in fit(self, model, full_parameters(model), RATE, 0):
                pass
            updates = {name: module.weight.detach() - before[name]
                       for name, module in targets(model).items()}
            write_tensors(path, updates)
        return read_tensors(path)

    @cached_property
    def sasas(self):
        """{layer: a SASA}."""
        return self.other_saes("sasa", toy.SAES["sasa"])

    def other_saes(self, name: str, spec: Spec, kind=Training):
        """{layer: SAE} of the folder `name`, trained by a `kind` where the world has none."""
        path = self.folder / name
        if not path.exists():
            conversations = Words(self.seed).corpus(4000, "SAE")
            training = toy.train_saes(self.model, self.tokenizer, conversations, spec,
                                      toy.SAE_STEPS, self.seed, name, kind)
            # Renamed when whole, so that a stop leaves no half of one
            part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.folder))
            training.write(part)
            part.rename(path)
        return {layer: load_sae(path, layer, WIDTH) for layer in LAYERS}

    @cached_property
    def digest(self) -> str:
        """What tells this world from another of its seed: of its weights, SAEs and pairs."""
        # Another machine builds another world of the same seed
        digest = hashlib.sha256()
        saes = sorted((self.folder / "sae").rglob("params.npz"))
        for path in [self.folder / "model.safetensors", self.folder / "data/train.jsonl", *saes]:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:12]


@lru_cache(maxsize=2)
def built_world(seed: int) -> World | None:
    """The world in WORLDS, built where it isn't there; None, with a word, if it misses a gate."""
    path = WORLDS / str(seed)
    if not (path / "world.json").is_file():
        missed = toy.misses(toy.build(seed, path, ["sae"]))
        if missed:
            print(f"world {seed} is left out:\n{toy.gates_table(missed)}", file=sys.stderr)
            return None
    return World(seed, path)


# -------------------------------------------------------------------------------------------------
# Fine-tuning, the same for every variant

def targets(model):
    """{name: module} of all q, k, v and o, none of which has an adapter yet."""
    return linears(model, TARGETS)


def full_parameters(model):
    """[(name, weight)] of all q, k, v and o, the only ones that want gradients."""
    model.requires_grad_(False)
    return [(name, module.weight.requires_grad_()) for name, module in targets(model).items()]


def batches_of(examples, seed: int, pack=pack):
    """train.batches_of, in an order that depends on the seed alone."""
    settings = SimpleNamespace(batch_tokens=BATCH_TOKENS, accumulate=ACCUMULATE, seed=seed)
    return train.batches_of(examples, settings, pack)


def fit(world: World, model, parameters, rate: float, seed: int, batches=None, steps=0,
        loss=train.row_loss):
    """train.fit's metrics, step by step, of STEPS or `steps` on the world's aligned answers or on
    `batches`."""
    trained = [parameter for _, parameter in parameters]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    batches = batches or batches_of([aligned for aligned, _ in world.examples], seed)
    steps = steps or STEPS
    schedule = train.cosine(rate, steps, 0.1)
    # A step's rows in one forward: a sixth faster than one by one at this size
    stacked = ([Row(*map(torch.stack, zip(*(vars(row).values() for row in rows))))]
               for rows in itertools.islice(batches, steps))
    return train.fit(model, optimizer, stacked, schedule, clip=1.0, loss=loss)
