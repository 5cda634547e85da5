"""ROSI (arXiv 2508.20766): a rank-one step into all that writes the residual stream.

    model = load_model("toy"); load_adapter(model, RUN); fold_lora(model)
    inject(model, harm_direction(model, harmful, harmless), 0.5); save_model(model, OUT)

    python -m experiments.ablate --variants lora-own lora-rosi --worlds 1 2

Ours: the direction is read after half of the blocks, and in the grid off the base model; there
alpha is 3, chosen on world 101.
"""

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from lora import LoRALinear


@torch.no_grad()
def inject(model, direction: torch.Tensor, alpha: float) -> None:
    """W ← W + alpha · ŝ·w̄ᵀ of every o_proj and down_proj, in place.

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
