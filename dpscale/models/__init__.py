"""Flax models without operations across examples. Add a file with a `@register`ed linen module, and it has a
name."""

from dpscale.models.functional import Functional as Functional
from dpscale.models.functional import as_functional as as_functional
from dpscale.models.registry import build_model as build_model
from dpscale.models.registry import model_names as model_names
from dpscale.models.registry import register as register
