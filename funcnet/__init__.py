"""funcnet: networks trained by an explicit, hand-written backward pass."""

from funcnet.blocks import mlp, residual_block, separable_conv, transformer_block
from funcnet.bridge import differentiable, from_function
from funcnet.calculus import ChainRule, chain, derivative, gradient, jacobian, matrix_derivative
from funcnet.check.checker import check_layer, check_vjp
from funcnet.check.compare import compare_grads
from funcnet.check.judge import Leaf
from funcnet.check.report import Failure, Report
from funcnet.combine import branch, parallel, repeat, serial, skip
from funcnet.expect import InputError
from funcnet.explain import Explanation, LayerJacobians, explain, layer_jacobians
from funcnet.factors import (
    Blocks,
    Contraction,
    Gather,
    Outer,
    Pulled,
    Rows,
    Scale,
    Shift,
    Sum,
    Window,
    contraction,
    is_factor,
    keep,
    per_example,
    rows,
    squared_norm,
    total,
)
from funcnet.layer import Layer, elementwise, stateless
from funcnet.layers.activation import (
    celu,
    elu,
    gelu,
    hard_sigmoid,
    hard_silu,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    squareplus,
    tanh,
)
from funcnet.layers.attention import attention
from funcnet.layers.batch_norm import batch_norm
from funcnet.layers.conv import conv, depthwise_conv
from funcnet.layers.conv_transpose import conv_transpose
from funcnet.layers.dense import dense
from funcnet.layers.dropout import drop_path, dropout, spatial_dropout
from funcnet.layers.embedding import embedding, position_embedding, rotary, sinusoidal_positions
from funcnet.layers.gate import geglu, glu, swiglu
from funcnet.layers.join import add, concat
from funcnet.layers.lru import lru
from funcnet.layers.norm import layer_norm, rms_norm
from funcnet.layers.normalize import group_norm, instance_norm, l2_normalize
from funcnet.layers.piecewise import maxout, prelu
from funcnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from funcnet.layers.recurrent import gru, lstm, rnn
from funcnet.layers.reshape import flatten, reshape
from funcnet.layers.softmax import log_softmax, softmax
from funcnet.losses.binary import binary_cross_entropy, focal
from funcnet.losses.cross_entropy import cross_entropy
from funcnet.losses.ctc import ctc
from funcnet.losses.divergence import kl_divergence
from funcnet.losses.linear import linear_cross_entropy
from funcnet.losses.loss import Loss
from funcnet.losses.margin import hinge, triplet
from funcnet.losses.regression import huber, mae, mse
from funcnet.losses.similarity import contrastive, cosine
from funcnet.pytorch.convert import from_torch, to_torch
from funcnet.reparametrize import spectral_norm, weight_norm
from funcnet.reversible import reversible
from funcnet.saved import load_params, save_params
from funcnet.sequences import bidirectional, stacked
from funcnet.summary import Row, Summary, summary
from funcnet.tie import tied
from funcnet.train.finite import NotFiniteError
from funcnet.train.layerwise import layerwise_step
from funcnet.train.loop import evaluate, fit
from funcnet.train.objective import Objective, objective, value_and_grad
from funcnet.train.step import TrainState, TrainStep, init_train_state, train_step
from funcnet.transform import Frozen, freeze, mixed, named, remat
from funcnet.worked import WORKED, Worked

__all__ = [
    "WORKED",
    "Blocks",
    "ChainRule",
    "Contraction",
    "Explanation",
    "Failure",
    "Frozen",
    "Gather",
    "InputError",
    "Layer",
    "LayerJacobians",
    "Leaf",
    "Loss",
    "NotFiniteError",
    "Objective",
    "Outer",
    "Pulled",
    "Report",
    "Row",
    "Rows",
    "Scale",
    "Shift",
    "Sum",
    "Summary",
    "TrainState",
    "TrainStep",
    "Window",
    "Worked",
    "add",
    "attention",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "binary_cross_entropy",
    "branch",
    "celu",
    "chain",
    "check_layer",
    "check_vjp",
    "compare_grads",
    "concat",
    "contraction",
    "contrastive",
    "conv",
    "conv_transpose",
    "cosine",
    "cross_entropy",
    "ctc",
    "dense",
    "depthwise_conv",
    "derivative",
    "differentiable",
    "drop_path",
    "dropout",
    "elementwise",
    "elu",
    "embedding",
    "evaluate",
    "explain",
    "fit",
    "flatten",
    "focal",
    "freeze",
    "from_function",
    "from_torch",
    "geglu",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "glu",
    "gradient",
    "group_norm",
    "gru",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "hinge",
    "huber",
    "identity",
    "init_train_state",
    "instance_norm",
    "is_factor",
    "jacobian",
    "keep",
    "kl_divergence",
    "l2_normalize",
    "layer_jacobians",
    "layer_norm",
    "layerwise_step",
    "leaky_relu",
    "linear_cross_entropy",
    "load_params",
    "log_sigmoid",
    "log_softmax",
    "lru",
    "lstm",
    "mae",
    "matrix_derivative",
    "max_pool",
    "maxout",
    "mish",
    "mixed",
    "mlp",
    "mse",
    "named",
    "objective",
    "parallel",
    "per_example",
    "position_embedding",
    "prelu",
    "relu",
    "relu6",
    "remat",
    "repeat",
    "reshape",
    "residual_block",
    "reversible",
    "rms_norm",
    "rnn",
    "rotary",
    "rows",
    "save_params",
    "selu",
    "separable_conv",
    "serial",
    "sigmoid",
    "silu",
    "sinusoidal_positions",
    "skip",
    "softmax",
    "softplus",
    "softsign",
    "spatial_dropout",
    "spectral_norm",
    "squared_norm",
    "squareplus",
    "stacked",
    "stateless",
    "summary",
    "swiglu",
    "tanh",
    "tied",
    "to_torch",
    "total",
    "train_step",
    "transformer_block",
    "triplet",
    "value_and_grad",
    "weight_norm",
]
