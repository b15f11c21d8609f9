"""What transformers' Auto classes know of our folders: a config that reads them, and doors to base model and tokenizer.

The package registers the config as soon as transformers' AutoConfig is imported (see `duohead`), so this module loads
in the middle of that and must stay light; the config registers the doors, since no Auto class opens one without a
config. A folder's remote code names the same classes, so there is one implementation, the installed one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Self

from transformers.configuration_utils import PreTrainedConfig

from duohead.formats import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DuoheadConfig(PreTrainedConfig):
    """The config.json of a pattern folder; its keys are attributes. The model's own config is that of the base."""

    model_type = MODEL_TYPE

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """As in Python. Also a copied or unpickled config, which no Auto class has read, makes itself known."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.register(DuoheadConfig, DuoheadForCausalLM, exist_ok=True)
        AutoTokenizer.register(DuoheadConfig, DuoheadTokenizer, exist_ok=True)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but what `AutoModelForCausalLM.from_pretrained` was given is all left for the model.

        transformers would take what happens to be an attribute of this config (``output_hidden_states``,
        ``attn_implementation``), and the base model would never hear of it.
        """
        if not kwargs.pop("return_unused_kwargs", False):
            return super().from_dict(config_dict, **kwargs)
        name = kwargs.pop("name_or_path", "")
        return cls(**{**config_dict, "name_or_path": name}), kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: it would have `save_pretrained` copy our source into a folder, which names the package instead."""


class DuoheadForCausalLM:
    """Loads the base model of an adapter with the policy on it. What it returns is a model of the base's own class."""

    config_class = DuoheadConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any
    ) -> PreTrainedModel:
        """The model of an adapter; see `duohead.adapter.load.load_model` for its options."""
        from duohead.adapter.load import load_model

        return load_model(pretrained_model_name_or_path, *inputs, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> NoReturn:
        raise ValueError(
            "an adapter has no architecture of its own to make with random weights; use from_pretrained(folder), or "
            "from_config with the config of its base model"
        )


class DuoheadTokenizer:
    """Loads the tokenizer of an adapter's base model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *inputs: Any, **options: Any
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of an adapter's base; see `duohead.adapter.load.load_tokenizer` for its options."""
        from duohead.adapter.load import load_tokenizer

        return load_tokenizer(pretrained_model_name_or_path, *inputs, **options)


def register() -> None:
    """Tell AutoConfig of our folders; whoever reads one then has a config that tells the other Auto classes."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, DuoheadConfig, exist_ok=True)
