"""What a named direction moves in the attention heads, at the token before the answer.

The direction is taken out of ΔW, and of each head of the part two things are read: how much of its
attention goes elsewhere (half of Σ|p − p′|), and how far its output to the residual stream moves
(‖o − o′‖ / ‖o‖). A head is kept where one of them is more than in the untrained control of the same
size, by a paired test over prompts.

Letters: B prompts, T tokens, H query and K key-value heads of size hd, D hidden size.
"""

from collections import Counter
from contextlib import nullcontext

import torch
from einops import rearrange, repeat
from torch.nn.utils.rnn import pad_sequence

from fused import rotate, softcap
from model import SLIDING
from report.directions import sae_key
from report.effects import removed, tail

MOST = 4            # heads that are shown of a feature
MIN_MOVED = 0.01    # of the attention, or of the output


@torch.no_grad()
def looks(model, examples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each block, at the last token before each answer: attention (B, H, T), outputs (B, H, D).

    The scores are made again from what each attention module is given.
    """
    tokens = pad_sequence([torch.tensor(example.tokens[:example.start]) for example in examples],
                          batch_first=True).to(model.embed_tokens.weight.device)
    last = torch.tensor([example.start - 1 for example in examples], device=tokens.device)
    rows = torch.arange(len(last), device=tokens.device)
    given = []
    hooks = [block.self_attn.register_forward_pre_hook(lambda _, inputs: given.append(inputs[:2]))
             for block in model.layers]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()

    seen = []
    index = torch.arange(tokens.shape[1], device=tokens.device)
    for block, (x, rope) in zip(model.layers, given):
        module = block.self_attn
        q, k, v = (rearrange(projection(x), "b t (h hd) -> b h t hd", hd=module.head_dim)
                   for projection in (module.q_proj, module.k_proj, module.v_proj))
        q, k = rotate(q, *rope)[rows, :, last], rotate(k, *rope)           # (B, H, hd), (B, K, …)
        groups = q.shape[1] // k.shape[1]
        k, v = (repeat(y, "b k t hd -> b (k g) t hd", g=groups) for y in (k, v))
        scores = softcap(torch.einsum("bhd,bhtd->bht", q, k).float() * module.scale, module.cap)
        hidden = index > last[:, None]
        if module.kind == SLIDING:
            hidden = hidden | (index <= last[:, None] - model.config.sliding_window)
        attention = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
        # Each head alone through o_proj: its own write to the stream
        out = torch.einsum("bht,bhtd->bhd", attention.to(v), v)
        heads = torch.eye(q.shape[1]).to(out)
        alone = torch.einsum("bhd,hg->bghd", out, heads)
        seen.append((attention, module.o_proj(rearrange(alone, "b g h d -> b g (h d)"))))
    return seen


def moved(before, after):
    """Of each block (B, H, 2): shares of the attention and of the output that moved."""
    shares = []
    for (p, o), (q, w) in zip(before, after):
        attention = (p - q).abs().sum(-1) / 2
        output = (o - w).norm(dim=-1) / o.norm(dim=-1).clamp(min=1e-9)
        shares.append(torch.stack((attention, output), -1).cpu().double())
    return shares


def heads_moved(model, entry, direction, examples, tokenizer, sae_layers, norm_aware, control):
    """Entries [{"block", "head", "attention", "output", "tokens", …}] of a named feature, those
    that move most first. control() is a context in which the model carries the untrained one."""
    key = entry["layer"], entry["side"]
    results = []
    for context in (nullcontext(), control()):
        with context:
            before = looks(model, examples)
            with removed(model, {key: direction[None]}, sae_layers, norm_aware):
                after = looks(model, examples)
        results.append((before, after, moved(before, after)))
    (before, after, trained), (_, _, untrained) = results

    # The heads of the modules that lose the direction
    leaf = "o_proj" if entry["side"] == "writers" else "q_proj"
    found: list[dict] = []
    for block in range(len(trained)):
        if sae_key(f"layers.{block}.self_attn.{leaf}", sae_layers) != key:
            continue
        for head in range(trained[block].shape[1]):
            mine, theirs = trained[block][:, head], untrained[block][:, head]      # (B, 2)
            is_more = [float(mine[:, i].mean()) >= MIN_MOVED and tail(mine[:, i] - theirs[:, i])
                       < 0.025 for i in (0, 1)]
            if not any(is_more):
                continue
            # Tokens that the head looks at, and less without the direction
            lost: Counter = Counter()
            for row, example in enumerate(examples):
                change = before[block][0][row, head] - after[block][0][row, head]
                for token, value in zip(example.tokens[:example.start], change.tolist()):
                    lost[token] += value
            best = [token for token, _ in lost.most_common(3)]
            found.append({
                "block": block, "head": head,
                "attention": float(mine[:, 0].mean()), "output": float(mine[:, 1].mean()),
                "attention_untrained": float(theirs[:, 0].mean()),
                "output_untrained": float(theirs[:, 1].mean()),
                "tokens": [tokenizer.token(token) for token in best] if is_more[0] else []})
    found.sort(key=lambda row: -row["output"])
    return found[:MOST]
