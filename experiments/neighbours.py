"""What others do to a model to make it safer, beside training or after it, each a short function.

    average(kept, named, beta=0.9)      # a step of weight averaging (EMA): train.py --ema 0.9
    lox(model, k=6, factor=1.25)        # extrapolate the leading directions of the update: merge.py --lox 6 1.25
    rosi(model, direction, alpha=0.5)   # inject a rank-one step along harm's direction into all that writes the residual
                                        # stream: merge.py --rosi 0.5 --harmful FILE --harmless FILE
"""

import torch
from tqdm import tqdm

import lora


@torch.no_grad()
def average(kept, named, beta):
    """A step of the exponential moving average (arXiv 2508.12531): kept {name: tensor}, empty at first, becomes
    β·kept + (1 − β)·parameter, of `named` [(name, parameter)]."""
    for name, parameter in named:
        kept[name] = torch.lerp(parameter, kept[name], beta) if name in kept else parameter.detach().clone()


@torch.no_grad()
def lox(model, k, factor):
    """LoX (arXiv 2506.15606): W + ΔW + factor · SVD_k(ΔW), in place: the k leading singular values of every update are
    multiplied by 1 + factor. From thin factors, without making ΔW; ranks stay."""
    for layer in lora.lora_layers(model).values():
        B, A = torch.linalg.qr(layer.B.double()), torch.linalg.qr(layer.A.T.double())              # ΔW = s·B.Q·(B.R·A.Rᵀ)·A.Qᵀ
        U, S, V = torch.linalg.svd(B.R @ A.R.T)
        S[:k] *= 1 + factor
        layer.B.copy_(B.Q @ U * S.sqrt())
        layer.A.copy_((A.Q @ V.T * S.sqrt()).T)


@torch.no_grad()
def rosi(model, direction, alpha):
    """ROSI (arXiv 2508.20766): W ← W + alpha · ŝ·w̄ᵀ of every o_proj and down_proj, in place; ŝ the unit `direction` (D), w̄ the
    mean of W's rows. An adapter's W is with its update, and the step goes into the weight beside it."""
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            adapted = isinstance(module, lora.LoRALinear)
            weight = module.base.weight if adapted else module.weight
            whole = weight + module.update if adapted else weight
            weight += (alpha * torch.outer(unit.to(weight.device), whole.double().mean(0))).to(weight.dtype)


@torch.no_grad()
def harm_direction(model, harmful, harmless):
    """(D) float64: the residual stream at the last token of prompts (lists of token ids), after half of the blocks: its mean
    over harmful ones less its mean over harmless ones."""
    layer, sums = model.config.num_hidden_layers // 2 - 1, []
    for prompts in (harmful, harmless):
        last = (model.hidden(torch.tensor([ids], device=model.embed_tokens.weight.device), stop_after=layer)[0][0, -1]
                for ids in tqdm(prompts, "harm's direction", leave=False, disable=None))
        sums.append(sum(last, torch.zeros((), dtype=torch.float64)) / len(prompts))
    return sums[0] - sums[1]
