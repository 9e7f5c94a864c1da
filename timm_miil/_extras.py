"""Optional packages: which pip extra brings which import."""
import importlib
from types import ModuleType

__all__ = ['EXTRA_OF_IMPORT', 'require']

EXTRA_OF_IMPORT = {
    'accelerate': 'train',
    'matplotlib': 'train',
    'sklearn': 'train',
    'datasets': 'data',
    'pyarrow': 'data',
    'webdataset': 'data',
    'tensorboard': 'log',
    'trackio': 'log',
    'onnx': 'export',
    'onnxruntime': 'export',
    'scipy': 'nas',
    'soundfile': 'audio',
    'av': 'video',
    'gradio': 'demo',
    'sentence_transformers': 'text',
    'transformers': 'text',
    'pytorch_grad_cam': 'explain',
    'pytorch_metric_learning': 'metric',
}


def require(import_name: str) -> ModuleType:
    """Import an optional package.

    Args:
        import_name: Dotted module name; its first part is listed in `EXTRA_OF_IMPORT`.

    Raises:
        ImportError: If the package is not installed, with the pip line that installs it.
    """
    extra = EXTRA_OF_IMPORT[import_name.partition('.')[0]]
    try:
        return importlib.import_module(import_name)
    except ImportError as error:
        raise ImportError(
            f'{import_name} is needed here and is not installed; run: pip install "timm-miil[{extra}]".') from error
