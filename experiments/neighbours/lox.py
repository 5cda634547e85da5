"""LoX (arXiv 2506.15606): after training, W + ΔW + factor · SVD_k(ΔW).

    model = load_model("toy"); load_adapter(model, RUN); extrapolate(model, 6, 0.25)
    save_adapter(model, OUT, "toy")

    python -m experiments.ablate --variants lora-own lora-lox --worlds 1 2

Ours: factor .25 (there 1.25, which makes the toy refuse everything).
"""

import torch

from lora import lora_layers


@torch.no_grad()
def extrapolate(model, k: int, factor: float) -> None:
    """Multiply the k leading singular values of each adapter's ΔW by 1 + factor, in place.

    ΔW itself is not made: with B = Q_B·R_B and Aᵀ = Q_A·R_A it is s · Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, and
    ranks stay.
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
