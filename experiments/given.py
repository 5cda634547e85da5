"""Begin at the safety subspace of another folder: with no pairs, no SAEs and no selection.

    python train.py --rank 16 --out runs/sails
    python lora.py runs/sails --base toy --out runs/merged
    python -m experiments.given --subspace runs/sails --init given --model runs/merged --data FILE

For a model that is fine-tuned once more: FILE may have one answer a row.
"""

import argparse
import sys

import lora
import train
from features import load_subspaces
from run import parallel
from run.files import InputError


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--subspace")
    own, sys.argv[1:] = parser.parse_known_args()
    if not own.subspace and not {"-h", "--help"} & set(sys.argv):
        raise InputError("give --subspace DIR, the folder of a run or of a selection")
    adapt = train.adapt

    def select(*_):
        return load_subspaces(f"{own.subspace}/subspace.safetensors")

    def adapt_from_given(settings, model, saes, *rest):
        if settings.init != "given":
            raise InputError(f"--init {settings.init}: give --init given")
        # adapt() selects where there are SAEs: here there is always something to select
        return adapt(settings, model, saes or {"given": None}, *rest)

    lora.INITS["given"] = lora.sails
    train.select, train.adapt = select, adapt_from_given
    return train.main()


if __name__ == "__main__":
    parallel.run(main)
