"""Steering by SAE features, the baseline that trains nothing: they are added while a model answers.

    python -m experiments.neighbours.steering                          # the toy's base model
    python -m experiments.neighbours.steering --layers 1 2 --strengths -1 0 1 2 --world 1

After a layer, at every token of prompt and answer, the residual stream x becomes

    x + s · Σᵢ Δᵢ·W_dec[i],   Δᵢ = E_aligned[fᵢ] − E_unaligned[fᵢ],   i of the k largest |Δ|,

E the mean over the answers' tokens.

At s = 1 the step is what these features write on aligned answers less what they write on unaligned
ones, in the mean. So the unit is the features' own: a layer's scale and the SAE's fall out of it,
and a feature that fires on unaligned answers is taken away. A block of a SASA has a Δ (b) of its
own, and b rows of W_dec.

All of it is ours: the selection is features.py's, the sum is that of eval.py --ask --steer.
In a grid: `with steered(model, directions(world.saes, world.statistics, 4.0)): answer(model, …)`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from experiments import ablate
from experiments.worlds import LAYERS, TOP_K, World, built_world
from features import Statistics, choose_features
from run.files import InputError, Parser, run_command, table
from run.settings import TOY
from sae import SAE
from safety.ask import steered


def directions(saes: Mapping[int, SAE], statistics: Mapping[int, Statistics], strength: float,
               top_k=TOP_K) -> dict[int, Tensor]:
    """{layer: s · Σᵢ Δᵢ·W_dec[i] (D)} for `steered`, of each layer's own choice of features."""
    steps = {}
    for layer, sae in saes.items():
        features = choose_features(statistics[layer], top_k)
        shift = statistics[layer].shift.cpu()[features]              # (k, b)
        rows = sae.unit_rows(features).cpu().double()                # (k, b, D)
        steps[layer] = (strength * torch.einsum("kb,kbd->d", shift, rows)).float()
    return steps


def main():
    parser = Parser(__doc__)
    parser.add_argument("--world", type=int, help="the world's seed, built first if need be")
    parser.add_argument("--layers", type=int, nargs="+", default=[2],
                        help="where it is added, at once (default 2)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0, 8.0],
                        metavar="S", help="see above (default 0 1 2 4 8)")
    args = parser.parse_args()
    if not set(args.layers) <= set(LAYERS):
        raise InputError(f"--layers {args.layers}: a world's SAEs are of {LAYERS}")
    world = World(0, TOY) if args.world is None else built_world(args.world)
    if not world:
        return
    saes = {layer: world.saes[layer] for layer in args.layers}
    rows = []
    for strength in args.strengths:
        with steered(world.model, directions(saes, world.statistics, strength)):
            shares = [ablate.safe_share(world, world.model)]
            figures = ablate.final_figures(world, world.model)
        shares += [figures["jailbreak"], *figures["over_refusal"].values(), figures["benign"]]
        rows.append([f"{strength:g}", *(f"{share:.1%}" for share in shares)])
    head = ["s", "harmful safe", "jailbreak safe", "over-refused: harm verb", "sensitive noun",
            "benign correct"]
    print(table(rows, head, right=range(6)))


if __name__ == "__main__":
    run_command(main)
