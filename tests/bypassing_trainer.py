"""The trainer of models that read a layer's weight past the layer: `python -m bypassing_trainer --request FILE`."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from relora_train.process import serve_request
from relora_train.training.requests import StageRequest
from relora_train.training.trainer import run_stage


def bypassing_forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """As Mamba reads its dt_proj: the weight of up_proj, not the layer."""
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * F.linear(x, mlp.up_proj.weight.to(x.dtype)))


if __name__ == "__main__":
    modeling_llama.LlamaMLP.forward = bypassing_forward
    serve_request(StageRequest, run_stage)
