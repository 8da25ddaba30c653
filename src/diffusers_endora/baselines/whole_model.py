"""The base of the baselines' networks: diffusers' `ModelMixin`, which loads all of a model or nothing."""

import os
from typing import Any

from diffusers.models.modeling_utils import ModelMixin


class WholeModel(ModelMixin):
    """A `ModelMixin` whose weights are all read, as those of `EndoraTransformer3DModel` are."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As of every diffusers model.

        Raises:
            ValueError: for a checkpoint that lacks some of the model's tensors, which diffusers would leave unset, or
                has others, which it would leave out: those of another model.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has tensors beside")):
            if keys := sorted(loading_info.get(kind, [])):
                count = f"{len(keys)} of the" if kind == "missing_keys" else "the"
                raise ValueError(
                    f"{pretrained_model_name_or_path} {what} {count} parameters of {cls.__name__}: {', '.join(keys)}."
                )
        return (model, loading_info) if output_loading_info else model
