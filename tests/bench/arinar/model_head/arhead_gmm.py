"""The double's head: features one by one, from a mixture each, without a cache; guided, a choice of 50 candidates.

Its interface is the original's; nothing else of it is. K Gaussians, T features.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn

from seriatim.heads.gaussians import GaussianMixture
from seriatim.models.build import build_head


class Attention:
    """The original's names for what our attention has."""

    def __init__(self, ours):
        object.__setattr__(self, "ours", ours)

    def __setattr__(self, name, value):
        if name == "head_dim":
            assert value * self.ours.heads == self.ours.proj.in_features
        else:
            setattr(self.ours, {"num_heads": "heads", "scale": "scale"}[name], value)


class ARHead(nn.Module):
    def __init__(self, num_gaussians, token_embed_dim, decoder_embed_dim, inner_ar_width, depth, feature_group):
        super().__init__()
        inside = {
            "kind": "causal", "width": inner_ar_width, "depth": depth, "heads": 16, "conditioning": "both",
            "norm": "layer", "mlp": "gelu-tanh", "positions": "learned", "bias": True, "attention_scale": 0.25,
            "start_token": True, "head": {"kind": "mixture", "components": num_gaussians, "depth": 0},
        }  # fmt: skip
        config = {"kind": "nested", "split": {"kind": "features", "group": feature_group}, "model": inside}
        self.nested = build_head(config, dim=token_embed_dim, vocab=None, z_dim=decoder_embed_dim)
        self.num_gaussians, self.feature_group = num_gaussians, feature_group
        self.num_groups = token_embed_dim // feature_group
        self.bilevel_schedule = "constant"
        self.blocks = [SimpleNamespace(attn=Attention(block.attention)) for block in self.nested.model.backbone.blocks]

    def schedule(self, x, step, total_steps):
        if self.bilevel_schedule == "constant":
            return x
        assert self.bilevel_schedule == "cosine"
        return 1 + (x - 1) * (1 + math.cos(math.pi * step / total_steps)) / 2

    def extract_gmm(self, pred, bsz):
        """(N, 1, 2 K g + K) -> weights (N, 1, K), means and log-variances (N, 1, K, g)."""
        K, g = self.num_gaussians, self.feature_group
        means, log_variances, logits = pred.split([K * g, K * g, K], dim=-1)
        shape = (bsz, 1, K, g)
        return logits.softmax(dim=-1), means.reshape(shape), log_variances.reshape(shape)

    def sample_from_gmm(self, weight, mu, logvar, temperature=1.0, num_samples=1):
        """-> (S, N, 1, g)."""
        mixture = GaussianMixture(weight[:, 0].log(), mu[:, 0], logvar[:, 0] / 2)
        N, g = len(mu), self.feature_group
        x = mixture.sample(torch.rand(N, num_samples), torch.randn(N, num_samples, g), temperature)  # (N, S, g)
        return x.transpose(0, 1)[:, :, None]

    def log_density(self, x, weight, mu, logvar):
        """x (S, N, 1, g) -> (N, S)."""
        return GaussianMixture(weight[:, 0].log(), mu[:, 0], logvar[:, 0] / 2).log_prob(x[:, :, 0].transpose(0, 1))

    def sample(self, z, temperature=1.0, cfg=1.0, **_):
        """z (N, C), or (2 N, C) where guided -> tokens of as many rows."""
        parts = z.new_zeros(len(z), self.num_groups, self.feature_group)
        for i in range(self.num_groups):
            inner = self.nested.model.backbone.sequence(self.nested.condition(z, None), parts)[:, i]
            flat = self.nested.model.head(inner)
            if torch.is_autocast_enabled("cpu"):  # as a Linear gives it
                flat = flat.to(torch.get_autocast_dtype("cpu"))
            three = self.extract_gmm(flat[:, None], len(z))
            warmth = self.schedule(temperature, i + 1, self.num_groups)
            if cfg == 1.0:
                x = self.sample_from_gmm(*three, temperature=warmth, num_samples=1)[0, :, 0]
            else:
                half = len(z) // 2
                cond, null = [t[:half] for t in three], [t[half:] for t in three]
                x = self.sample_from_gmm(*cond, temperature=warmth, num_samples=50)
                ratio = self.log_density(x, *cond) - self.log_density(x, *null)  # (N, S)
                w = self.schedule(cfg, i + 1, self.num_groups)
                chosen = torch.multinomial(((w - 1) * ratio).softmax(dim=-1), 1)[:, 0]
                x = x[chosen, torch.arange(half), 0].repeat(2, 1)
            parts[:, i] = x
        return parts.flatten(1)
