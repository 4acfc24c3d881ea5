"""funcnet: networks trained by an explicit, hand-written backward pass."""

from funcnet.calculus import ChainRule, chain, derivative, gradient, jacobian, matrix_derivative
from funcnet.check.checker import check_layer, check_vjp
from funcnet.check.compare import compare_grads
from funcnet.check.judge import Leaf
from funcnet.check.report import Failure, Report
from funcnet.combine import parallel, repeat, serial, skip
from funcnet.expect import InputError
from funcnet.explain import Explanation, LayerJacobians, explain, layer_jacobians
from funcnet.factors import (
    Contraction,
    Outer,
    Scale,
    Shift,
    contraction,
    is_factor,
    keep,
    per_example,
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
from funcnet.layers.dense import dense
from funcnet.layers.dropout import dropout
from funcnet.layers.norm import layer_norm, rms_norm
from funcnet.layers.reshape import flatten, reshape
from funcnet.losses import Loss, binary_cross_entropy, cross_entropy, huber, mae, mse
from funcnet.summary import Row, Summary, summary
from funcnet.train.finite import NotFiniteError
from funcnet.train.layerwise import layerwise_step
from funcnet.train.loop import evaluate, fit
from funcnet.train.objective import Objective, objective, value_and_grad
from funcnet.train.step import TrainState, TrainStep, init_train_state, train_step
from funcnet.transform import mixed, remat
from funcnet.worked import WORKED, Worked

__all__ = [
    "WORKED",
    "ChainRule",
    "Contraction",
    "Explanation",
    "InputError",
    "Layer",
    "LayerJacobians",
    "Failure",
    "Leaf",
    "Loss",
    "NotFiniteError",
    "Objective",
    "Outer",
    "Report",
    "Row",
    "Scale",
    "Shift",
    "Summary",
    "TrainState",
    "TrainStep",
    "Worked",
    "binary_cross_entropy",
    "celu",
    "chain",
    "check_layer",
    "check_vjp",
    "compare_grads",
    "contraction",
    "cross_entropy",
    "dense",
    "derivative",
    "dropout",
    "elementwise",
    "elu",
    "evaluate",
    "explain",
    "fit",
    "flatten",
    "gelu",
    "gradient",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "huber",
    "identity",
    "init_train_state",
    "is_factor",
    "jacobian",
    "keep",
    "layer_jacobians",
    "layer_norm",
    "layerwise_step",
    "leaky_relu",
    "log_sigmoid",
    "mae",
    "matrix_derivative",
    "mish",
    "mixed",
    "mse",
    "objective",
    "parallel",
    "per_example",
    "relu",
    "relu6",
    "remat",
    "repeat",
    "reshape",
    "rms_norm",
    "selu",
    "serial",
    "sigmoid",
    "silu",
    "skip",
    "softplus",
    "softsign",
    "squared_norm",
    "squareplus",
    "stateless",
    "summary",
    "tanh",
    "total",
    "train_step",
    "value_and_grad",
]
