"""The double's names of what a diffusion predicts, and its betas."""

import enum

from seriatim.heads.ddpm import full_chain

ModelMeanType = enum.Enum("ModelMeanType", ["EPSILON"])
ModelVarType = enum.Enum("ModelVarType", ["LEARNED_RANGE"])
LossType = enum.Enum("LossType", ["MSE"])


def get_named_beta_schedule(name, steps):
    assert name == "cosine"
    return full_chain(steps).betas
