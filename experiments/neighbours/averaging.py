"""Weight averaging (arXiv 2508.12531): in the end the moving average of what is trained.

    python -m experiments.lasting --arms lora-own --defences none averaging --worlds 1 2

The paper averages while an aligned model is fine-tuned, to keep it safe: so does this command. The
variant `lora-average` of experiments/ablate.py averages the alignment itself. Read from the
abstract. Ours: β = .9, and what is averaged are an adapter's factors.
"""

import torch


BETA = 0.9


@torch.no_grad()
def average(state: dict, parameters, beta=BETA) -> None:
    """A step of the exponential moving average.

    state {name: tensor}, empty at first, becomes β·state + (1 − β)·parameter, of `parameters`
    [(name, parameter)].
    """
    for name, parameter in parameters:
        if name in state:
            state[name] = torch.lerp(parameter, state[name], beta)
        else:
            state[name] = parameter.detach().clone()


@torch.no_grad()
def end_at_average(state: dict, parameters) -> None:
    """What is trained becomes its average."""
    for name, parameter in parameters:
        parameter.copy_(state[name])
