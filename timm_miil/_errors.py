"""Error types a caller may want to tell apart; plain ValueError and TypeError serve for wrong arguments."""

__all__ = [
    'CatalogError', 'CheckpointError', 'HubError', 'ImageError', 'PredictionError', 'RecipeError', 'TrainingError',
    'TrainingInterrupted',
]


class CatalogError(ValueError):
    """A data file of the catalogue is wrong; the message names file, table and key."""


class CheckpointError(RuntimeError):
    """Weights do not fit the network they are loaded into, or a file is not a checkpoint."""


class HubError(RuntimeError):
    """The Hub refuses, does not answer, or has something else than was sent; the message says what to do."""


class ImageError(OSError):
    """A picture could not be read; the message is one line with its name and the reason."""


class PredictionError(RuntimeError):
    """A picture could not be read or a model could not be used for tagging."""


class RecipeError(ValueError):
    """A training recipe holds an unknown key or a value of the wrong type or range."""


class TrainingError(RuntimeError):
    """Training cannot go on, such as with a loss that is not finite."""


class TrainingInterrupted(RuntimeError):
    """A signal stopped the training after all was saved; the message says how to go on."""
