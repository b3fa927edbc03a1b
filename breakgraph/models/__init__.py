"""Architectures, the registry that names them, and the weight loader."""

from breakgraph.models.base import CausalLM, LayerStack, PrefillModel, SequenceClassifier
from breakgraph.models.registry import MODELS, find_model_class
from breakgraph.models.weights import ModelLoadError, load_model

__all__ = [
    "MODELS",
    "CausalLM",
    "LayerStack",
    "ModelLoadError",
    "PrefillModel",
    "SequenceClassifier",
    "find_model_class",
    "load_model",
]
