"""Begin at the safety subspace of another folder: with no pairs, no SAEs and no selection.

    python train.py --rank 16 --out runs/sails
    python lora.py runs/sails --out runs/merged
    python -m experiments.given --subspace runs/sails --init given --model runs/merged --data FILE

For a model that is fine-tuned once more: FILE may have one answer a row.
"""

import lora
import train
from experiments.neighbours.shared import own_flag
from features import load_subspaces
from run import parallel
from run.files import InputError


def main():
    folder = own_flag("subspace", "DIR, the folder of a run or of a selection")
    adapt = train.adapt

    def select(*_):
        return load_subspaces(f"{folder}/subspace.safetensors")

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
