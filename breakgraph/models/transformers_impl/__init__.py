"""Models that run through their transformers class, attention by the KV pool and in breaks."""

from breakgraph.models.transformers_impl.classifier import TransformersClassifier
from breakgraph.models.transformers_impl.loading import load_transformers_model
from breakgraph.models.transformers_impl.model import TransformersModel
from breakgraph.models.transformers_impl.wrap import wrap_model

__all__ = ["TransformersClassifier", "TransformersModel", "load_transformers_model", "wrap_model"]
