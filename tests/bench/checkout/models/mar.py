"""A double of the original's module: its interface and its ways (`.cuda()`, torchvision, torch's own random numbers).

Written for the tests from the formulas of Li et al. 2024, on parts of this package; nothing of it is the original's.

Shapes: B images (2 B where guided), L tokens, D features, A buffer tokens, N tokens asked for.
"""

import math

import numpy as np
import torch
from models.diffloss import DiffLoss
from torch import nn
from torchvision.transforms import Compose, InterpolationMode  # timm imports such names, and sampling uses none

from seriatim.backbones.masked_transformer import Masked
from seriatim.backbones.requests import positions_in
from seriatim.checkpoints.mar import UNSQUEEZED, official_name
from seriatim.conditions.base import Condition
from seriatim.heads.diffusion import Diffusion
from seriatim.models.masked_model import MaskedModel

RESIZE = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}  # looked up at import


class Augment(Compose):
    pass


class MaskRatio:
    """Stands for scipy's distribution of the share of masked tokens."""

    def rvs(self, count):
        return np.random.uniform(0.7, 1.0, count)


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
        diffloss_d=3,
        diffloss_w=1024,
        num_sampling_steps="100",
    ):
        super().__init__()
        assert norm_layer(8).eps == 1e-6, "the norms of the released models"
        self.side = img_size // vae_stride // patch_size
        self.seq_len, self.dim = self.side**2, vae_embed_dim * patch_size**2
        backbone = Masked(
            self.seq_len,
            self.dim,
            width=(encoder_embed_dim, decoder_embed_dim),
            depth=(encoder_depth, decoder_depth),
            heads=(encoder_num_heads, decoder_num_heads),
            buffer=buffer_size,
            mlp_ratio=mlp_ratio,
        )
        self.inner = MaskedModel(backbone, Diffusion(self.dim, diffloss_w, diffloss_d), classes=class_num)
        self.diffloss = DiffLoss(self.inner.head, self.dim, num_sampling_steps).cuda()
        self.decoder_norm = backbone.decoder_norm
        self.mask_ratio_generator = MaskRatio()

    def load_state_dict(self, tensors):
        """Strictly, under the official names and shapes."""
        ours = {official_name(name): name for name in self.inner.state_dict()}
        if ours.keys() != tensors.keys():
            raise RuntimeError(f"Error in loading state_dict: {sorted(ours.keys() ^ tensors.keys())}")
        self.inner.load_state_dict({ours[k]: t[0] if k in UNSQUEEZED else t for k, t in tensors.items()})

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
        tokens, mask = torch.zeros(bsz, L, self.dim).cuda(), torch.ones(bsz, L).cuda()
        orders = self.sample_orders(bsz)
        condition, null = (self.inner.condition(each, bsz).vectors[:, 0] for each in (labels, None))
        for step in range(num_iter):
            twice = 2 if guided else 1
            x, masks = tokens.repeat(twice, 1, 1), mask.repeat(twice, 1)
            z = self.forward_mae_decoder(
                self.forward_mae_encoder(x, masks, torch.cat([condition, null][:twice])), masks
            )  # (twice B, L, C)
            left = math.floor(L * math.cos(math.pi / 2 * (step + 1) / num_iter))
            left = max(1, min(int(mask[0].sum()) - 1, left))  # of each image, after this step
            later = torch.zeros_like(mask).scatter(1, orders[:, :left], 1.0)
            ask = mask.bool() if step == num_iter - 1 else (mask != later)
            scale = {"constant": cfg, "linear": 1 + (cfg - 1) * (L - left) / L}[cfg_schedule]
            drawn = self.diffloss.sample(z[ask.repeat(twice, 1)], temperature, scale)  # (twice N, D)
            tokens[ask] = drawn[: int(ask.sum())]
            mask = later
        return tokens.transpose(1, 2).reshape(bsz, self.dim, self.side, self.side)

    def forward(self, imgs, labels):
        """imgs (B, D, side, side), labels (B,) -> the mean loss of the masked tokens; the head sees every token."""
        x = imgs.flatten(2).transpose(1, 2)  # (B, L, D)
        masked = math.ceil(self.seq_len * self.mask_ratio_generator.rvs(1)[0])
        orders = self.sample_orders(len(x))
        mask = torch.zeros(len(x), self.seq_len).scatter(1, orders[:, :masked], 1.0)
        condition = self.inner.condition(labels, len(x)).vectors[:, 0]
        z = self.forward_mae_decoder(self.forward_mae_encoder(x, mask, condition), mask)
        loss = self.diffloss.loss(z.flatten(0, 1), x.flatten(0, 1))  # (B L,)
        return (loss * mask.flatten()).sum() / mask.sum()
