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
            ValueError: for a checkpoint without all of the model's parameters, which diffusers would leave unset.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        missing_keys = sorted(loading_info.get("missing_keys", []))
        if missing_keys:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing_keys)} of the parameters of {cls.__name__}: "
                f"{', '.join(missing_keys)}."
            )
        return (model, loading_info) if output_loading_info else model
