"""A double of the original's module: its interface and its ways (`.cuda()`, NumPy's random numbers).

Written for the tests from the formulas of Li et al. 2024 and Zhao et al. 2025, on parts of this package; nothing of it
is the original's.

Shapes: B images (2 B where guided), L tokens, D features, A buffer tokens, N tokens asked for.
"""

import math

import numpy as np
import torch
from model_head.arhead_gmm import ARHead
from torch import nn

from seriatim.backbones.masked_transformer import Masked
from seriatim.backbones.requests import positions_in
from seriatim.checkpoints.arinar import UNSQUEEZED, ZERO, official_name
from seriatim.conditions.base import Condition
from seriatim.models.masked_model import MaskedModel


class MAR(nn.Module):
    def __init__(
        self,
        img_size=256,
        vae_stride=16,
        patch_size=1,
        encoder_embed_dim=1024,
        encoder_depth=16,
        encoder_num_heads=16,
        decoder_embed_dim=1024,
        decoder_depth=16,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        vae_embed_dim=16,
        class_num=1000,
        buffer_size=64,
        num_gaussians=1,
        head_type="ar_gmm",
        inner_ar_width=1024,
        inner_ar_depth=1,
        **more,
    ):
        super().__init__()
        assert norm_layer(8).eps == 1e-6 and head_type == "ar_gmm"
        self.side = img_size // vae_stride // patch_size
        self.seq_len, self.token_embed_dim = self.side**2, vae_embed_dim * patch_size**2
        backbone = Masked(
            self.seq_len,
            self.token_embed_dim,
            width=(encoder_embed_dim, decoder_embed_dim),
            depth=(encoder_depth, decoder_depth),
            heads=(encoder_num_heads, decoder_num_heads),
            buffer=buffer_size,
            mlp_ratio=mlp_ratio,
        )
        self.arhead = ARHead(
            num_gaussians, self.token_embed_dim, decoder_embed_dim, inner_ar_width, inner_ar_depth,
            more.get("feature_group", 1),
        )  # fmt: skip
        self.inner = MaskedModel(backbone, self.arhead.nested, classes=class_num)
        self.decoder_norm, self.next_layer_sample, self.depth = (
            backbone.decoder_norm,
            self.arhead.sample,
            inner_ar_depth,
        )
        print("a chatty head")

    def load_state_dict(self, tensors):
        """Strictly, under the official names and shapes; the bias of keys is a buffer of zeros."""
        ours = {official_name(name): name for name in self.inner.state_dict()}
        zeros = {ZERO.format(i=i) for i in range(self.depth)}
        if ours.keys() | zeros != tensors.keys():
            raise RuntimeError(f"Error in loading state_dict: {sorted((ours.keys() | zeros) ^ tensors.keys())}")
        self.inner.load_state_dict({ours[k]: t[0] if k in UNSQUEEZED else t for k, t in tensors.items() if k in ours})

    def sample_orders(self, bsz):
        return torch.tensor(np.stack([np.random.permutation(self.seq_len) for _ in range(bsz)])).cuda()

    def forward_mae_encoder(self, x, mask, class_embedding):
        """x (B, L, D), mask (B, L), 1 where unknown, class_embedding (B, E) -> (B, A + known, E)."""
        known, _ = positions_in(mask == 0)
        return self.inner.backbone.encode(Condition(class_embedding[:, None]), x, known, None)[0]

    def forward_mae_decoder(self, x, mask):
        """-> z of every token (B, L, C)."""
        known, _ = positions_in(mask == 0)
        everywhere = torch.arange(self.seq_len).expand(len(mask), -1)
        return self.inner.backbone.decode(x, None, known, None, everywhere)

    def sample_tokens(self, bsz, num_iter=64, cfg=1.0, cfg_schedule="linear", labels=None, temperature=1.0):
        """-> latents (B, D, side, side)."""
        L, guided = self.seq_len, cfg != 1.0
        tokens, mask = torch.zeros(bsz, L, self.token_embed_dim).cuda(), torch.ones(bsz, L).cuda()
        orders = self.sample_orders(bsz)
        condition, null = (self.inner.condition(each, bsz).vectors[:, 0] for each in (labels, None))
        for step in range(num_iter):
            twice = 2 if guided else 1
            x, masks = tokens.repeat(twice, 1, 1), mask.repeat(twice, 1)
            x = self.forward_mae_encoder(x, masks, torch.cat([condition, null][:twice]))
            z = self.forward_mae_decoder(x, masks)  # (twice B, L, C)
            left = math.floor(L * math.cos(math.pi / 2 * (step + 1) / num_iter))
            left = max(1, min(int(mask[0].sum()) - 1, left))  # of each image, after this step
            later = torch.zeros_like(mask).scatter(1, orders[:, :left], 1.0)
            ask = mask.bool() if step == num_iter - 1 else (mask != later)
            scale = {"constant": cfg, "linear": torch.tensor([1 + (cfg - 1) * (L - left) / L])}[cfg_schedule]
            z = z[ask.repeat(twice, 1)].float()
            drawn = self.next_layer_sample(z, temperature=temperature, cfg=scale, step=step, ar_num_iter=num_iter)
            tokens[ask] = drawn[: int(ask.sum())]
            mask = later
        return tokens.transpose(1, 2).reshape(bsz, self.token_embed_dim, self.side, self.side)
