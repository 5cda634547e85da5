"""Training and encoding of SAEs beside sae-lens: tokens a second.

    pip install -r bench/requirements.txt
    python -m bench.sae_speed                                     # three minutes on one core
    python -m bench.sae_speed --shapes 2304x16384 --batch 2048    # of Gemma-2 2b

Sides take turns in one process. Both train a BatchTopK whose dead-feature loss is idle, as it is
for most of a training, and both encode a JumpReLU. SASA's step stands beside them. "products" is
the share of the time in products of matrices (PyTorch's profiler). Written to
bench/results/sae.json.
"""

import torch

from bench.common import add_flags, prepare, publish, race
from run.files import Parser
from sae import JumpReLU
from saes.step import Spec, Trainer

SHOWN = {"shape": "", "what": "", "side": "", "tokens/s": ",.0f", "times ours": ".2f",
         "products": ".0%"}


def trainer_of(spec, D):
    return Trainer(spec, torch.zeros(D), torch.Generator().manual_seed(0))


def lens_step(D, num_features, l0, x):
    """One training step of sae-lens' BatchTopK, its optimizer's step included."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    config = BatchTopKTrainingSAEConfig(d_in=D, d_sae=num_features, k=l0, device="cpu")
    sae = BatchTopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    dead = torch.zeros(num_features, dtype=torch.bool)

    def step():
        batch = TrainStepInput(x, {}, dead, n_training_steps=0, is_logging_step=False)
        optimizer.zero_grad()
        sae.training_forward_pass(batch).loss.backward()
        optimizer.step()
    return step


def lens_encoder(D, num_features, arrays):
    """sae-lens' JumpReLU of these arrays."""
    import sae_lens
    config = sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=num_features, apply_b_dec_to_input=False)
    sae = sae_lens.JumpReLUSAE(config)
    sae.load_state_dict(arrays)
    return sae.requires_grad_(False)


def products(run):
    """Share of the CPU's time in products of matrices over three runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            run()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    names = ("aten::mm", "aten::addmm", "aten::bmm")
    return sum(times.get(name, 0) for name in names) / sum(times.values())


def rows_of(shape, args):
    D, num_features = map(int, shape.split("x"))
    x = torch.randn(args.batch, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    ours = trainer_of(Spec("batchtopk", num_features, args.l0), D)
    sasa = trainer_of(Spec("sasa", num_features, args.l0, block=4, nuclear=1e-3), D)
    training = {"ours": lambda: ours.step(x, 0.5), "ours, sasa": lambda: sasa.step(x, 0.5),
                "sae-lens": lens_step(D, num_features, args.l0, x)}
    arrays = ours.arrays(1.0)
    mine, theirs = JumpReLU(**arrays), lens_encoder(D, num_features, arrays)
    encoding = {"ours": lambda: mine.encode(x), "sae-lens": lambda: theirs.encode(x)}
    rows = []
    for what, sides in (("train", training), ("encode", encoding)):
        for run in sides.values():  # the warm-up
            run()
        for side, (seconds, ratio) in race(sides, args.rounds).items():
            rows.append({"shape": shape, "what": what, "side": side,
                         "tokens/s": args.batch / seconds, "times ours": ratio,
                         "products": products(sides[side])})
    return rows


def main():
    parser = Parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["64x1024", "768x4096"], metavar="DxF",
                        help="width of the stream x features (default: 64x1024 768x4096)")
    parser.add_argument("--batch", type=int, default=2048, help="tokens a step (default: 2048)")
    parser.add_argument("--l0", type=int, default=32, help="codes a token (default: 32)")
    add_flags(parser, dtypes=())
    args = parser.parse_args()
    prepare(args)
    rows = [row for shape in args.shapes for row in rows_of(shape, args)]
    publish("sae", rows, SHOWN, args, "sae-lens")


if __name__ == "__main__":
    main()
