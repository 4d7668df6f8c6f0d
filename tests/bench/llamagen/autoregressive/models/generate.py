"""A double of LlamaGen's token loop: its interface; nothing of it is the original's."""

import torch


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True):
    assert (top_k, top_p) == (0, 1.0)
    p = (logits[:, -1] / temperature).softmax(dim=-1)
    return (torch.multinomial(p, 1) if sample_logits else p.argmax(dim=-1, keepdim=True)), p


@torch.no_grad()
def generate(model, cond, max_new_tokens, emb_masks=None, cfg_scale=1.0, cfg_interval=-1, **how):
    guided = cfg_scale > 1.0
    model.setup_caches()
    begin = torch.cat([cond, torch.full_like(cond, model.num_classes)]) if guided else cond
    codes = []
    for i in range(max_new_tokens):
        last = None if i == 0 else torch.cat([codes[-1]] * 2) if guided else codes[-1]
        logits, _ = model(last, begin if i == 0 else None, input_pos=torch.tensor([i]))
        if guided:
            c, u = logits.float().chunk(2)
            logits = u + cfg_scale * (c - u)
        codes.append(sample(logits, **how)[0])
    return torch.cat(codes, dim=1).to(torch.int)
