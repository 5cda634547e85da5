"""Weight averaging (arXiv 2508.12531): in the end the moving average of what is trained.

    python -m experiments.ablate --variants lora-own lora-average --worlds 1 2
"""

import torch


@torch.no_grad()
def average(state: dict, parameters, beta: float) -> None:
    """A step of the exponential moving average.

    state {name: tensor}, empty at first, becomes β·state + (1 − β)·parameter, of `parameters`
    [(name, parameter)].
    """
    for name, parameter in parameters:
        if name in state:
            state[name] = torch.lerp(parameter, state[name], beta)
        else:
            state[name] = parameter.detach().clone()
