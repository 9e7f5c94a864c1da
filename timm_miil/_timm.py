"""The one place for timm names that are private or recently changed, each with its reason."""
from timm.models import get_model_input_config  # public since 1.0.31
# The public `save_for_hf` writes weights of its own beside, without a header and in no fixed order.
from timm.models._hub import save_config_for_hf
# No public way to say which arguments rebuild a model.
from timm.models._input import update_model_args, update_model_input_size

__all__ = ['get_model_input_config', 'save_config_for_hf', 'update_model_args', 'update_model_input_size']
