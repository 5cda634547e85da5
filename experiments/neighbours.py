"""What others do to a model to make it safer, beside training or after it. Each a short function.

    average(state, parameters, beta=0.9)         # after each training step: weight averaging (EMA)
    lox(model, k=6, factor=1.25)                 # after training: the update's leading directions
    rosi(model, direction, alpha=0.5)            # a rank-one step into what writes the residual
                                                 # stream, along harm_direction(model, ...)

A run's adapter is changed so:

    model = load_model("toy"); load_adapter(model, RUN); lox(model, 6, 0.25)
    save_adapter(model, OUT, "toy")

ROSI changes the base's weights: fold_lora(model); rosi(...); save_model(model, OUT).
Letters: D hidden size, r rank.
"""

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from lora import LoRALinear, lora_layers


@torch.no_grad()
def average(state: dict, parameters, beta: float) -> None:
    """A step of the exponential moving average (arXiv 2508.12531).

    state {name: tensor}, empty at first, becomes β·state + (1 − β)·parameter, of `parameters`
    [(name, parameter)].
    """
    for name, parameter in parameters:
        if name in state:
            state[name] = torch.lerp(parameter, state[name], beta)
        else:
            state[name] = parameter.detach().clone()


@torch.no_grad()
def lox(model, k: int, factor: float) -> None:
    """LoX (arXiv 2506.15606): W + ΔW + factor · SVD_k(ΔW), in place.

    The k leading singular values of each update are multiplied by 1 + factor. ΔW itself is not
    made: with B = Q_B·R_B and Aᵀ = Q_A·R_A it is s · Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, and ranks stay.
    """
    for layer in lora_layers(model).values():
        # The SVD of a small matrix, between two orthonormal ones
        B = torch.linalg.qr(layer.B.double())
        A = torch.linalg.qr(layer.A.T.double())
        U, S, V = torch.linalg.svd(B.R @ A.R.T)                  # (r, r), (r,), (r, r)
        # The leading part grows; the factors share the singular values
        S[:k] *= 1 + factor
        layer.B.copy_(B.Q @ U * S.sqrt())
        layer.A.copy_((A.Q @ V.T * S.sqrt()).T)


@torch.no_grad()
def rosi(model, direction: torch.Tensor, alpha: float) -> None:
    """ROSI (arXiv 2508.20766): W ← W + alpha · ŝ·w̄ᵀ of every o_proj and down_proj, in place.

    ŝ is the unit `direction` (D), w̄ the mean of W's rows. The W of a module with an adapter counts
    its update, and the step goes into the weight beside it.
    """
    unit = normalize(direction.double(), dim=0)
    for name, module in model.named_modules():
        if not name.endswith(("o_proj", "down_proj")):
            continue
        if isinstance(module, LoRALinear):
            weight, whole = module.base.weight, module.base.weight + module.update
        else:
            weight = whole = module.weight
        step = torch.outer(unit.to(weight.device), whole.double().mean(0))
        weight += (alpha * step).to(weight.dtype)


@torch.no_grad()
def harm_direction(model, harmful, harmless) -> torch.Tensor:
    """(D) float64: the mean over harmful prompts less that over harmless ones, of the residual
    stream at a prompt's last token, after half of the blocks. Prompts are lists of token ids."""
    device = model.embed_tokens.weight.device
    layer = model.config.num_hidden_layers // 2 - 1
    # The decision falls at the last token, in the middle of the model
    means = []
    for prompts in (harmful, harmless):
        total = torch.zeros((), dtype=torch.float64)
        for ids in tqdm(prompts, "harm's direction", leave=False, disable=None):
            tokens = torch.tensor([ids], device=device)
            residual, _ = model.hidden(tokens, stop_after=layer)             # (1, T, D)
            total = total + residual[0, -1]
        means.append(total / len(prompts))
    return means[0] - means[1]
