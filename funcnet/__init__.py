"""funcnet: networks trained by an explicit, hand-written backward pass."""

from funcnet._internal.errors import InputError
from funcnet.calculus.derivatives import ChainRule, chain, derivative, gradient, jacobian, matrix_derivative
from funcnet.calculus.worked_examples import WORKED, Worked
from funcnet.check.checker import check_layer, check_vjp
from funcnet.check.compare import compare_grads
from funcnet.check.judge import Leaf
from funcnet.check.report import Failure, Report
from funcnet.combinators.freeze import Frozen, freeze
from funcnet.combinators.mixed import mixed
from funcnet.combinators.moe import moe
from funcnet.combinators.named import named
from funcnet.combinators.packed import packed
from funcnet.combinators.parallel import branch, parallel
from funcnet.combinators.recurrent import bidirectional, stacked
from funcnet.combinators.remat import remat
from funcnet.combinators.repeat import repeat
from funcnet.combinators.reversible import reversible
from funcnet.combinators.routing import RouterTotals, router_totals
from funcnet.combinators.serial import serial
from funcnet.combinators.sides import select
from funcnet.combinators.skip import skip
from funcnet.combinators.spectral_norm import spectral_norm
from funcnet.combinators.tied import tied
from funcnet.combinators.weight_norm import weight_norm
from funcnet.compositions import mlp, residual_block, separable_conv, transformer_block
from funcnet.gradients.common_factors import Gather, Outer, Scale, Shift, Sum, Window
from funcnet.gradients.contraction import Contraction, Rows, contraction, keep, per_example, rows, squared_norm, total
from funcnet.gradients.factor import Blocks, Factor, Mapped, Mixing, Pulled, Stacked, Use, is_factor
from funcnet.inspect.explain import Explanation, explain
from funcnet.inspect.jacobians import LayerJacobians, layer_jacobians
from funcnet.inspect.summary import Row, Summary, summary
from funcnet.interop.jax import differentiable, from_function
from funcnet.interop.safetensors import load_params, save_params
from funcnet.interop.torch.convert import from_torch, to_torch
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
from funcnet.layers.bilinear import bilinear
from funcnet.layers.conv import conv, depthwise_conv
from funcnet.layers.conv_transpose import conv_transpose
from funcnet.layers.dense import dense
from funcnet.layers.dropout import drop_path, dropout, spatial_dropout
from funcnet.layers.embedding import embedding
from funcnet.layers.gate import geglu, glu, swiglu
from funcnet.layers.join import add, concat
from funcnet.layers.lru import lru
from funcnet.layers.norm import layer_norm, rms_norm
from funcnet.layers.normalize import group_norm, instance_norm, l2_normalize
from funcnet.layers.piecewise import maxout, prelu
from funcnet.layers.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from funcnet.layers.positions import position_embedding, rotary, sinusoidal_positions
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
from funcnet.losses.router import router_losses
from funcnet.losses.similarity import contrastive, cosine
from funcnet.structure import Composed, Wrapped, constructor
from funcnet.train.evaluate import evaluate
from funcnet.train.finite import NotFiniteError
from funcnet.train.layerwise import layerwise_step
from funcnet.train.loop import fit
from funcnet.train.objective import Objective, objective, value_and_grad
from funcnet.train.step import TrainState, TrainStep, init_train_state, train_step

__version__ = "0.1.0"
__all__ = [
    "WORKED",
    "Blocks",
    "ChainRule",
    "Composed",
    "Contraction",
    "Explanation",
    "Factor",
    "Failure",
    "Frozen",
    "Gather",
    "InputError",
    "Layer",
    "LayerJacobians",
    "Leaf",
    "Loss",
    "Mapped",
    "Mixing",
    "NotFiniteError",
    "Objective",
    "Outer",
    "Pulled",
    "Report",
    "RouterTotals",
    "Row",
    "Rows",
    "Scale",
    "Shift",
    "Stacked",
    "Sum",
    "Summary",
    "TrainState",
    "TrainStep",
    "Use",
    "Window",
    "Worked",
    "Wrapped",
    "add",
    "attention",
    "avg_pool",
    "batch_norm",
    "bidirectional",
    "bilinear",
    "binary_cross_entropy",
    "branch",
    "celu",
    "chain",
    "check_layer",
    "check_vjp",
    "compare_grads",
    "concat",
    "constructor",
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
    "moe",
    "mse",
    "named",
    "objective",
    "packed",
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
    "router_losses",
    "router_totals",
    "rows",
    "save_params",
    "select",
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


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
