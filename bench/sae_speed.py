"""Training and encoding of SAEs against sae-lens, in tokens a second, one process, the same shapes and threads.

    python bench/sae_speed.py                                     # 1,024 of 64 wide and 4,096 of 768, about three minutes on 2 cores
    python bench/sae_speed.py --shapes 2304x16384 --batch 2048    # Gemma-2 2b's

Sides take turns and each round gives a ratio; the table shows medians. Training is BatchTopK on both sides, its dead-feature
loss idle, as it is for most of a training; encoding is JumpReLU. Beside them: the share of a training step that lies in
products of matrices (PyTorch's profiler), SASA's step over BatchTopK's, and peak memory of the process.
"""

import argparse
import resource

import torch

from bench.common import publish, race

from sae import JumpReLU
from saes.step import Spec, Trainer


def trainer_of(D, features, l0, architecture="batchtopk", block=1):
    spec = Spec(architecture, features, l0, block=block, nuclear=1e-3 * (block > 1))
    return Trainer(spec, torch.zeros(D), torch.Generator().manual_seed(0))


def lens_step(D, features, l0, x):
    """One training step of sae-lens' BatchTopK, its optimizer's step included."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=features, k=l0, device="cpu"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    dead = torch.zeros(features, dtype=torch.bool)

    def step():
        out = sae.training_forward_pass(TrainStepInput(x, {}, dead, n_training_steps=0, is_logging_step=False))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return step


def products(step):
    """Share of the CPU's time in products of matrices over three steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            step()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(value for name, value in times.items() if name in ("aten::mm", "aten::addmm", "aten::bmm")) / sum(times.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x1024", "768x4096"], help="width x features")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.products = "PyTorch"
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        D, features = map(int, shape.split("x"))
        x = torch.randn(args.batch, D, generator=torch.Generator().manual_seed(0)) / D ** 0.5
        ours, sasa = trainer_of(D, features, args.l0), trainer_of(D, features, args.l0, "sasa", 4)
        sides = {"ours": lambda: ours.step(x, 0.5), "sasa": lambda: sasa.step(x, 0.5), "sae-lens": lens_step(D, features, args.l0, x)}
        for side, (seconds, ratio) in race(sides, args.rounds).items():
            rows.append({"shape": shape, "what": f"train {'sasa' if side == 'sasa' else 'batchtopk'}", "side": side.replace("sasa", "ours"),
                         "tokens_s": args.batch / seconds, "ratio": ratio, "products": products(sides[side])})
        arrays = ours.arrays(1.0)
        mine = JumpReLU(**arrays)
        import sae_lens
        theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=features, apply_b_dec_to_input=False))
        theirs.load_state_dict(arrays)
        with torch.no_grad():
            for side, (seconds, ratio) in race({"ours": lambda: mine.encode(x), "sae-lens": lambda: theirs.encode(x)}, args.rounds).items():
                rows.append({"shape": shape, "what": "encode", "side": side, "tokens_s": args.batch / seconds, "ratio": ratio,
                             "products": products({"ours": lambda: mine.encode(x), "sae-lens": lambda: theirs.encode(x)}[side])})
    for row in rows:
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    shown = {"shape": "", "what": "", "side": "", "tokens_s": ",.0f", "ratio": ".2f", "products": ".0%", "peak_gb": ".2f"}
    publish("sae", rows, shown, args, "sae-lens")


if __name__ == "__main__":
    main()
