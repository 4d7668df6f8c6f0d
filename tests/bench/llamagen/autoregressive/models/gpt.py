"""A double of LlamaGen's module: its interface, on parts of this package; nothing of it is the original's.

Written for the tests from the formulas of Sun et al. 2024. It has no cache: it sees the whole sequence again.
"""

from dataclasses import dataclass

import torch
from torch import nn

from seriatim.backbones.causal_transformer import Causal
from seriatim.checkpoints.llamagen import apart, official_name
from seriatim.heads.categorical import Categorical
from seriatim.models.causal_model import CausalModel


@dataclass
class ModelArgs:
    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    multiple_of: int = 256  # of the hidden width
    num_classes: int = 1000
    model_type: str = "c2i"
    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.num_classes, self.model_type = config, config.num_classes, config.model_type
        backbone = Causal(
            config.block_size, vocab=config.vocab_size, width=config.dim, depth=config.n_layer, heads=config.n_head,
            rotate_prefix=False, hidden=-(-int(8 * config.dim / 3) // config.multiple_of) * config.multiple_of,
        )  # fmt: skip
        self.ours = CausalModel(backbone, Categorical(config.vocab_size, bias=False), classes=config.num_classes)

    def load_state_dict(self, tensors):
        state = apart(tensors)
        self.ours.load_state_dict({name: state[official_name(name)] for name in self.ours.state_dict()})

    def setup_caches(self):
        self.codes = []

    def forward(self, idx, cond_idx=None, input_pos=None):
        if idx is None:
            self.condition = self.ours.condition(torch.where(cond_idx == self.num_classes, -1, cond_idx), len(cond_idx))
        else:
            self.codes.append(idx[:, 0])
        tokens = torch.zeros(len(self.condition), self.config.block_size, dtype=torch.long)
        for i, code in enumerate(self.codes):
            tokens[:, i] = code
        z = self.ours.backbone.sequence(self.condition, tokens)[:, [len(self.codes)]]
        return self.ours.head.logits(z), None
