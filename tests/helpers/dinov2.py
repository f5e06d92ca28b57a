"""Small vision transformers with random weights, and weights that an ONNX file holds."""

import re

import numpy as np
import torch

from models.dinov2 import DINOv2, Size

TINY = {  # the two ways of resampling the position embedding
    "plain": Size(16, 2, 2),
    "registers": Size(16, 2, 2, registers=4, antialias=True, offset=0.0),
}


def random_weights(size: Size, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the official names that keep every token's size from block to block."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in DINOv2(size).state_dict().items():
        made = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and name.endswith("weight"):
            made = made / value[0].numel() ** 0.5
        elif name.endswith("norm.weight") or re.search(r"norm\d.weight", name):
            made = 1 + 0.3 * made
        weights[name] = made
    return weights


def onnx_weights(graph) -> dict[str, torch.Tensor]:
    """The weights of DINOv2-small in an ONNX graph of transformers, under the official names.

    Matrices have no names there: each is the one whose product the named bias is added to.
    """
    from onnx import numpy_helper

    arrays = {t.name: np.array(numpy_helper.to_array(t)) for t in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    matrices = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product = next((made_by[n] for n in node.input if n in made_by), None)
        if bias and product is not None and product.op_type == "MatMul":
            # stored [in, out]
            matrices[bias.removesuffix("bias") + "weight"] = arrays[product.input[1]].T
    arrays |= matrices
    first = "backbone.embeddings."
    (stored,) = (a for a in arrays.values() if a.shape == (1, 1369, 384))
    (of_class,) = (a for n, a in arrays.items() if n.startswith("onnx::Concat"))
    weights = {
        "cls_token": arrays[f"{first}cls_token"],
        "pos_embed": np.concatenate([of_class, stored], 1),
        "patch_embed.proj.weight": arrays[f"{first}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays[f"{first}patch_embeddings.projection.bias"],
    }
    for i in range(12):
        theirs = f"backbone.encoder.layer.{i}."
        same = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        same["attn.proj"] = "attention.output.dense"
        for kind in ("weight", "bias"):
            for ours, name in same.items():
                weights[f"blocks.{i}.{ours}.{kind}"] = arrays[f"{theirs}{name}.{kind}"]
            parts = [
                arrays[f"{theirs}attention.attention.{part}.{kind}"]
                for part in ("query", "key", "value")
            ]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
        for number in (1, 2):
            gamma = arrays[f"{theirs}layer_scale{number}.lambda1"]
            weights[f"blocks.{i}.ls{number}.gamma"] = gamma
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in weights.items()}
