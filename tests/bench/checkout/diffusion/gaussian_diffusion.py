"""The double's names of what a diffusion predicts, and its betas."""

import enum

from seriatim.heads.ddpm import cosine_betas

ModelMeanType = enum.Enum("ModelMeanType", ["EPSILON"])
ModelVarType = enum.Enum("ModelVarType", ["LEARNED_RANGE"])
LossType = enum.Enum("LossType", ["MSE"])


def get_named_beta_schedule(name, steps):
    assert name == "cosine"
    return cosine_betas(steps)
